"""The line that says how many images of a data set are learned from, for each layout."""

import numpy as np
import pytest
from PIL import Image

from data import DataConfig, build_dataset, what_is_used
from runtime import config

DIVIDED = {"train/a": 6, "train/b": 4, "test/a": 1, "test/b": 1}
MVTEC = {"part/train/good": 7, "part/test/good": 1, "part/test/dent": 1}


@pytest.mark.parametrize(
    ("folders", "data", "others", "expected"),
    [
        ({".": 5}, {"name": "folder"}, {}, "all 5 images are learned from"),
        (
            {"a": 10, "b": 5},
            {"name": "folder"},
            {"held out (holdout=0.1)": 2, "not in overfit": 0},
            "10 of 15 images are learned from, 3 kept for testing (data.test_fraction=0.2), 2 held out (holdout=0.1)",
        ),
        (
            {".": 5},
            {"name": "folder", "test_fraction": 0.4},
            {},
            "3 of 5 images are learned from, 2 kept for testing (data.test_fraction=0.4)",
        ),
        (DIVIDED, {"name": "folder"}, {}, "all 10 images are learned from"),
        (
            DIVIDED,
            {"name": "one_against_all", "normal": "b"},
            {},
            "4 of 10 images are learned from, 6 of other classes",
        ),
        (
            DIVIDED,
            {"name": "cifar10", "per_class": 3},
            {},
            "6 of 10 images are learned from, 4 beyond data.per_class=3",
        ),
        (MVTEC, {"name": "mvtec", "category": "part"}, {}, "all 7 images are learned from"),
        (
            MVTEC,
            {"name": "few_shot", "category": "part", "shots": 2},
            {},
            "2 of 7 images are learned from, 5 beyond data.shots=2",
        ),
    ],
)
def test_every_image_is_counted(tmp_path, folders, data, others, expected):
    for folder, count in folders.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    dataset = build_dataset(config.build(DataConfig, {"root": str(tmp_path), "size": 8, **data}), "train")
    learned = len(dataset) - sum(others.values())
    assert what_is_used(dataset, learned, others) == f"data: {expected}"


def test_broken_images_are_counted(tmp_path):
    for i in range(4):
        Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"")
    section = {"name": "folder", "root": str(tmp_path), "size": 8, "on_error": "skip"}
    dataset = build_dataset(config.build(DataConfig, section), "train")
    assert what_is_used(dataset, 4, {}) == "data: 4 of 5 images are learned from, 1 not readable"


@pytest.mark.parametrize(
    ("folders", "data", "lines"),
    [
        ({".": 5}, {"name": "folder"}, ["train of ROOT: 5 images (5 unlabelled)"]),
        (DIVIDED, {"name": "folder"}, ["train of ROOT: 10 images (6 a, 4 b)", "test of ROOT: 2 images (1 a, 1 b)"]),
        (
            DIVIDED,
            {"name": "one_against_all", "normal": "b"},
            ["train of ROOT: 4 images (4 good)", "test of ROOT: 2 images (1 good, 1 a)"],
        ),
        (
            MVTEC | {"part/ground_truth/dent": 1},
            {"name": "mvtec", "category": "part"},
            ["train of ROOT: 7 images (7 good)", "test of ROOT: 2 images (1 good, 1 dent), 1 masks"],
        ),
        ({f"{i:02}": 1 for i in range(23)}, {"name": "folder", "test_fraction": 0}, None),
    ],
)
def test_what_was_matched_is_said_once(tmp_path, capsys, folders, data, lines):
    for folder, count in folders.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    if lines is None:
        each = ", ".join(f"1 {i:02}" for i in range(20))
        lines = [f"train of ROOT: 23 images ({each}, and 3 more)"]
    for _ in range(2):
        for line in lines:
            build_dataset(config.build(DataConfig, {"root": str(tmp_path), "size": 8, **data}), line.split()[0])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert said == [f"data: {line.replace('ROOT', str(tmp_path))}" for line in lines]
