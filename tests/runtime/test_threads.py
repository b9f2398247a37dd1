"""OpenMP's waiting threads sleep: every program sets this before it imports torch, and keeps what the user has set."""

from runtime.threads import SETTINGS

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("data/demo/*.py")])
PROGRAMS = [  # words after `python`
    *([str(file)] for file in sorted(ROOT.glob("*.py"))),
    *(
        ["-m", ".".join(file.relative_to(ROOT).with_suffix("").parts)]
        for file in MODULES
        if "__main__" in file.read_text()
    ),
    ["-m", "data.demo"],
    ["-m", "pytest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests/test_readme.py")],
]
SPY = f"""
import os, sys

class Spy:  # for each import of torch: a line, and an error, which saves the seconds that it takes
    def find_spec(self, name, *_):
        if name == "torch":
            with open(os.environ["SPY"], "a") as file:
                print(*(os.environ.get(name, "-") for name in {SETTINGS}), file=file)
            raise ImportError("no torch here")

sys.meta_path.insert(0, Spy())
"""


def settings_at_import(words, folder, **environment):
    """What `SETTINGS` were, in this order, each time that a program or a process of its own imported torch."""
    folder.joinpath("sitecustomize.py").write_text(SPY)
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "SPY": str(folder / "spy.txt")}
    subprocess.run([sys.executable, *words], cwd=folder, env=kept | paths | environment, capture_output=True)
    return [line.split() for line in folder.joinpath("spy.txt").read_text().splitlines()]


@pytest.mark.parametrize("words", PROGRAMS, ids=lambda words: " ".join(Path(word).name for word in words[:2]))
def test_every_program_sets_it_before_torch(words, tmp_path):
    found = settings_at_import(words, tmp_path)
    assert found and all(line == ["PASSIVE", "10000", "-", "-"] for line in found)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_is_kept(name, tmp_path):
    expected = ["123" if name == other else "-" for other in SETTINGS]
    assert settings_at_import([str(ROOT / "train_ssl.py")], tmp_path, **{name: "123"}) == [expected]


def test_torch_s_openmp_has_read_it():
    """OpenMP itself says so when it is loaded, as a process started by ours does."""
    start = "import subprocess, sys, runtime.threads; subprocess.run([sys.executable, '-c', 'import torch'])"
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=ROOT,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    policies = re.findall(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", done.stderr)
    assert policies and set(policies) == {"PASSIVE"}, done.stderr
    if counts := re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\d+)'", done.stderr):  # GCC's alone
        assert set(counts) == {"10000"}
