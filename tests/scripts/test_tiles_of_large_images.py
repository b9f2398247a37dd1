"""Fitting, thresholds and prediction on tiles of large images: train_anomaly.py, predict.py and the API agree."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import predict
import scavenge
import train_anomaly
from evaluation.anomaly.prediction import decode_whole, load_run
from evaluation.anomaly.thresholds import normal_threshold
from evaluation.anomaly.tiling import examine_tiles
from runtime import config
from runtime.errors import UserError
from tests.processes import script


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Large images with a small spot, which 48 pixels can hardly show; of two sizes."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    for split, kind, count in (("train", "good", 14), ("test", "good", 5), ("test", "spot", 5)):
        for i in range(count):
            height, width = (160, 192) if i % 2 else (128, 224)
            y, x = np.mgrid[:height, :width]
            gray = 120 + 20 * np.sin(x / 5) + 15 * np.sin(y / 7) + rng.normal(0, 4, (height, width))
            mask = np.zeros((height, width), np.uint8)
            if kind == "spot":
                top, left = rng.integers(20, 90, 2)
                mask[top : top + 8, left : left + 8] = 255
                gray[mask > 0] += rng.choice([-90, 90], (64,))
            path = root / "part" / split / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(gray.clip(0, 255).astype(np.uint8)).save(path)
            if kind == "spot":
                to = root / "part" / "ground_truth" / kind / f"{i}_mask.png"
                to.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(to)
    return root


def words(images, runs, *more):
    tiny = ["configs/demo/patchcore_demo.yaml", "backbone=mobilenet_v2", "backbone.width=0.25", "device=cpu"]
    about = [f"data.root={images}", "data.category=part", "data.size=48", "data.tile=64", "data.overlap=32"]
    about = [*tiny, *about, "batch_size=6", "holdout=0.3", f"runs={runs}", "run_name=run"]
    return config.overlay(about, list(more))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    train_anomaly.main(words(images, runs))
    return runs / "run"


def test_scores_and_thresholds_are_those_of_tiles(run, images):
    detector, geometry, state = load_run(run)
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert (data["tile"], data["overlap"]) == (64, 32) and all("#" in name for name in state["names"])
    with open(run / "test_scores.csv") as file:
        rows = list(csv.DictReader(file))
    sizes = {"tile": 64, "overlap": 32, "batch_size": 6, "device": torch.device("cpu")}
    for row in rows:
        found = examine_tiles(detector, decode_whole(row["path"], geometry), **sizes)
        assert float(row["score"]) == pytest.approx(float(found.scores), rel=1e-5)
    results = json.loads((run / "results.json").read_text())
    used = {name.partition("#")[0] for name in state["names"]}
    kept = sorted({f"part/train/good/{i}.png" for i in range(14)} - used)
    assert results["n_normals"] == len(kept) == 4 and results["n_train"] == len(state["names"]) > 100
    found = [examine_tiles(detector, decode_whole(images / name, geometry), **sizes).scores for name in kept]
    assert results["threshold"] == pytest.approx(normal_threshold(torch.cat(found)), rel=1e-5)
    assert results["image_auroc"] == 1 and results["pixel_auroc"] > 0.9


def test_predict_and_the_api_take_the_run_s_tiles(run, images, tmp_path, capsys):
    with open(run / "test_scores.csv") as file:
        expected = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}
    folder = images / "part" / "test"
    predict.main([str(run), str(folder), f"out={tmp_path / 'out'}", "device=cpu"])
    assert "thresholds were measured" not in capsys.readouterr().err
    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert {str(folder / row["path"]): float(row["score"]) for row in rows} == pytest.approx(expected, rel=1e-5)
    assert all(int(row["is_anomalous"]) for row in rows if "spot" in row["path"])
    path = str(folder / "spot" / "0.png")
    (said,) = scavenge.load_detector(run)([path])
    assert said.score == pytest.approx(expected[path], rel=1e-5) and said.map.shape == (128, 224)
    (array,) = scavenge.load_detector(run)(np.asarray(Image.open(path).convert("RGB"))[None])
    assert array.score == pytest.approx(said.score, rel=1e-5)
    predict.main([str(run), path, f"out={tmp_path / 'whole'}", "device=cpu", "tile=0"])
    assert "thresholds were measured on tiles of 64, not at tile=0" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, images, tmp_path):
    script(["train_anomaly.py", *words(images, tmp_path)], processes=2)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "run"))
    for key in ("image_auroc", "pixel_auroc", "threshold", "pixel_threshold"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["holdout=0"], r"data\.tile takes thresholds from whole images .* set holdout=0\.1"),
        (["data.tile=160"], r"data\.tile=160: .*\.png has 128 x 224 pixels; lower data\.tile"),
        (["data.tile=50"], "tile=50 must be a multiple of 32"),
        (["data.fit=pad"], r"data\.fit is not squash"),
        (["configs/demo/padim_demo.yaml"], "whole images only"),
    ],
)
def test_what_cannot_be_tiled(more, message, images, tmp_path):
    about = words(images, tmp_path, *[word for word in more if "=" in word])
    if "=" not in more[0]:
        about[0] = more[0]
    with pytest.raises(UserError, match=message):
        train_anomaly.main(about)
    assert not list(tmp_path.iterdir())
