"""sPRO against a loop over all thresholds in float64, the cases of the paper by hand, and AU-PRO as a special case."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.anomaly.metrics import image_metrics, pixel_metrics
from evaluation.anomaly.spro import SPRO_LIMITS, spro, spro_line, spro_means, spro_rows
from tests.evaluation.anomaly.test_metrics import area, flood_fill, random_case


def by_thresholds(maps, regions):
    maps = [m.astype(np.float64) for m in maps]
    outside = []
    for m, own in zip(maps, regions):
        union = np.zeros(m.shape, bool)
        for mask, _ in own:
            union |= mask
        outside.append(m[~union])
    outside, rates, heights = np.concatenate(outside), [0.0], [0.0]
    flat = [(m, mask, saturation) for m, own in zip(maps, regions) for mask, saturation in own]
    for t in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        rates.append((outside >= t).mean())
        heights.append(np.mean([min((m[mask] >= t).sum() / saturation, 1) for m, mask, saturation in flat]))
    return {key: area(rates, heights, limit) for key, limit in SPRO_LIMITS.items()}


def case(seed, kind):
    """Two good images; regions that overlap, are a single pixel, and need one, some or all of their pixels."""
    rng = np.random.default_rng(seed)
    shapes = [(9, 11), (4, 5), (9, 11), (6, 6), (2, 30)]
    maps, regions = [], []
    for i, shape in enumerate(shapes):
        own = []
        for _ in range(0 if i < 2 else i - 1):
            mask = rng.random(shape) < 0.3
            mask.flat[rng.integers(mask.size)] = True
            own.append((mask, int(rng.integers(1, mask.sum() + 1))))
        if i == 4:
            single = np.zeros(shape, bool)
            single[1, 3] = True
            own.append((single, 1))
        union = np.any([mask for mask, _ in own], axis=0) if own else np.zeros(shape, bool)
        m = rng.normal(size=shape) + union
        maps.append((np.round(2 * m) if kind == "ties" else m > 1 if kind == "two values" else m).astype(np.float32))
        regions.append(own)
    return maps, regions


@pytest.mark.parametrize("kind", ["continuous", "ties", "two values"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_every_threshold_in_turn(seed, kind):
    maps, regions = case(seed, kind)
    assert spro(maps, regions) == pytest.approx(by_thresholds(maps, regions), abs=1e-12)
    tensors = [[(torch.from_numpy(mask), n) for mask, n in own] for own in regions]
    assert spro([torch.from_numpy(m) for m in maps], tensors) == pytest.approx(by_thresholds(maps, regions), abs=1e-12)


def of_one_region(pixels: int, saturation: int, area: int = 100) -> float:
    """Area up to a rate of 0.05 where so many pixels score 1 and the others of the region less than all outside."""
    scores, mask = np.zeros((20, 100), np.float32), np.zeros((20, 100), bool)
    mask[0, :area] = True
    scores[0, :pixels] = 1
    scores[~mask] = -1
    scores[mask & (scores == 0)] = -2
    return spro([scores], [[(mask, saturation)]])["spro_005"]


@pytest.mark.parametrize(
    ("pixels", "saturation", "area", "expected"),
    [(25, 50, 100, 0.5), (60, 50, 100, 1.0), (50, 50, 100, 1.0), (10, 20, 20, 0.5), (0, 1, 1, 0.0), (1, 1, 1, 1.0)],
)
def test_a_region_by_hand(pixels, saturation, area, expected):
    """Of 100 pixels, relative 0.5, 25 found are 0.5 and 60 are 1; of 20 pixels, absolute 30, all 20 are needed."""
    assert of_one_region(pixels, saturation, area) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_saturation_it_is_aupro(seed):
    """Each connected region in a mask of its own, all of whose pixels are needed."""
    maps, masks = random_case(seed, "integers")
    regions = []
    for mask in masks:
        own = []
        for pixels in flood_fill(mask):
            one = np.zeros_like(mask)
            one[tuple(zip(*pixels))] = True
            own.append((one, len(pixels)))
        regions.append(own)
    found, expected = spro(list(maps), regions), pixel_metrics(maps, masks)
    pairs = {"spro_001": "aupro_001", "spro_005": "aupro_005", "spro_030": "aupro"}
    assert [found[key] for key in pairs] == pytest.approx([expected[key] for key in pairs.values()], abs=1e-12)


def test_nothing_to_find_or_nothing_else():
    nothing = dict.fromkeys(SPRO_LIMITS)
    assert spro([np.ones((2, 2))], [[]]) == nothing and spro([], []) == nothing
    assert spro([np.ones((2, 2))], [[(np.ones((2, 2), bool), 4)]]) == nothing


def test_logical_and_structural_each_against_the_good_images():
    maps, regions = case(0, "ties")
    kinds = ["good", "good", "logical_anomalies", "structural_anomalies", "structural_anomalies"]
    tested = SimpleNamespace(
        mask_known=torch.tensor([True, True, True, True, False]), defects=kinds, regions=lambda i: regions[i]
    )
    scores = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2])
    rows = {}
    for name, chosen in (("logical_anomalies", [0, 1, 2]), ("structural_anomalies", [0, 1, 3, 4])):
        rows[name] = image_metrics(scores[chosen], torch.tensor([kinds[i] != "good" for i in chosen]).long())
    spro_rows(maps, tested, rows)
    results = spro_means(rows)
    logical = by_thresholds([maps[i] for i in (0, 1, 2)], [regions[i] for i in (0, 1, 2)])
    structural = by_thresholds([maps[i] for i in (0, 1, 3)], [regions[i] for i in (0, 1, 3)])
    for key in SPRO_LIMITS:
        assert rows["logical_anomalies"][key] == pytest.approx(logical[key], abs=1e-12)
        assert rows["structural_anomalies"][key] == pytest.approx(structural[key], abs=1e-12)
        assert results[key] == pytest.approx((logical[key] + structural[key]) / 2, abs=1e-12)
    assert results["image_auroc_mean"] == pytest.approx((0.5 + 0.75) / 2)
    line = spro_line(results | {"per_defect": rows})
    assert f"mean: 0.625 {results['spro_005']:.3f}, logical_anomalies: 0.500" in line
