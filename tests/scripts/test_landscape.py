"""task=landscape: its center is the run's own loss, it resumes to the same grid, and two processes have that of one."""

import csv
import json
import signal
import time

import pytest
import torch

import eval as evaluate
import train_classifier
import train_ssl
from evaluation.inspect import landscape
from evaluation.tasks.landscape import Config, check
from runtime import checkpoint
from runtime.errors import UserError
from tests.images import write_classes
from tests.processes import script, start_script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two classifiers of one kind, another one, and a run of SimCLR, on the same images."""
    place = tmp_path_factory.mktemp("place")
    images = write_classes(place / "images", each=9)
    write_classes(place / "others", classes=2)
    network = ["backbone=mobilenet_v2", "backbone.width=0.25", "epochs=1", "batch_size=6"]
    small = [f"data.root={images}", "data.size=32", "augment.size=32", f"runs={place}", "device=cpu", *network]
    train_ssl.main(["configs/demo/simclr_demo.yaml", *small, "optim.warmup_epochs=0", "run_name=ssl"])
    own = ["configs/demo/classifier_demo.yaml", *small, "unfreeze.head_epochs=0"]
    for seed, name in enumerate(("a", "b", "c")):
        train_classifier.main([*own, f"run_name={name}", f"seed={seed}", "holdout=0"])
    train_classifier.main([*own, "run_name=mlp", "head=mlp", "holdout=0"])
    return place


def words(place, out, *further, runs="a"):
    runs = ",".join(f"{place}/{name}" for name in runs.split(","))
    return ["task=landscape", f"runs={runs}", "points=5", "draws=2", "device=cpu", f"out={place}/{out}", *further]


def results(place, out):
    return json.loads((place / out / "results.json").read_text())


def grid_of(place, out):
    return checkpoint.load(place / out)["grid"][..., :2]  # (R, P, 2)


@pytest.mark.slow
def test_the_center_is_the_loss_that_training_has_reported(place):
    """Bit for bit, and the run on the disk is as it was."""
    before = (place / "a/last.pt").read_bytes()
    evaluate.main(words(place, "tested", "split=test", runs="a,b"))
    found = results(place, "tested")["runs"]
    for name, row, grid in zip("ab", found, grid_of(place, "tested")):
        trained = results(place, name)
        assert row["loss"] == trained["test_loss"] == float(grid[12, 0])
        assert row["accuracy"] == pytest.approx(trained["top1"])
        assert row["lowest"] == float(grid[:, 0].min()) and row["rise"] > -1
    assert (place / "a/last.pt").read_bytes() == before
    with open(place / "tested/landscape.csv") as file:
        cells = [*csv.DictReader(file)]
    assert len(cells) == 2 * 25 and [(row["run"], row["x"], row["y"]) for row in cells[:2]] == [
        ("a", "-1.0", "-1.0"),
        ("a", "-0.5", "-1.0"),
    ]
    assert float(cells[12]["loss"]) == found[0]["loss"] and (cells[12]["x"], cells[12]["y"]) == ("0.0", "0.0")


@pytest.mark.slow
def test_lines_and_planes_end_at_the_other_runs(place):
    evaluate.main(words(place, "line", "split=test", f"to={place}/b"))
    at = landscape.axis_between(5, 1.0).tolist()
    own, there = grid_of(place, "line")[0, [at.index(0), at.index(1)], 0].tolist()
    assert own == results(place, "a")["test_loss"]
    assert there == pytest.approx(results(place, "b")["test_loss"], rel=1e-4)
    assert (place / "line/curves.png").exists()
    evaluate.main(words(place, "plane", "split=test", f"to={place}/b,{place}/c"))
    assert grid_of(place, "plane").shape == (1, 25, 2) and (place / "plane/contours.png").exists()
    row = at.index(0) * 5
    assert torch.equal(grid_of(place, "plane")[0, row : row + 5], grid_of(place, "line")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "further", [("runs", "ssl"), ("norms=reestimated",), ("directions=hessian", "dimensions=1", "images=6")]
)
def test_two_processes_have_the_grid_of_one(place, further):
    runs = "ssl" if "runs" in further else "a,b"
    more = [word for word in further if "=" in word]
    one = script(["eval.py", *words(place, f"one{further[0]}", *more, runs=runs)])
    two = script(["eval.py", *words(place, f"two{further[0]}", *more, runs=runs)], processes=2)
    for out in (grid_of, lambda *about: checkpoint.load(about[0] / about[1])["around"][..., :2]):
        first, second = (out(place, f"{name}{further[0]}") for name in ("one", "two"))
        assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1)) and not first[..., 0].isnan().any()
    keys = ("loss", "rise", "lowest", "eigenvalues")
    for mine, theirs in zip(one["runs"], two["runs"]):
        assert [mine.get(key) for key in keys] == [theirs.get(key) for key in keys]
    for row, grid in zip(one["runs"], grid_of(place, f"one{further[0]}")):
        assert row["loss"] == float(grid[len(grid) // 2, 0])
    assert (one["processes"], two["processes"]) == (1, 2)


@pytest.mark.slow
def test_a_killed_one_resumes_to_the_same_grid(place):
    about = ["points=21", "draws=1", "images=18", "dimensions=2"]
    evaluate.main([word for word in words(place, "whole") if "points" not in word and "draws" not in word] + about)
    again = [word for word in words(place, "killed") if "points" not in word and "draws" not in word] + about
    process = start_script(["eval.py", *again], place / "printed")
    deadline = time.monotonic() + 300
    while process.is_alive() and not (place / "killed/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()  # the first points are saved at once, the next ones two seconds later
    process.join()
    assert process.exitcode == -signal.SIGKILL, (place / "printed.err").read_text()
    missing = int(grid_of(place, "killed")[0, :, 0].isnan().sum())
    assert 0 < missing < 441
    other = [word for word in again if "seed" not in word]
    with pytest.raises(UserError, match=r"another config \(seed: 0 -> 1"):
        evaluate.main([*other, "seed=1"])
    found = script(["eval.py", *again], processes=2)
    assert found["processes"] == 2
    for out in ("whole", "killed"):
        assert not grid_of(place, out)[..., 0].isnan().any()
    assert torch.equal(grid_of(place, "whole")[..., 0], grid_of(place, "killed")[..., 0])


@pytest.mark.slow
def test_mistakes_are_told_in_one_line(place):
    for further, text in (
        ([f"to={place}/mlp"], "mlp is another kind of network than a"),
        ([f"to={place}/ssl", "images=100"], "ssl is another kind"),
        (["data.name=folder", f"data.root={place}/others", "data.size=32"], "the classes of .*class2"),
        (["split=validation"], "no split for validation"),
    ):
        with pytest.raises(UserError, match=text):
            evaluate.main(words(place, "wrong", *further))
    with pytest.raises(UserError, match="24 images make no batch of 60"):
        evaluate.main(words(place, "wrong", "batch_size=60", runs="ssl"))  # its hold-out has three
    with pytest.raises(UserError, match="have other images"):
        evaluate.main(words(place, "wrong", "images=7", runs="a,ssl"))
    assert not (place / "wrong").exists()


def config(**keys) -> Config:
    return Config(**{"task": "landscape", "runs": ["a"]} | keys)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"runs": []}, "needs runs"),
        ({"runs": ["a", "a"]}, "twice"),
        ({"points": 50}, "points=50 must be odd"),
        ({"runs": ["a", "b"], "to": ["c"]}, "one run to one other"),
        ({"to": ["b", "c", "d"]}, "not more"),
        ({"to": ["b"], "directions": "hessian"}, "leave out directions=hessian"),
        ({"to": ["b"], "dimensions": 2}, "one network makes 1 dimensions, not dimensions=2"),
        ({"to": ["b", "c"], "dimensions": 1}, "two networks makes 2"),
        ({"to": ["b"], "extent": 0.4}, "extent=0.4 must be at least 0.5"),
    ],
)
def test_keys_that_contradict_each_other(keys, text):
    with pytest.raises(UserError, match=text):
        check(config(**keys))


def test_dimensions():
    assert check(config()) == 2 and check(config(dimensions=1)) == 1
    assert check(config(to=["b"])) == 1 and check(config(to=["b", "c"])) == 2
