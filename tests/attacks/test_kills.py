"""Scripts killed at a change of their folder (tests/attacks/at_event.py) and started again: in the end all is bit for
bit as without a kill, and nothing else is left."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from runtime import scripts, signals
from runtime.errors import UserError
from tests.images import TOP, command, write_classes, write_mvtec
from tests.processes import start_script
from tests.scripts import test_train_anomaly, test_train_classifier, test_train_ssl
from tests.sweeps import SCRIPT, YAML

KILLED = -9
SMALL = ["data.size=32", "backbone=mobilenet_v2", "backbone.width=0.25", "backbone.weights=null"]
STATUS = threading.Lock()  # who starts a process reads the exit status of all others, which can be read only once
CELLS = 6  # kills of a sweep by its cell
THIRD = """
from runtime import config, errors
from tests.runtime.test_run import Config, main

errors.run(lambda argv: main(config.load(Config, argv)))
"""
CELL = """
import os, signal, sys, time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [{top!r}, str(HERE)]

from runtime import distributed, errors
from tests.attacks.at_event import meet
from {module} import Config
from {module} import main as work

RANK = os.environ.get("RANK", "0")


def kill_the_sweep():
    while not (HERE / "sweep").exists():
        time.sleep(0.01)
    os.kill(int((HERE / "sweep").read_text()), signal.SIGKILL)
    time.sleep(300)  # what comes after this is the work of an orphan


def main(argv):
    (HERE / f"pid{{RANK}}").write_text(str(os.getpid()))
    if (HERE / "which").exists() and RANK == "0":
        meet(int((HERE / "which").read_text()), (HERE / "folder").read_text(), kill_the_sweep)
    distributed.setup("cpu")
    work(argv)


if __name__ == "__main__":
    errors.run(main)
"""


class Case(NamedTuple):
    """A command that writes below a folder."""

    words: Callable[[Path], list[str]]  # script and words, of the folder
    kills: int  # in the slow test
    before: Callable[[Path], object] | None = None  # what makes the folder ready for the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_classes(place / "classes", each=9)
    write_mvtec(place / "mvtec", normal=8)
    write_mvtec(place / "fewer", normal=6)
    (place / "third.py").write_text(THIRD)
    for name in ("my_train.py", "my_test.py"):
        (place / name).write_text(SCRIPT)
    (place / "x.yaml").write_text(YAML)
    return place


def run(action: str, which: int, folder: Path, words: list[str], out: Path) -> tuple[int, str]:
    """Exit status and stderr of the words, acted on at a change of the folder."""
    with STATUS:
        process = start_script(["tests/attacks/at_event.py", action, str(which), str(folder), *words], out)
    while is_alive(process):
        time.sleep(0.01)
    return process.exitcode, Path(f"{out}.err").read_text()


def is_alive(process) -> bool:
    with STATUS:
        return process.is_alive()


def undisturbed(case: Case, folder: Path, out: Path) -> tuple[dict, int]:
    """What the command leaves, and in how many changes."""
    if case.before:
        case.before(folder)
    status, err = run("count", 0, folder, case.words(folder), out)
    assert status == 0, err
    return state_of(folder), int(err.split()[-1])


def killed(case: Case, which: list[int], folder: Path, out: Path) -> dict:
    """What is left of a command that is killed at these changes of its attempts, and then ends."""
    if case.before:
        case.before(folder)
    for change in which:
        status, err = run("kill", change, folder, case.words(folder), out)
        assert status == KILLED, err
    status, err = run("count", 0, folder, case.words(folder), out)
    assert status == 0, err
    return state_of(folder)


def state_of(folder: Path) -> dict:
    """{name: content} of all files, without times, the folder's own name and TensorBoard's events."""
    files = (path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)
    return {str(path.relative_to(folder)): plain(content(path), str(folder)) for path in files}


def content(path: Path):
    if path.suffix == ".pt" and path.read_bytes()[:2] == b"PK":
        return torch.load(path, weights_only=True)
    text = path.read_bytes().decode(errors="surrogateescape")
    if path.suffix in (".json", ".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text))) if path.suffix == ".csv" else text


def plain(value, folder: str):
    """Nested values that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        kept = {key: v for key, v in value.items() if not re.search(r"second|speed|^time$|^checksum$", str(key))}
        if version := kept.get("version"):  # without the commit, which may be made at any time
            kept["version"] = version.split()[1:]
        if results := kept.get("pretraining"):  # of a cell, as text
            kept["pretraining"] = json.loads(results)
        return {key: plain(part, folder) for key, part in kept.items()}
    if isinstance(value, list | tuple):
        return [plain(part, folder) for part in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else repr(value)


def differences(state: dict, expected: dict) -> list[str]:
    return sorted(name for name in {*state, *expected} if state.get(name) != expected.get(name))


def litter(state: dict) -> list[str]:
    return [name for name in state if any(word in name for word in ("unfinished", ".lock", ".removing"))]


def anomaly(place: Path, name: str, *more: str) -> Callable[[Path], list[str]]:
    words = test_train_anomaly.words
    return lambda folder: ["train_anomaly.py", *words(name, place / "mvtec", folder, *SMALL, *more)]


def ssl(place: Path, *more: str) -> Callable[[Path], list[str]]:
    about = ["save.best=true", "save.keep_last=2", "save.every=2", "batch_size=4", *more]
    return lambda folder: ["train_ssl.py", *test_train_ssl.words("simclr", place / "classes", folder, *about)]


def classifier(place: Path, *more: str) -> Callable[[Path], list[str]]:
    about = ["save_every=2", "early_stopping.patience=2", *more]
    return lambda folder: ["train_classifier.py", *test_train_classifier.words(place / "classes", folder, *about)]


def sweep(place: Path, **keys) -> Callable[[Path], list[str]]:
    def words(folder: Path) -> list[str]:
        path = place / f"{folder.name}.yaml"
        path.write_text(json.dumps(keys | {"runs": str(folder), "run_name": "grid"}))
        return ["sweep.py", str(path)]

    return words


def cases(place: Path) -> dict[str, Case]:
    def earlier(name: str, *more: str) -> Callable[[Path], object]:
        """Puts a finished run into the folder, made once."""
        made = place / " ".join(["earlier", name, *more]).replace("/", ".")

        def copy(folder: Path) -> None:
            if not made.exists():
                status, err = run(
                    "count", 0, made, anomaly(place, name, "run_name=earlier", *more)(made), place / "out"
                )
                assert status == 0, err
            shutil.copytree(made, folder)

        return copy

    examined = [str(place / "mvtec/part/test/spot"), "device=cpu"]
    measured = ["eval.py", "task=knn", *SMALL, "data.name=folder", f"data.root={place}/classes", "device=cpu"]
    grid = {"pretraining": {"random": "", "mine": f"{place}/my_train.py {place}/x.yaml"}, "seeds": [0, 1]}
    grid |= {"detectors": {"a": f"{place}/my_test.py {place}/x.yaml"}, "tasks": {"one": "data.root=1", "two": "k=2"}}
    return {
        "train_ssl": Case(ssl(place), 22),
        "train_classifier": Case(classifier(place), 10),
        "by gradient": Case(anomaly(place, "rd4ad"), 14),
        "trained, then fitted": Case(anomaly(place, "cflow", "epochs=2"), 8),
        "fitted": Case(anomaly(place, "patchcore"), 12),
        "update": Case(
            lambda folder: anomaly(place, "patchcore", f"update={folder}/earlier/last.pt")(folder),
            8,
            earlier("patchcore", f"data.root={place}/fewer"),
        ),
        "resume=never": Case(
            anomaly(place, "embedding", "resume=never", "run_name=earlier"), 10, earlier("embedding", "seed=1")
        ),
        "predict": Case(
            lambda folder: ["predict.py", f"{folder}/earlier", *examined, f"out={folder}/out"], 10, earlier("patchcore")
        ),
        "eval": Case(lambda folder: [*measured, f"runs={folder}"], 8),
        "sweep": Case(sweep(place, **grid), 10),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(Path("nowhere")))
def test_killed_at_any_change_equals_undisturbed(name, place, tmp_path):
    case = cases(place)[name]
    expected, count = undisturbed(case, tmp_path / "whole", tmp_path / "out")
    assert count >= case.kills and not litter(expected)

    def differing(which: int) -> list[str]:
        return differences(killed(case, [which], tmp_path / f"killed{which}", tmp_path / f"out{which}"), expected)

    chosen = sorted(random.Random(name).sample(range(1, count + 1), case.kills))
    with ThreadPoolExecutor(2) as pool:
        wrong = {which: names for which, names in zip(chosen, pool.map(differing, chosen)) if names}
    assert wrong == {}, f"{len(wrong)} of {case.kills} kills at {count} changes"
    print(f"{name}: {case.kills} kills, at {count} changes")


def test_a_run_killed_at_some_changes_equals_undisturbed(place, tmp_path):
    """The quick one, with a script of eight steps."""
    case = Case(lambda folder: [f"{place}/third.py", f"runs={folder}", "log_every=1"], 6)
    expected, count = undisturbed(case, tmp_path / "whole", tmp_path / "out")
    assert {"run/last.pt", "run/step_00000008.pt", "run/results.json"} <= {*expected} and not litter(expected)
    for number, which in enumerate(random.Random(0).sample(range(1, count + 1), case.kills)):
        state = killed(case, [which], tmp_path / f"killed{number}", tmp_path / f"out{number}")
        assert differences(state, expected) == [], f"killed at change {which} of {count}"


def is_running(process: int) -> bool:
    return signals.state_of(process) not in ("Z", "X", "")


def sweep_killed_by_its_cell(place: Path, folder: Path, which: int, words: list[str]) -> list[int]:
    """Start a sweep whose cell kills it at a change, and wait for the end of all; returns the cell's processes."""
    for name in ("sweep", "pid0", "pid1"):
        (place / name).unlink(missing_ok=True)
    (place / "which").write_text(str(which))
    (place / "folder").write_text(str(folder))
    forked = ["tests/attacks/at_event.py", "count", "0", str(folder)]
    process = start_script([*forked, *words], place / "out")
    (place / "sweep.new").write_text(str(process.pid))
    (place / "sweep.new").rename(place / "sweep")
    process.join()
    assert process.exitcode == KILLED, (place / "out.err").read_text()
    (place / "which").unlink()
    cell = [int((place / name).read_text()) for name in ("pid0", "pid1") if (place / name).exists()]
    deadline = time.monotonic() + 60
    while any(map(is_running, cell)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [process for process in cell if is_running(process)]
    for orphan in left:
        os.kill(orphan, signal.SIGKILL)
    assert cell and not left, "the cell outlives its sweep"
    return cell


def grid_of(place: Path, module: str, words: str, **keys) -> Callable[[Path], list[str]]:
    (place / "cell.py").write_text(CELL.format(top=str(TOP), module=module))
    keys |= {"pretraining": {"random": ""}, "detectors": {"a": f"{place}/cell.py {words}"}, "tasks": {"one": ""}}
    return sweep(place, **keys)


SWEEP = """
import multiprocessing, sys
from runtime import scripts

scripts.Running([sys.argv[1]], sys.argv[2], multiprocessing.get_context("fork"), {}).wait()
"""
LIGHT_CELL = """
import os, signal, time
from pathlib import Path

from runtime import scripts


def main(argv):
    (Path(__file__).parent / "pid0").write_text(str(os.getpid()))
    while not (Path(__file__).parent / "sweep").exists():
        time.sleep(0.01)
    os.kill(int((Path(__file__).parent / "sweep").read_text()), signal.SIGKILL)
    time.sleep(300)


if __name__ == "__main__":
    scripts.end_with_sweep()
    main([])
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("launcher", ["", f"env PYTHONPATH={TOP} {sys.executable}"], ids=["none", "python"])
def test_a_killed_sweep_takes_its_cell_along(launcher, place):
    (place / "light.py").write_text(LIGHT_CELL)
    (place / "like_sweep.py").write_text(SWEEP)
    sweep_killed_by_its_cell(place, place, 0, [f"{place}/like_sweep.py", f"{place}/light.py", launcher])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_sweeps_killed_while_their_cell_works_equal_an_undisturbed_one(place, tmp_path):
    words = anomaly(place, "patchcore")(tmp_path)[1:]
    grid = grid_of(
        place, "train_anomaly", " ".join(word for word in words if not word.startswith(("runs", "run_name")))
    )
    expected, _ = undisturbed(Case(grid, 0), tmp_path / "whole", tmp_path / "out")
    assert "grid/one/a/random/test_scores.csv" in expected and not litter(expected)
    for which in random.Random(1).sample(range(1, 36), CELLS):
        folder = tmp_path / f"killed{which}"
        sweep_killed_by_its_cell(place, folder, which, grid(folder))
        state = killed(Case(grid, 0), [], folder, tmp_path / "out")
        assert differences(state, expected) == [], f"killed at change {which} of the cell"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_killed_sweep_takes_the_processes_of_its_launcher_along(place, tmp_path):
    words = " ".join(w for w in anomaly(place, "patchcore")(tmp_path)[1:] if not w.startswith(("runs", "run_name")))
    grid = grid_of(place, "train_anomaly", words)
    launched = grid_of(place, "train_anomaly", words, launcher=" ".join(command([], processes=2)))
    assert len(sweep_killed_by_its_cell(place, tmp_path / "killed", 6, launched(tmp_path / "killed"))) == 2
    assert not (tmp_path / "killed/grid/one/a/random/results.json").exists()
    status, err = run("count", 0, tmp_path / "killed", launched(tmp_path / "killed"), tmp_path / "out")
    assert status == 0, err
    state, names = state_of(tmp_path / "killed"), {*undisturbed(Case(grid, 0), tmp_path / "whole", tmp_path / "out")[0]}
    assert {*state} == names and not litter(state)  # two processes add up in another order than one


def test_there_are_a_hundred_kills():
    """The slow ones: of each case, of sweeps by their cell, and of one with a launcher."""
    assert sum(case.kills for case in cases(Path("nowhere")).values()) + CELLS + 1 >= 100


@pytest.mark.parametrize(("launcher", "why"), [("torchrun '", "No closing quotation"), ("/nowhere", "No such file")])
def test_a_launcher_that_cannot_be_started_is_one_line(launcher, why):
    with pytest.raises(UserError, match=rf"launcher={launcher} cannot be started: {why}"):
        scripts.Running(["train_ssl.py"], launcher, None, {})


def test_a_sweep_on_another_machine_or_in_another_container_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(scripts, "end_with", lambda process: pytest.fail(f"{process} is not of this machine"))
    for value in ("", "1", "1 another", f"1 {scripts.machine()}x"):
        monkeypatch.setenv(scripts.SWEEP, value)
        scripts.end_with_sweep()
    monkeypatch.undo()
    scripts.end_with_sweep()
