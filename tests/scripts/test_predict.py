"""predict.py with each detector: every row and heat map by hand, tiles, broken images and run folders, full disks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from data import DataConfig, build_geometry
from data.image_files import find_images
from data.images import decode
from data.normalize import normalize
from evaluation.anomaly.prediction import decode_whole
from evaluation.anomaly.tiling import examine_tiles
from models.anomaly import DETECTORS, DetectorConfig
from models.anomaly.detector import Batch
from models.backbones.build import BackboneConfig, build_backbone
from plots.heatmaps import outline_above, overlay
from plots.style import PEAK
from runtime import checkpoint, config
from runtime.errors import UserError
from tests.images import TOP, write_mvtec
from tests.slow import leaving

OPTIONS = {"patchcore": {"coreset": 0.2}, "padim": {"stages": [1], "channels": 8}}
CALIBRATION = {"threshold": None, "pixel_threshold": None, "low": None, "high": None, "false_alarm_rate": 0.1}


def write_run(folder: Path, normals: list[str], name: str, *, scale=True, backbone="resnet18", **data) -> Path:
    """A finished run of a detector as train_anomaly.py leaves it, with thresholds in the middle of the normals'."""
    torch.manual_seed(0)
    section = {"name": "mvtec", "root": "gone", "category": "part", "size": 64, **data}
    parts = {
        "data": config.build(DataConfig, section),
        "backbone": config.build(BackboneConfig, {"name": backbone, "weights": None}),
        "detector": config.build(DetectorConfig, {"name": name, **OPTIONS.get(name, {})}),
    }
    resolved = {key: config.as_dict(part) for key, part in parts.items()} | {"precision": "fp32"}
    resolved["backbone"]["weights"] = "/gone/weights.pth"  # was there when the run was fitted, and is not needed now
    detector = DETECTORS[name](build_backbone(parts["backbone"])[0], **parts["detector"].options)
    geometry = build_geometry(parts["data"])
    images = normalize(torch.stack([decode(path, geometry) for path in normals]))
    if detector.fits:
        detector.fit([Batch(images, None, torch.arange(len(images)))], len(images))
    found, values = detector.examine(images), dict(CALIBRATION)
    if scale:
        values["threshold"] = float(found.scores.median())
    if scale and found.maps is not None:
        low, middle, high = (float(found.maps.quantile(q)) for q in (0.2, 0.7, 0.99))
        values |= {"low": low, "high": high, "pixel_threshold": middle}
    folder.mkdir(parents=True)
    names = [f"part/train/good/{i:03d}.png" for i in range(len(images))]
    checkpoint.save(folder / "last.pt", {"model": detector}, step=1, config=resolved, names=names, calibration=values)
    return folder


def fitted(folder: Path):
    detector, geometry, state = predict.load_run(folder)
    return detector.eval(), geometry, state


@pytest.fixture(scope="module")
def normals(tmp_path_factory):
    return find_images(write_mvtec(tmp_path_factory.mktemp("normals")) / "part" / "train")


@pytest.fixture(scope="module")
def patchcore(normals, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", normals, "patchcore")


@pytest.fixture(scope="module")
def raw_images(tmp_path_factory):
    """Color, grey, 16 bit, transparent, turned by EXIF; wide, tall; two of one stem; a broken one in the middle."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(5)

    def noise(*shape, top=255, kind=np.uint8):
        return Image.fromarray(rng.integers(0, top, shape).astype(kind))

    (folder / "deep" / "er").mkdir(parents=True)
    noise(50, 120, 3).save(folder / "a.jpg")
    noise(48, 48).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:300])
    noise(90, 40, top=65535, kind=np.uint16).save(folder / "deep" / "16bit.png")
    noise(31, 33, 4).save(folder / "deep" / "er" / "transparent.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(40, 100, 3).save(folder / "turned.jpg", exif=turned)
    noise(3, 200, 3).save(folder / "wide, and with a comma.png")
    (folder / "no image.txt").write_text("not asked")
    return folder


def run(capsys, *words) -> tuple[dict, list[dict], str]:
    """The JSON, the rows, and stderr."""
    predict.main([str(word) for word in words] + ["device=cpu"])
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    with open(Path(results["out"]) / "predictions.csv", newline="") as file:
        return results, list(csv.DictReader(file)), err


def peak_is(row: dict, point: torch.Tensor, heat: torch.Tensor) -> bool:
    """Near the border maps have plateaus, on which rounding alone chooses."""
    named = int(row["y"]), int(row["x"])
    expected = tuple(min(max(int(at), 0), size - 1) for at, size in zip(point, heat.shape))
    return named == expected or heat[named].item() == pytest.approx(heat[expected].item(), rel=1e-5)


def differs_from(drawn: Path, whole: torch.Tensor, heat: torch.Tensor, values: dict, row: dict) -> float:
    """Share of the values at the original's place, but for the cross on the peak, that are not the overlay's."""
    expected = outline_above(overlay(whole, heat, values["low"], values["high"]), heat, values["pixel_threshold"])
    got, expected = np.asarray(Image.open(drawn)).copy(), expected.permute(1, 2, 0).numpy()
    height, width = heat.shape
    assert got.shape[0] > height and got.shape[1] >= width  # the caption
    y, x, reach = int(row["y"]), int(row["x"]), max(12, min(height, width) // 20) // 2 + 2
    assert (got[y, x] == PEAK).all()
    beside = np.ones((height, width), dtype=bool)
    beside[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = False
    return float((got[:height, :width] != expected)[beside].mean())


CROP, PAD = {"size": 64, "fit": "crop", "resize": 72}, {"size": "64,96", "fit": "pad"}
SHAPES = [(data, n) for data in ({}, CROP, PAD) for n in DETECTORS if data != PAD or not DETECTORS[n].positional]
HEAVY = [(data, name) for data, name in SHAPES if name not in ("patchcore", "padim", "cutpaste")]
UNPOSITIONED = [name for name in DETECTORS if not DETECTORS[name].positional]


@pytest.mark.parametrize(("data", "name"), leaving(HEAVY, SHAPES))
def test_rows_and_heat_maps_are_what_the_detector_says(name, data, normals, raw_images, tmp_path, capsys):
    run_folder = write_run(tmp_path / "run", normals, name, **data)
    results, rows, err = run(capsys, run_folder, raw_images, f"out={tmp_path}/out", "batch_size=4")
    detector, geometry, state = fitted(run_folder)
    paths = [path for path in find_images(raw_images) if "broken" not in path]
    assert [row["path"] for row in rows] == [os.path.relpath(path, raw_images) for path in paths]
    assert list(rows[0]) == ["path", "score", "is_anomalous", "threshold", "nearest_training_image", "y", "x"]
    alarms, has_maps = 0, False
    for path, row in zip(paths, rows):
        whole = decode_whole(path)
        size = tuple(whole.shape[1:])
        valid = geometry.valid(geometry.regions(torch.tensor([size]))) if geometry.fit == "pad" else None
        found = detector.examine(normalize(decode(path, geometry)[None]), valid)
        assert float(row["score"]) == pytest.approx(float(found.scores), rel=1e-4)
        assert float(row["threshold"]) == state["calibration"]["threshold"]
        assert row["is_anomalous"] == str(int(float(row["score"]) > float(row["threshold"])))
        alarms += int(row["is_anomalous"])
        assert row["nearest_training_image"] == (
            "" if found.nearest_image is None else state["names"][found.nearest_image]
        )
        if found.peaks is None:
            assert row["y"] == row["x"] == ""
        else:
            point = geometry.to_original_point(found.peaks, torch.tensor([size]))[0]
            assert peak_is(row, point, geometry.to_original(found.maps[0], size))
        drawn = tmp_path / "out" / "heatmaps" / (row["path"] + ".png")
        assert drawn.exists() == (found.maps is not None)
        if found.maps is not None:
            has_maps = True
            heat, values = geometry.to_original(found.maps[0], size), state["calibration"]
            assert differs_from(drawn, whole, heat, values, row) < 0.002  # a batch has another order of computing
    assert has_maps or not (tmp_path / "out" / "heatmaps").exists()
    assert results == results | {"images": 6, "anomalous": alarms, "skipped": [str(raw_images / "broken.png")]}
    assert results["images_per_second"] == pytest.approx(6 / results["seconds"])
    complaint = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert len(complaint) == 1 and "broken.png" in complaint[0]
    assert not [path for path in (tmp_path / "out").rglob("*") if "unfinished" in path.name]


def test_a_bright_square_is_found_where_it_is_in_the_original(normals, tmp_path, capsys):
    run_folder = write_run(tmp_path / "run", normals, "patchcore", size="64,96", fit="pad")
    texture = np.random.default_rng(3).normal(120, 20, (192, 96)).clip(0, 255).astype(np.uint8)
    texture[140:164, 30:54] = 250
    Image.fromarray(texture).save(tmp_path / "tall.png")
    _, (row,), _ = run(capsys, run_folder, tmp_path / "tall.png", f"out={tmp_path}/out")
    assert row["path"] == "tall.png"
    assert abs(int(row["y"]) - 152) <= 24 and abs(int(row["x"]) - 42) <= 24  # a patch is 8 x 3 pixels wide
    assert Image.open(tmp_path / "out" / "heatmaps" / "tall.png.png").size[1] > 192


@pytest.mark.parametrize("name", leaving({*UNPOSITIONED} - {"patchcore"}, UNPOSITIONED))
def test_tiles(name, normals, raw_images, tmp_path, capsys):
    run_folder = write_run(tmp_path / "run", normals, name)
    words = ["tile=64", "overlap=32", "batch_size=3", "threshold=1.5"]
    results, rows, err = run(capsys, run_folder, raw_images, f"out={tmp_path}/out", *words)
    detector, *_, state = fitted(run_folder)
    assert results["images"] == 6 and "promise" not in err
    for row in rows:
        whole = decode_whole(str(raw_images / row["path"]))
        found = examine_tiles(detector, whole, tile=64, overlap=32, batch_size=3, device=torch.device("cpu"))
        assert float(row["score"]) == pytest.approx(float(found.scores), rel=1e-5) and row["threshold"] == "1.5"
        if found.maps is not None:
            heat = found.maps[0]
            drawn = tmp_path / "out" / "heatmaps" / (row["path"] + ".png")
            assert differs_from(drawn, whole, heat, state["calibration"], row) < 0.002
            assert peak_is(row, found.peaks[0], heat)


@pytest.mark.slow
def test_tiles_are_refused_where_they_make_no_sense(normals, patchcore, raw_images, tmp_path, capsys):
    with pytest.raises(UserError, match="tile=100 must be a multiple of 32"):
        run(capsys, patchcore, raw_images, f"out={tmp_path}/out", "tile=100")
    assert not (tmp_path / "out").exists()
    _, _, err = run(capsys, patchcore, raw_images / "a.png", f"out={tmp_path}/out", "tile=64", "overlap=0")
    assert "thresholds were measured on whole images" in err
    for name in [n for n in DETECTORS if DETECTORS[n].positional]:
        with pytest.raises(UserError, match="whole images only"):
            run(capsys, write_run(tmp_path / name, normals, name), raw_images, "tile=64", "overlap=0")


def test_a_run_without_thresholds_scores_only(normals, raw_images, tmp_path, capsys):
    run_folder = write_run(tmp_path / "run", normals, "patchcore", scale=False)
    results, rows, err = run(capsys, run_folder, raw_images, f"out={tmp_path}/out")
    assert results["anomalous"] is None and {(row["is_anomalous"], row["threshold"]) for row in rows} == {("", "")}
    assert "give threshold=" in err and not (tmp_path / "out" / "heatmaps").exists()
    middle = sorted(float(row["score"]) for row in rows)[3]  # a score at the threshold is normal
    results, rows, _ = run(capsys, run_folder, raw_images, f"out={tmp_path}/out", f"threshold={middle!r}")
    assert results["anomalous"] == 2 == sum(row["is_anomalous"] == "1" for row in rows)


def test_results_among_the_images_are_no_images_the_next_time(patchcore, normals, tmp_path, capsys):
    Image.open(normals[0]).save(tmp_path / "a.png")
    for _ in range(2):
        results, rows, _ = run(capsys, patchcore, tmp_path, f"out={tmp_path}")
        assert results["images"] == 1 and [row["path"] for row in rows] == ["a.png"]


def test_nothing_to_examine(patchcore, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"nonsense")
    for words, text in (
        ((patchcore, tmp_path / "empty"), "no images in"),
        ((patchcore, tmp_path / "nowhere"), "nowhere is not there"),
        ((patchcore, tmp_path / "bad"), "none of the 3 images"),
        ((patchcore,), "usage: python predict.py"),
        ((patchcore, tmp_path / "bad", "more"), "usage: python predict.py"),
        ((patchcore, tmp_path / "bad", "tiles=64"), "did you mean 'tile'"),
        ((patchcore, tmp_path / "bad", "batch_size=0"), "batch_size=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=text):
            run(capsys, *words, f"out={tmp_path}/out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "bad"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.slow
def test_run_folders_that_hold_no_finished_detector(patchcore, raw_images, tmp_path):
    good = checkpoint.load(patchcore / "last.pt")
    half = {key: value for key, value in good.items() if key != "calibration"}
    ssl = {"step": 5, "config": {"method": {"name": "simclr"}, "data": {}}, "model": {}}
    for name, state, text in (
        ("none", None, "has no last.pt"),
        ("half", half, "has not finished"),
        ("ssl", ssl, "without a detector"),
        ("list", [1, 2], "not a checkpoint of"),
        ("evil", good | {"names": Evil()}, "reading it could run code: refused"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if state is not None:
            torch.save(state, folder / "last.pt")
        with pytest.raises(UserError, match=text):
            predict.main([str(folder), str(raw_images), f"out={tmp_path}/out"])
    words = [sys.executable, str(TOP / "predict.py"), str(tmp_path / "evil"), str(raw_images), "out=out"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert (
        done.stderr.startswith("error: ") and not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
    )


def test_features_that_are_no_numbers(normals, raw_images, tmp_path, capsys):
    run_folder = write_run(tmp_path / "run", normals, "rd4ad")
    state = checkpoint.load(run_folder / "last.pt")
    state["model"]["backbone.conv1.weight"].fill_(float("nan"))
    torch.save(state, run_folder / "last.pt")
    with pytest.raises(UserError):
        run(capsys, run_folder, raw_images, f"out={tmp_path}/out")
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision(precision, patchcore, raw_images, tmp_path, capsys):
    exact = run(capsys, patchcore, raw_images, f"out={tmp_path}/a")[1]
    for one, other in zip(exact, run(capsys, patchcore, raw_images, f"out={tmp_path}/b", f"precision={precision}")[1]):
        assert float(other["score"]) == pytest.approx(float(one["score"]), rel=0.05)
        assert one["score"] != other["score"]
