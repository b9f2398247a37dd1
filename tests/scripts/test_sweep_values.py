"""Values in the commands of a sweep, and every file in configs/sweeps/."""

import re
import shlex

import pytest

import sweep
from runtime import config
from runtime.errors import UserError
from tests.images import TOP
from tests.sweeps import cells_of, make

SWEEPS = sorted((TOP / "configs" / "sweeps").glob("*.yaml"))
WITH_VALUES = [path for path in SWEEPS if "\nvalues:" in path.read_text()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make(tmp_path)


def test_names_stand_for_values(place):
    keys = {"values": {"root": "a b", "small": "k=3 optim.lr=0.5", "nothing": "", "lr": "7"}}
    keys |= {"tasks": {"part": "data.root={root}/{lr}"}, "also": "flag=true {nothing}", "pretraining": {"random": ""}}
    keys |= {"detectors": {"a": "my_test.py x.yaml {small}"}}
    its = cells_of(place, **keys)[1]["part/a/random"]
    assert (its["data"]["root"], its["k"], its["optim"]["lr"], its["flag"]) == ("a b/7", 3, 0.5, True)
    its = cells_of(place, ["values.small=k=4", "values.root=it's"], **keys)[1]["part/a/random"]
    assert (its["data"]["root"], its["k"], its["optim"]["lr"]) == ("it's/7", 4, 0.1)
    assert cells_of(place, ["values.small="], **keys)[1]["part/a/random"]["k"] == 1


def test_what_has_no_value_is_left_out_aloud(place, capsys):
    keys = {"values": {"here": "x", "archive": "none", "weights": "none"}}
    keys |= {"tasks": {"one": "data.root={here}", "two": "data.root={archive}"}}
    keys |= {"pretraining": {"random": "", "mine": "my_train.py x.yaml data.root={archive}", "p": "k={weights}"}}
    words, _ = cells_of(place, **keys)
    assert list(words) == ["one/a/random", "one/b/random"]
    assert capsys.readouterr().err.splitlines() == [
        "left out, because values.archive is not given: mine, two",
        "left out, because values.weights is not given: p",
    ]
    assert len(cells_of(place, ["values.archive=there"], **keys)[0]) == 1 + 2 * 2 * 2
    with pytest.raises(UserError, match=r"^nothing is left of tasks: set values.here or values.archive$"):
        cells_of(place, ["values.here=none"], **keys)


def test_mistakes_in_values(place):
    with pytest.raises(UserError, match=r"`data.root=\{rot\}`: there is no values.rot; there are root"):
        cells_of(place, values={"root": "x"}, tasks={"part": "data.root={rot}"})
    with pytest.raises(UserError, match=r"also='k=\{k\}' needs values.k, which is none"):
        cells_of(place, values={"k": "none"}, also="k={k}")
    with pytest.raises(UserError, match=r"`a 'b` cannot be split into words"):
        cells_of(place, values={"k": "a 'b"}, also="{k}")


def commands(path) -> list[list[str]]:
    """Those of a sweep's first lines."""
    found = re.findall(r"^# python sweep.py (.*)$", path.read_text(), re.MULTILINE)
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize("path", WITH_VALUES, ids=lambda path: path.stem)
def test_every_cell_of_the_grids_is_a_valid_config(path, monkeypatch):
    """With the real sets, which leave nothing out; those of the demo set are checked in tests/test_readme.py."""
    monkeypatch.chdir(TOP)
    demo, real = commands(path)
    real = [word for word in real if not word.startswith("seeds=")]
    (_, demo_cells), (axes, cells) = (sweep.plan(sweep.load(words)) for words in (demo, real))
    for on_demo, its in ((True, demo_cells), (False, cells)):
        roots = {word for cell in its for word in cell.words if word.startswith("data.root=")}
        assert roots and all(("datasets/demo" in root) == on_demo for root in roots), roots
    whole = config.load(sweep.Config, real)
    assert len(axes.tasks) == len(whole.tasks) and len(axes.pretrainings) == len(whole.pretraining)
    assert len(cells) >= len(demo_cells) and sweep.check(cells).keys() == {cell.name for cell in cells}


def test_the_seeds_grids_are_there():
    assert {f"sweep_{name}" for name in ("scavport", "survey", "stl10", "views")} == {p.stem for p in WITH_VALUES}
