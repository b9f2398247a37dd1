"""12-bit and thermal images, from training to predict.py and an update; runs that crop or keep the native size."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import predict
import train_anomaly
from tests.images import write_mvtec

TINY = ["configs/demo/patchcore_demo.yaml", "data.category=part", "batch_size=8", "device=cpu"]
TINY += ["backbone=mobilenet_v2", "backbone.width=0.25"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The same images as 8 and as 12 bits; the brightest training pixel is white."""
    place = tmp_path_factory.mktemp("deep")
    for name in ("shallow", "deep"):
        root = write_mvtec(place / name)
        for path in sorted(root.glob("part/t*/*/*.png")):
            with Image.open(path) as image:
                grey = np.array(image)
            if path.match("train/good/000.png"):
                grey[:8, :8] = 255
            grey = grey if name == "shallow" else np.rint(grey * (4095 / 255)).astype(np.uint16)
            Image.fromarray(grey).save(path)
    return place


def run(root, runs, name, *more, size=32):
    train_anomaly.main([*TINY, f"data.size={size}", f"data.root={root}", f"runs={runs}", f"run_name={name}", *more])
    with open(runs / name / "test_scores.csv") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    return scores, yaml.safe_load((runs / name / "config.yaml").read_text())["data"]


@pytest.mark.slow
def test_12_bits_are_worth_what_8_are(roots, tmp_path, capsys):
    expected, _ = run(roots / "shallow", tmp_path, "shallow")
    assert "nearly black" not in capsys.readouterr().err
    dark, _ = run(roots / "deep", tmp_path, "dark")
    assert "set data.white=4095" in capsys.readouterr().err and dark != expected
    scores, data = run(roots / "deep", tmp_path, "auto", "data.white=auto")
    assert scores == expected and data["white"] == 4095
    run(roots / "deep", tmp_path, "auto", "data.white=auto")  # goes on: the same number is found
    assert "done before" in capsys.readouterr().err

    for tile in ([], ["tile=32", "overlap=0", "threshold=1"]):
        tables = []
        for name in ("shallow", "auto"):
            out = tmp_path / f"{name}{len(tile)}"
            kind = "shallow" if name == "shallow" else "deep"
            predict.main([str(tmp_path / name), str(roots / kind / "part" / "test"), f"out={out}", "device=cpu", *tile])
            tables.append((out / "predictions.csv").read_text())
            with Image.open(next(iter(sorted(out.rglob("*.png"))))) as drawn:
                tables.append(np.array(drawn))
        assert tables[0] == tables[2] and np.array_equal(tables[1], tables[3])


@pytest.mark.slow
def test_an_update_keeps_the_white_of_its_run(roots, tmp_path):
    _, data = run(roots / "deep", tmp_path, "old", "data.white=auto")
    brighter = roots / "deep" / "part" / "train" / "good" / "bright.png"
    Image.fromarray(np.full((48, 48), 5000, dtype=np.uint16)).save(brighter)
    try:
        _, new = run(roots / "deep", tmp_path, "new", "data.white=auto", f"update={tmp_path / 'old' / 'last.pt'}")
        _, anew = run(roots / "deep", tmp_path, "anew", "data.white=auto")
    finally:
        brighter.unlink()
    assert data["white"] == new["white"] == 4095 and anew["white"] == 5000


def test_a_crop_says_what_it_hides(roots, tmp_path, capsys):
    run(roots / "shallow", tmp_path, "crop", "data.fit=crop", "data.resize=64")
    captured = capsys.readouterr()
    results = json.loads(captured.out.splitlines()[-1])
    assert "data.fit=crop shows 25% of an image (median); of 4 defective test images" in captured.err
    assert results["crop_share_seen"] == 0.25 and results["n_defects_cut"] + results["n_defects_hidden"] > 0
    assert "image_auroc_seen" in results and "pixel_auroc_seen" in results


def test_native_size_and_filter_are_stored(roots, tmp_path, capsys):
    _, data = run(roots / "shallow", tmp_path, "native", "data.resample=lanczos", size="native")
    assert data["size"] == [48, 48] and data["resample"] == "lanczos"
    state = torch.load(tmp_path / "native" / "last.pt", weights_only=True)
    assert predict.load_run(tmp_path / "native")[1].resample == state["config"]["data"]["resample"] == "lanczos"
    assert "crop_share_seen" not in json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_degrees_are_found_and_kept_with_the_run(roots, tmp_path):
    """A thermal set whose parts lie between 10 and 50 of -80 to 2000 degrees; predict.py shows them the same."""
    for path in sorted((roots / "shallow").glob("part/t*/*/*.png")):
        with Image.open(path) as image:
            warm = 10 + np.array(image) / 255 * 40
        to = tmp_path / "warm" / path.relative_to(roots / "shallow")
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint((warm + 80) / 2080 * 65535).astype(np.uint16)).save(to)
    expected, _ = run(roots / "shallow", tmp_path, "shallow")
    scores, data = run(tmp_path / "warm", tmp_path, "fixed", "data.units=-80,2000", "data.black=10", "data.white=50")
    assert scores == pytest.approx(expected, rel=0.02) and (data["black"], data["white"]) == (10, 50)
    auto = ["data.units=-80,2000", "data.black=auto", "data.white=auto", "data.gray=true"]
    scores, data = run(tmp_path / "warm", tmp_path, "auto", *auto)
    train = np.stack([np.array(Image.open(path)) for path in (tmp_path / "warm").glob("part/train/*/*.png")])
    coldest, warmest = (value / 65535 * 2080 - 80 for value in (int(train.min()), int(train.max())))
    assert (data["black"], data["white"]) == pytest.approx((coldest, warmest)) and len({*scores}) > 1
    predict.main([str(tmp_path / "auto"), str(tmp_path / "warm" / "part" / "test"), f"out={tmp_path / 'out'}"])
    with open(tmp_path / "out" / "predictions.csv") as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == pytest.approx(scores, rel=1e-5)
