"""Copies within and across splits, each found with its nearest, and said to be what they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import DATASETS
from evaluation.dataset.copies import copies, find
from evaluation.dataset.inspection import inspect
from tests.data.test_duplicates import surface


@pytest.fixture
def tree(tmp_path):
    """Six originals in train, four others in test; the folder."""
    for split, numbers in (("train", range(6)), ("test", range(10, 14))):
        for i in numbers:
            folder = tmp_path / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            surface(i).save(folder / f"{i:02}.png")
    return tmp_path


def looked_at(root):
    sets = {split: DATASETS["folder"](split, 16, root=str(root)) for split in ("train", "test")}
    return {split: inspect(dataset, torch.device("cpu")) for split, dataset in sets.items()}


def test_without_copies_nothing_is_said(tree):
    section, rows = copies(looked_at(tree))
    assert section.problems == [] and rows == []
    assert section.numbers["across"] == {"test in train": NONE}
    assert section.numbers["within"] == {"train in train": NONE, "test in test": NONE}


NONE = {"images": 0, "exact": 0, "near": 0, "other_class": 0, "pairs": []}
TURNS = {
    None: "upright",
    Image.Transpose.FLIP_LEFT_RIGHT: "flipped left to right",
    Image.Transpose.FLIP_TOP_BOTTOM: "flipped top to bottom",
    Image.Transpose.ROTATE_90: "rotated by 90°",
    Image.Transpose.ROTATE_180: "rotated by 180°",
    Image.Transpose.ROTATE_270: "rotated by 270°",
}


@pytest.mark.parametrize("turn", TURNS)
def test_how_a_copy_was_turned(turn, tree):
    """The image in test is what becomes that of train by this turn."""
    copy = surface(2) if turn is None else surface(2).transpose(turn)
    copy.resize((copy.width * 2, copy.height * 2), Image.Resampling.BICUBIC).save(tree / "train/class0/02.png")
    surface(2).save(tree / "test/class0/99.png")
    (pair,) = find(looked_at(tree)["test"], looked_at(tree)["train"])
    assert (pair.how, pair.exact) == (TURNS[turn], False) and pair.distance < 1.7


def test_one_image_in_two_splits_and_two_classes(tree):
    surface(3).save(tree / "test/class0/99.tiff")  # 3 is of class1; the same pixels in another format
    section, rows = copies(looked_at(tree))
    first, second = section.problems
    assert first.weight == second.weight == "error"
    assert first.text.startswith("1 image of test is also in train (1 exact, 0 near copies")
    assert "two classes" in second.text
    (row,) = rows
    assert (row["image"], row["other_image"]) == ("test/class0/99.tiff", "train/class1/03.png")
    assert (row["how"], row["distance"], row["other_class"]) == ("same pixels", 0.0, "class1")


def test_a_copy_in_the_own_split_does_not_hide_one_in_the_other(tree):
    for name in ("97.png", "98.png"):
        surface(1).save(tree / "test/class1" / name)
    surface(1).transpose(Image.Transpose.ROTATE_90).resize((50, 80)).save(tree / "train/class1/01.png")
    section, _ = copies(looked_at(tree))
    across, within = section.numbers["across"]["test in train"], section.numbers["within"]["test in test"]
    assert (across["images"], across["exact"], across["near"]) == (2, 0, 2)
    assert (within["images"], within["exact"], within["near"]) == (2, 1, 0)  # one pair, listed once


def test_many_equal_images(tmp_path):
    for i in range(5):
        path = tmp_path / f"train/a/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 0).save(path)
    surface(0).save(tmp_path / "train/a/5.png")
    split = inspect(DATASETS["folder"]("train", 8, root=str(tmp_path)), torch.device("cpu"))
    pairs = find(split)
    assert {i for pair in pairs for i in (pair.image, pair.other)} == set(range(5))
    assert len(pairs) < 5 and all(pair.exact for pair in pairs)


def test_nothing_to_compare(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    surface(0).save(tmp_path / "train/a/0.png")
    (tmp_path / "test/a/0.png").write_bytes(b"no image")
    splits = looked_at(tmp_path)
    assert find(splits["train"]) == find(splits["test"]) == find(splits["test"], splits["train"]) == []
    assert np.array_equal(splits["train"].readable, [0])
