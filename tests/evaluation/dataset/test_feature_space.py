"""The sections on features: which images they are about, what is reported, and what the projector gets."""

import csv
import math

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from data.datasets.folder import ClassFolder
from data.datasets.mvtec import MVTec
from evaluation.dataset.feature_space import Measured, distances, outliers, project, sections
from evaluation.dataset.inspection import inspect
from evaluation.dataset.section import Gallery, Table
from runtime.log import Log
from tests.images import write_classes, write_mvtec


def measured_of(split, features, neighbors=None, mutual=None):
    positions = torch.from_numpy(split.readable)
    neighbors = torch.zeros(len(positions), dtype=torch.float64) if neighbors is None else neighbors
    return Measured(positions, features, [split.kinds[i] for i in positions.tolist()], neighbors, mutual)


@pytest.fixture
def splits(tmp_path):
    root = write_classes(tmp_path / "images", classes=2, each=12, size=24)
    (root / "train/class0/003.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 80, 3), np.uint8)).save(root / "train/class0/zz\n\ttop.png")
    made = {name: ClassFolder(name, 16, root=str(root)) for name in ("train", "test")}
    return {name: inspect(dataset, torch.device("cpu")) for name, dataset in made.items()}


def random(n, width, seed, shift=0.0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def measure_all(splits, shift):
    sizes = {name: len(split.readable) for name, split in splits.items()}
    return {name: measured_of(splits[name], random(n, 3, n, shift * (name == "test"))) for name, n in sizes.items()}


def test_a_drift_is_said_aloud_and_nothing_else(splits):
    same = distances(splits, measure_all(splits, 0), "resnet18 (random weights)", seed=0)
    assert same.problems == [] and same.numbers["test"]["train"] == 24 and same.numbers["test"]["test"] == 8
    (line,) = distances(splits, measure_all(splits, 30.0), "resnet18", seed=0).problems
    assert line.weight == "warning" and line.text.startswith("train and test look different: Fréchet distance 2")
    assert "AUROC 1.000" in line.text and "\n" not in line.text
    (table,) = [part for part in same.parts if isinstance(part, Table)]
    assert [len(row) for row in table.rows] == [len(table.header)] and table.rows[0][:2] == [
        "train and test",
        "24 and 8",
    ]


def test_one_split_has_no_distance(splits):
    measured = measure_all(splits, 0)
    section = distances(splits, {"train": measured["train"]}, "resnet18", seed=0)
    assert section.parts[-1] == "There is only one split, train, so there is no distance."


def test_constant_features_are_said_aloud(splits):
    measured = {name: measured_of(split, torch.ones(len(split.readable), 3)) for name, split in splits.items()}
    section = distances(splits, measured, "resnet18", seed=0)
    assert len(section.problems) == 2 and section.numbers["test"]["frechet"]["distance"] == 0


def test_of_a_set_with_defects_only_good_images_are_compared(tmp_path):
    root = write_mvtec(tmp_path, normal=12)
    parts = {name: MVTec(name, 16, root=str(root), category="part") for name in ("train", "test")}
    splits = {name: inspect(dataset, torch.device("cpu")) for name, dataset in parts.items()}
    measured = {
        "train": measured_of(splits["train"], random(12, 2, 0)),
        "test": measured_of(splits["test"], random(8, 2, 1)),
    }
    defective = torch.tensor([kind != "good" for kind in measured["test"].kinds])
    measured["test"].features[defective] += 1000
    section = distances(splits, measured, "resnet18", seed=0)
    assert section.numbers["test"]["only_good"] and section.numbers["test"]["test"] == 4 == int((~defective).sum())
    assert section.numbers["test"]["frechet"]["distance"] < 100 and section.problems == []


def test_outliers_stand_worst_first_with_path_and_image(splits):
    measured = measure_all(splits, 0)
    train = measured["train"]
    odd = next(i for i, p in enumerate(train.positions.tolist()) if "top" in splits["train"].names[p])
    train.neighbors[odd], train.neighbors[2], train.neighbors[5] = 7.5, math.inf, math.nan
    train.mutual = torch.full_like(train.neighbors, math.nan)
    section = outliers(splits, measured)
    numbers = section.numbers["train"]
    assert numbers["neighbors_beyond"] == 2 and "mutual" not in numbers and numbers["measured"] == 24
    assert [line["score"] for line in numbers["neighbors"][:3]] == [math.inf, 7.5, 0]
    assert len(numbers["neighbors"]) == 23  # not the one without a score
    assert numbers["neighbors"][1] == {"image": "train/class0/zz\n\ttop.png", "class": "class0", "score": 7.5}
    gallery = next(part for part in section.parts if isinstance(part, Gallery))
    caption, pixels = gallery.tiles[1]
    assert caption == "train/class0/zz\n\ttop.png\n7.5" and pixels.shape == (3, 40, 160) and not pixels.any()
    assert [problem.text for problem in section.problems] == [
        f"train: 2 images are unlike the others by nearest neighbors, first {numbers['neighbors'][0]['image']}"
    ]


def test_the_projector_has_every_point_with_its_class_and_image(splits, tmp_path):
    log = Log(tmp_path / "run", {})
    for _ in range(2):  # again in the same folder
        project(log, splits, measure_all(splits, 0), images=1000, seed=0)
    log.flush()
    folder = tmp_path / "run/00000/images"
    config = text_format.Parse((tmp_path / "run/projector_config.pbtxt").read_text(), ProjectorConfig())
    assert list(config.embeddings[0].sprite.single_image_dim) == [48, 48]
    points = np.loadtxt(folder / "tensors.tsv")
    with open(folder / "metadata.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert points.shape == (32, 3) and len(rows) == 32
    measured = measure_all(splits, 0)
    features = torch.cat([measured["train"].features, measured["test"].features])
    np.testing.assert_allclose(  # principal components keep all distances, as there are no more than 50 of them
        np.linalg.norm(points[3] - points, axis=1), (features[3] - features).norm(dim=1).numpy(), rtol=1e-4, atol=1e-5
    )
    sprite = np.asarray(Image.open(folder / "sprite.png"))
    odd = next(i for i, row in enumerate(rows) if "top" in row["path"])
    assert rows[odd]["class"] == "class0" and rows[odd]["split"] == "train" and "\n" not in rows[odd]["path"]
    side = math.ceil(32**0.5)
    thumbnail = sprite[odd // side * 48 :, odd % side * 48 :][:48, :48]
    assert (thumbnail[:18] == 128).all() and (thumbnail[18:30] == 0).all()  # 12 x 48 pixels between gray bars


def test_the_projector_is_bounded_and_seeded(splits, tmp_path):
    texts = []
    for name in ("one", "two"):
        project(Log(tmp_path / name, {}), splits, measure_all(splits, 0), images=9, seed=4)
        texts.append((tmp_path / name / "00000/images/metadata.tsv").read_text())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 10
    project(Log(tmp_path / "none", {}), splits, measure_all(splits, 0), images=0, seed=4)
    assert not (tmp_path / "none/00000").exists()


def test_without_a_backbone_it_says_what_to_add(splits):
    (section,) = sections(splits, {}, "", seed=0)
    assert section.problems == [] and "backbone.name=" in section.parts[0] and "checkpoint=" in section.parts[0]
