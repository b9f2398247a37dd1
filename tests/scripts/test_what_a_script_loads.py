"""Rooms that do not know each other: what importing a script loads beside itself, what search/ and plots/ import."""

import ast
import subprocess
import sys

import pytest

from tests.images import TOP


@pytest.mark.parametrize(
    ("script", "room"), [("train_ssl", "models.anomaly"), ("train_anomaly", "models.ssl"), ("eval", "models.anomaly")]
)
def test_a_script_does_not_load_the_other_ones_methods(script, room):
    program = f"import {script}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=TOP, capture_output=True, text=True, check=True)
    names = loaded.stdout.split()
    assert script in names and [name for name in names if f"{name}.".startswith(f"{room}.")] == []


@pytest.mark.parametrize("room", ["search", "plots"])
def test_a_room_imports_nothing_of_ours_but_runtime(room):
    rooms = {path.name for path in TOP.iterdir() if path.is_dir()}
    for path in (TOP / room).glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        imported = {node.module.split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
        assert imported & rooms <= {"runtime", room}, path.name
