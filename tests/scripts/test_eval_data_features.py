"""eval.py task=data with a backbone: a planted image and a drift are found, by one process or two, in a page and in
TensorBoard."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluate
import train_ssl
from runtime.errors import UserError
from tests.images import write_classes
from tests.processes import script
from tests.scripts.test_eval_data import look

SMALL = ["data.size=64", "backbone.name=mobilenet_v2", "backbone.width=0.35", "references=6", "batch_size=16"]
WEIGHTS = Path(os.environ.get("SCAVENGE_WEIGHTS", "/nonexistent")) / "mobilenet_v2_imagenet.pth"
NEU = Path(os.environ.get("SCAVENGE_DATA", "/nonexistent")) / "neu_steel"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Stripes of two directions, and a red and green chessboard among them; a damaged file."""
    root = write_classes(tmp_path_factory.mktemp("images"), classes=2, each=30, size=32)
    board = np.zeros((32, 32, 3), np.uint8)
    board[..., 0], board[::2, ::2] = 255, (0, 255, 0)
    Image.fromarray(board).save(root / "train/class1/odd.png")
    (root / "train/class0/broken.png").write_bytes(b"no image")
    return root


def test_a_planted_image_is_first_and_splits_of_one_kind_are_alike(images, tmp_path, capsys):
    results, folder = look(["data.name=folder", f"data.root={images}", *SMALL], tmp_path, capsys)
    train = results["outliers"]["train"]
    assert train["measured"] == 61 and results["distance"]["backbone"] == "mobilenet_v2 (random weights)"
    for score in ("neighbors", "mutual"):
        first, second = train[score][:2]
        assert first["image"] == "train/class1/odd.png" and first["class"] == "class1"
        assert first["score"] > 3 and first["score"] > 2 * second["score"]
        assert train[f"{score}_beyond"] >= 1
    distance = results["distance"]["test"]
    assert distance["train"] == 61 and distance["test"] == 20 and distance["shared"] == 0
    problems = [problem["text"] for problem in results["problems"]]
    assert any("unlike the others by mutual scoring, first train/class1/odd.png" in text for text in problems)
    assert not any("look different" in text for text in problems)
    assert "Fréchet distance" in (folder / "report.html").read_text() and (folder / "report.md").read_text()
    assert len((folder / "00000/images/metadata.tsv").read_text().splitlines()) == 1 + 61 + 20


def test_a_drift_of_the_test_images_is_a_headline(images, tmp_path, capsys):
    root = tmp_path / "drifted"
    for path in sorted(images.rglob("*.png")):
        new = root / path.relative_to(images)
        new.parent.mkdir(parents=True, exist_ok=True)
        if path.stem == "broken":
            continue
        with Image.open(path) as image:
            (image.point(lambda value: value * 0.3) if "test" in new.parts[-3] else image).save(new)
    results, _ = look(
        ["data.name=folder", f"data.root={root}", *SMALL[:-2], "references=0", "projector=0"], tmp_path, capsys
    )
    assert results["distance"]["test"]["frechet"]["p"] < 0.001, results["distance"]
    (line,) = [problem["text"] for problem in results["problems"] if "look different" in problem["text"]]
    assert line.startswith("train and test look different")
    assert results["distance"]["test"]["frechet"]["p"] < 0.001
    assert "mutual" not in results["outliers"]["train"] and "neighbors" in results["outliers"]["train"]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(images, tmp_path):
    words = [
        "eval.py",
        "task=data",
        "data.name=folder",
        f"data.root={images}",
        *SMALL,
        f"runs={tmp_path}",
        "device=cpu",
        "data.workers=0",
    ]
    one, two = (script([*words, f"run_name={n}"], processes=n) for n in (1, 2))
    for split, numbers in one["outliers"].items():
        for score in ("neighbors", "mutual"):
            found = [{line["image"]: line["score"] for line in run["outliers"][split][score]} for run in (one, two)]
            assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-3) and numbers["measured"] > 0
    for name, part in one["distance"]["test"]["frechet"].items():
        assert two["distance"]["test"]["frechet"][name] == pytest.approx(part, rel=1e-3)
    assert two["distance"]["test"]["classifier"] == pytest.approx(one["distance"]["test"]["classifier"], rel=1e-3)
    tables = [(tmp_path / f"{n}/eval_data/00000/images/metadata.tsv").read_text() for n in (1, 2)]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_the_checkpoint_of_a_run_has_the_backbone_and_the_data(tmp_path, capsys):
    root = write_classes(tmp_path / "images")
    small = [
        "data.name=folder",
        f"data.root={root}",
        "data.size=32",
        f"runs={tmp_path}/runs",
        "run_name=run",
        "epochs=1",
        "batch_size=8",
    ]
    train_ssl.main(["configs/demo/simclr_demo.yaml", *small, "augment.size=24", "device=cpu"])
    capsys.readouterr()
    results, _ = look([f"checkpoint={tmp_path}/runs/run", "references=0"], tmp_path, capsys)
    assert "last.pt" in results["distance"]["backbone"] and results["images"] == {"train": 36, "test": 12}


def test_without_a_backbone_the_report_says_what_to_add(images, tmp_path, capsys):
    results, folder = look(["data.name=folder", f"data.root={images}"], tmp_path, capsys)
    assert results["distance"] == {} and "outliers" not in results and not (folder / "00000").exists()
    assert "Add checkpoint=" in (folder / "report.md").read_text()
    with pytest.raises(UserError, match="backbone"):
        evaluate.main(
            ["task=data", "data.name=folder", f"data.root={images}", "backbone.weights=x.pth", f"runs={tmp_path}"]
        )


@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS.exists() and NEU.exists()), reason="no SCAVENGE_WEIGHTS, or no SCAVENGE_DATA")
def test_tiles_among_steel_are_found(tmp_path, capsys):
    tiles = sorted((NEU.parent / "magnetic_tile/train/good").iterdir())[::100][:3]
    for path in sorted(NEU.glob("*/*_[1-3][0-9].jpg")):  # 30 of a class, whose quartiles three do not move far
        new = tmp_path / "images" / path.parent.name / path.name
        new.parent.mkdir(parents=True, exist_ok=True)
        new.symlink_to(path)
    for path in tiles:
        (tmp_path / "images/crazing" / f"tile_{path.name}").symlink_to(path)
    words = ["data.name=folder", f"data.root={tmp_path}/images", "data.test_fraction=0", "backbone.name=mobilenet_v2"]
    results, _ = look([*words, f"backbone.weights={WEIGHTS}", "data.size=224", "references=30"], tmp_path, capsys)
    for score, most in (("neighbors", 3), ("mutual", 10)):  # of 183; the latter is made for one kind of object
        first = [line["image"] for line in results["outliers"]["train"][score][:most]]
        assert sum("tile_" in name for name in first) == 3, json.dumps(first)
