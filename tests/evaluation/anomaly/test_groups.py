"""A group's metrics against a test of its images alone, and against scikit-learn; thresholds per category."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from data.datasets.categories import open_set
from data.datasets.mvtec import MVTec
from data.datasets.mvtec_ad2 import MVTecAD2
from data.datasets.mvtec_loco import MVTecLOCO
from data.loading import Loader
from evaluation.anomaly.calibration import calibrate
from evaluation.anomaly.groups import all_results, examined, group_table, measure
from evaluation.anomaly.metrics import segmentation_f1
from evaluation.anomaly.thresholds import three_sigma
from models.anomaly.detector import Findings
from runtime.errors import UserError
from tests.data.datasets.layouts import write_ad2, write_loco
from tests.images import write_mvtec

SIZE = 16


def findings(dataset, seed=0):
    rng = np.random.default_rng(seed)
    maps = torch.from_numpy(rng.normal(size=(len(dataset), SIZE, SIZE)).round(1).astype(np.float32))  # with ties
    if dataset.split == "test":
        maps += torch.stack([dataset.mask(i) for i in range(len(dataset))]).float()
    return Findings(maps.amax((1, 2)), maps)


def sets(kind, root, split, names, **options):
    every = open_set(kind, split, SIZE, {"root": str(root), "category": "all", **options})
    return every, {name: kind(split, SIZE, root=str(root), category=name, **options) for name in names}


def of(found, rows):
    return Findings(*(None if value is None else value[rows] for value in found))


def calibrated(kind, root, split, names):
    every, each = sets(kind, root, split, names)
    found = findings(every, seed=1)
    found.scores[: len(each[names[0]])] += 2  # categories differ
    found.scores[-1] = 99  # and an image is suspicious
    return found, calibrate(found, Loader(every, 4, "cpu"), 0.1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("evaluation.anomaly.bootstrap.REPLICATES", 20)


@pytest.fixture(params=["mvtec", "loco"])
def tree(request, tmp_path):
    if request.param == "loco":
        for name in ("box", "jug"):
            write_loco(tmp_path / name, size=24)
        return MVTecLOCO, tmp_path, ["box", "jug"]
    for name, size in (("part", 30), ("tile", 33)):
        write_mvtec(tmp_path, category=name, size=size)
    return MVTec, tmp_path, ["part", "tile"]


def test_a_category_is_as_a_test_of_it_alone(tree):
    kind, root, names = tree
    original = kind is MVTecLOCO
    _, calibration = calibrated(kind, root, "train", names)
    every, each = sets(kind, root, "test", names)
    found = findings(every)
    whole = all_results(examined(found, every, original=original), calibration, seed=3).results
    first, n_defects = 0, 0
    for name in names:
        rows = torch.arange(first, first := first + len(each[name]))
        alone = measure(examined(of(found, rows), each[name], original=original), calibration, seed=3).results
        for defect, row in alone.pop("per_defect").items():
            assert whole["per_defect"][f"{name}/{defect}"] == row
            n_defects += 1
        own = whole["per_category"][name]
        assert {key: value for key, value in own.items() if not key.startswith("category_")} == alone
        limit = calibration["per_category"][name]["threshold"]
        assert own["category_threshold"] == limit
        good = found.scores[rows][each[name].labels == 0]
        assert own["category_observed_false_alarms"] == pytest.approx(float((good > limit).float().mean()))
    assert len(whole["per_defect"]) == n_defects and first == len(every)
    assert whole["image_auroc"] == pytest.approx(roc_auc_score(every.labels, found.scores))
    assert whole["n_test_normal"] == sum(row["n_test_normal"] for row in whole["per_category"].values())
    keys = ["image_auroc", "image_ap", "pixel_auroc", "aupro", "segmentation_f1_3sigma"]
    for key in [*keys, "spro_005"] if kind is MVTecLOCO else keys:
        assert whole[f"{key}_category_mean"] == pytest.approx(
            np.mean([row[key] for row in whole["per_category"].values()])
        )


def test_thresholds_of_a_category_are_those_of_its_normals_alone(tree):
    kind, root, names = tree
    found, calibration = calibrated(kind, root, "train", names)
    _, each = sets(kind, root, "train", names)
    first, suspects = 0, []
    for name in names:
        rows = torch.arange(first, first := first + len(each[name]))
        alone = calibrate(of(found, rows), Loader(each[name], 4, "cpu"), 0.1)
        assert alone.pop("per_category") == {} and calibration["per_category"][name] == alone
        suspects += alone["suspicious"]
    assert calibration["n_normals"] == first
    assert calibration["suspicious"] == suspects == [{"path": each[names[1]].paths[-1], "score": 99.0}]
    own = [calibration["per_category"][name]["threshold"] for name in names]
    assert own[0] < own[1] == 99  # the largest score of so few
    assert calibrate(None, Loader(each[names[0]], 4, "cpu"), 0.1)["per_category"] == {}


def test_lightings(tmp_path):
    write_ad2(tmp_path / "can", size=24)
    write_ad2(tmp_path / "vial", size=24)
    _, calibration = calibrated(MVTecAD2, tmp_path, "validation", ["can", "vial"])
    every, _ = sets(MVTecAD2, tmp_path, "test", [])
    found = findings(every)
    results = all_results(examined(found, every, original=False), calibration, seed=0).results
    lightings = np.array(every.groups["lighting"])
    assert list(results["per_lighting"]) == ["overexposed", "regular", "shift_1", "underexposed"]
    for name, row in results["per_lighting"].items():
        chosen = np.flatnonzero(lightings == name)
        labels, scores = every.labels[chosen], found.scores[chosen]
        assert (row["n_test_normal"], row["n_test_anomalous"]) == (int((labels == 0).sum()), int((labels == 1).sum()))
        assert row["threshold"] == calibration["threshold"] and "category_threshold" not in row
        masks = np.stack([every.mask(i).numpy() for i in chosen])
        above = found.maps[chosen].numpy() > calibration["pixel_threshold_3sigma"]
        if masks.any():
            assert row["segmentation_f1_3sigma"] == pytest.approx(f1_score(masks.ravel(), above.ravel()))
            assert row["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), found.maps[chosen].ravel()))
        else:
            assert row["segmentation_f1_3sigma"] is None and row["pixel_auroc"] is None
        if name == "regular":
            assert row["image_ap"] == pytest.approx(average_precision_score(labels, scores))
        else:  # good images alone, or defective ones
            assert row["image_auroc"] is None
    assert "image_auroc_lighting_mean" not in results and "image_auroc_category_mean" in results
    lines = group_table(results, "lighting").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*results["per_lighting"], "mean", "all together"]
    assert "own threshold" not in lines[0] and "own threshold" in group_table(results, "category").splitlines()[0]


def test_a_category_without_masks_has_image_metrics_alone(tmp_path):
    for name in ("part", "tile"):
        write_mvtec(tmp_path, category=name, size=40)
    for path in sorted((tmp_path / "tile/ground_truth").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "tile/ground_truth").rmdir()
    _, calibration = calibrated(MVTec, tmp_path, "train", ["part", "tile"])
    every, _ = sets(MVTec, tmp_path, "test", [])
    results = all_results(examined(findings(every), every, original=False), calibration, seed=0).results
    rows = results["per_category"]
    assert rows["tile"]["pixel_auroc"] is None and rows["tile"]["segmentation_f1"] is None
    assert rows["tile"]["image_auroc"] is not None and rows["part"]["pixel_auroc"] is not None
    assert "pixel_auroc_category_mean" not in results and "image_auroc_category_mean" in results


def test_without_maps_or_thresholds(tmp_path):
    write_mvtec(tmp_path, category="part", size=40)
    write_mvtec(tmp_path, category="tile", size=40)
    every, _ = sets(MVTec, tmp_path, "test", [])
    none = calibrate(None, Loader(every, 4, "cpu"), 0.1)
    for found in (findings(every), findings(every)._replace(maps=None)):
        results = all_results(examined(found, every, original=False), none, seed=0).results
        assert results["threshold"] is None and results["pixel_threshold_3sigma"] is None
        assert results.get("segmentation_f1") is None and "category_threshold" not in results["per_category"]["part"]
        assert "-" in group_table(results, "category")


@pytest.mark.parametrize("seed", range(3))
def test_segmentation_f1(seed):
    rng = np.random.default_rng(seed)
    maps = [rng.normal(size=shape).round(1).astype(np.float32) for shape in ((5, 7), (4, 4), (0, 7))]
    masks = [rng.random(m.shape) < 0.3 for m in maps]
    masks[1][:] = False
    truth, scores = (np.concatenate([x.ravel() for x in values]) for values in (masks, maps))
    for threshold in (-9, 0.1, float(scores.max()), np.inf):  # strictly above
        assert segmentation_f1(maps, masks, threshold) == pytest.approx(f1_score(truth, scores > threshold))
    assert segmentation_f1(maps[1:], masks[1:], 0) is None
    with pytest.raises(UserError, match="not a number"):
        segmentation_f1([np.full((2, 2), np.nan)], [np.ones((2, 2), bool)], 0)


def test_three_sigma():
    rng = np.random.default_rng(0)
    maps = [1e3 + rng.normal(size=shape).astype(np.float32) for shape in ((5, 7), (4, 4))]
    pixels = np.concatenate([m.ravel() for m in maps]).astype(np.float64)
    assert three_sigma(maps) == pytest.approx(pixels.mean() + 3 * pixels.std(), rel=1e-12)
    assert three_sigma([np.full((2, 2), 0.5)]) == 0.5
