"""The rooms of the house: which way imports run, how full a folder is, and names that no file has."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

from tests.images import TOP

# Each room may import those below it; rooms in one line do not know each other, unless `BESIDE` says so.
FLOORS = (
    {"runtime"},
    {"search", "losses", "data", "training"},
    {"models"},
    {"evaluation", "plots"},
    {"evaluation.tasks"},
    {"scripts", "examples"},
    {"benchmarks"},
)
BESIDE = {("evaluation", "plots")}  # a report is drawn
ONLY_RUNTIME = {"search", "plots"}  # search knows no network, and plots compute nothing
FORBIDDEN = {"utils", "common", "misc", "helpers", "base", "core"}
FOLDERS = [path for path in TOP.iterdir() if path.is_dir() and any(path.glob("*.py")) and path.name != "tests"]
FILES = [*TOP.glob("*.py"), *(path for folder in FOLDERS for path in folder.rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def room_of(module: str) -> str:
    if module.startswith("evaluation.tasks"):
        return "evaluation.tasks"
    return "scripts" if MODULES[module].parent == TOP else module.partition(".")[0]


def imports_of(module: str) -> set[str]:
    """Our modules that a module names in its imports, at the top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() if inside <= MODULES.keys() else {node.module, *inside}
    return found & MODULES.keys()


@pytest.mark.parametrize("room", sorted({room for floor in FLOORS for room in floor}))
def test_imports_run_one_way(room):
    floor = next(n for n, rooms in enumerate(FLOORS) if room in rooms)
    below = {"runtime"} if room in ONLY_RUNTIME else {name for rooms in FLOORS[:floor] for name in rooms}
    members = [module for module in MODULES if room_of(module) == room]
    assert members
    for module in members:
        met = {room_of(other) for other in imports_of(module)} - {room}
        wrong = {other for other in met - below if (room, other) not in BESIDE}
        assert not wrong, f"{module} imports {wrong}"


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in MODULES} == {room for floor in FLOORS for room in floor}


def test_no_circles():
    graph = {module: imports_of(module) - {module} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules


def test_folders_and_files_are_of_a_readable_size():
    full = Counter(path.parent.relative_to(TOP) for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in full.items() if count > 20} == {}
    long = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in long.items() if count > 500} == {}


def test_no_file_has_a_name_without_a_topic():
    assert [str(path) for path in FILES if path.stem in FORBIDDEN] == []


@pytest.mark.parametrize("script", ["train_ssl", "train_anomaly", "train_classifier", "eval", "sweep", "predict"])
def test_main_is_one_screen(script):
    tree = ast.parse((TOP / f"{script}.py").read_text())
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert (main.end_lineno or 0) - main.lineno + 1 <= 60
