"""What a crop hides, against plain loops over the pixels of the original masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from evaluation.anomaly.metrics import image_metrics, pixel_metrics
from evaluation.anomaly.unseen import crop_line, crop_results, hidden_shares, seen_share

SQUARES = {"centre": (18, 28), "rim": (0, 0), "edge": (4, 30), "blank": None}  # top left of a defect of 8 x 8
SIZE = (48, 64)


@pytest.fixture
def dataset(tmp_path):
    """48 x 64 pixels; of the crop of 24 of 32 the middle 36 x 36 are seen."""

    def save(place, array):
        (tmp_path / "part" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / "part" / place)

    for i, (name, at) in enumerate(SQUARES.items()):
        mask = np.zeros(SIZE, np.uint8)
        if at:
            mask[at[0] : at[0] + 8, at[1] : at[1] + 8] = 255
        save(f"test/dent/{i}_{name}.png", mask)
        save(f"ground_truth/dent/{i}_{name}_mask.png", mask)
    for i in range(3):
        save(f"test/good/{i}.png", np.zeros(SIZE, np.uint8))
    save("train/good/0.png", np.zeros((32, 32), np.uint8))
    return MVTec("test", Geometry(24, 24, "crop", 32), root=str(tmp_path), category="part")


def test_hidden_shares_by_a_plain_loop(dataset):
    top, left, height, width = dataset.geometry.window(SIZE)
    for i, share in enumerate(hidden_shares(dataset).tolist()):
        mask, outside = dataset.mask(i, original=True), 0
        for y, x in mask.nonzero().tolist():
            outside += not (top < y + 0.5 < top + height and left < x + 0.5 < left + width)
        assert share == pytest.approx(outside / max(1, int(mask.sum())))
    by_name = dict(zip((Path(p).stem.split("_")[-1] for p in dataset.paths), hidden_shares(dataset).tolist()))
    assert by_name["centre"] == by_name["blank"] == by_name["0"] == 0 and by_name["rim"] == 1
    assert by_name["edge"] == 2 / 8  # rows 4 and 5 of 4 to 11


def test_share_of_an_image(dataset):
    assert seen_share(dataset) == pytest.approx((24 * 48 / 32) * (24 * 64 / 42) / (48 * 64))  # 64 becomes 42.67, 42
    dataset.sizes = torch.tensor([[32, 32], [64, 64], [32, 320]])
    assert seen_share(dataset) == pytest.approx((24 / 32) ** 2)


def test_metrics_with_and_without_the_hidden(dataset):
    scores = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.5, 0.3, 0.4])
    masks = [dataset.mask(i) for i in range(7)]
    maps = [m.float() * 0.5 + torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) for m in masks]
    results = crop_results(scores, maps, masks, dataset)
    kept = [i for i, path in enumerate(dataset.paths) if "rim" not in path and "edge" not in path]
    assert (results["n_defects_cut"], results["n_defects_hidden"], len(kept)) == (1, 1, 5)
    expected = image_metrics(scores[kept], dataset.labels[kept])
    expected |= pixel_metrics([maps[i] for i in kept], [masks[i] for i in kept])
    assert {f"{key}_seen": value for key, value in expected.items()} == {
        key: value for key, value in results.items() if key.endswith("_seen") and key != "crop_share_seen"
    }
    line = crop_line(results | {"n_test_anomalous": 4, "image_auroc": 0.5})
    assert line.startswith("data.fit=crop shows 43% of an image (median); of 4 defective")
    assert "1 have part of their mask outside, 1 all of it: image AUROC 0.500, without them 1.000" in line


def test_without_masks_and_with_nothing_hidden(dataset):
    scores = torch.arange(7.0)
    assert "pixel_auroc_seen" not in crop_results(scores, None, None, dataset)
    dataset.has_masks = False
    results = crop_results(scores, None, None, dataset)
    assert list(results) == ["crop_share_seen"] and "without masks it is unknown" in crop_line(results)
    dataset.has_masks, dataset.geometry = True, Geometry(32, 64, "crop", 64)
    dataset.mask_paths = [None] * 7
    results = crop_results(scores, None, None, dataset)
    assert results["n_defects_cut"] == results["n_defects_hidden"] == 0 and "image_auroc_seen" not in results
    line = crop_line(results | {"n_test_anomalous": 4})
    assert line.endswith("of 4 defective test images 0 have part of their mask outside, 0 all of it")
