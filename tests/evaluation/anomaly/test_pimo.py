"""AUPIMO against a loop over all thresholds in float64, and by hand."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation.anomaly.pimo import aupimo, aupimo_results
from runtime.errors import UserError

BOUNDS = (0.02, 0.3)  # so that maps of a few pixels resolve it


def by_thresholds(maps, masks, labels, bounds=BOUNDS):
    """Integrates the step function over log z piece by piece, with every score as a threshold."""
    low, high = bounds
    good = [m.astype(np.float64).ravel() for m, label in zip(maps, labels) if not label and m.size]
    scores = np.unique(np.concatenate([m.astype(np.float64).ravel() for m in maps]))
    thresholds = [*scores.tolist(), math.inf]  # ascending, so that the rates fall
    rates = [sum((g >= t).sum() / g.size for g in good) / len(good) for t in thresholds]
    areas = []
    for m, mask, label in zip(maps, masks, labels):
        if not label or not mask.any():
            areas.append(math.nan)
            continue
        levels = sorted({low, high, *(r for r in rates if low < r < high)})
        total = 0.0
        for a, b in itertools.pairwise(levels):  # no rate lies between a and b
            t = next(t for t, r in zip(thresholds, rates) if r <= a)  # the lowest threshold that keeps to the rate
            total += (m[mask] >= t).mean() * math.log(b / a)
        areas.append(total / math.log(high / low))
    return areas


def case(seed, kind):
    rng = np.random.default_rng(seed)
    shapes = [(9, 11), (9, 11), (5, 6), (1, 50), (9, 11), (3, 4), (7, 7), (1, 1), (0, 8)]
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    masks = [(rng.random(s) < 0.3) & bool(label) for s, label in zip(shapes, labels)]
    masks[6][:], masks[7][:] = False, True  # a defect whose mask is blank, and one of a single pixel
    maps = [rng.normal(size=s) + 1.5 * mask for s, mask in zip(shapes, masks)]
    if kind == "ties":
        maps = [np.round(2 * m) for m in maps]
    if kind == "constant":
        maps = [np.ones(s) for s in shapes]
    return [m.astype((np.float32, np.float64)[i % 2]) for i, m in enumerate(maps)], masks, labels


@pytest.mark.parametrize("kind", ["continuous", "ties", "constant"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_every_threshold_in_turn(seed, kind):
    maps, masks, labels = case(seed, kind)
    found = aupimo(maps, masks, labels, BOUNDS)
    np.testing.assert_allclose(found, by_thresholds(maps, masks, labels), atol=1e-12)
    assert np.isnan(found).tolist() == [True] * 4 + [False] * 2 + [True, False, True]
    if kind == "constant":
        assert not np.nansum(found)  # what cannot be told apart is never found


def test_published_bounds_by_hand():
    """A million good pixels, of which 30 score 5: half of a defect scores 9, a quarter 5, a quarter 0."""
    good = np.zeros((2, 500, 1000), np.float32)
    good[0].flat[:30] = 5  # half of each image counts: a rate of 3e-5
    bad = np.zeros((1, 500, 1000), np.float32)
    mask = np.zeros((1, 500, 1000), bool)
    mask[0, 0, :40] = True
    bad[0, 0, :20], bad[0, 0, 20:30] = 9, 5
    maps, masks = np.concatenate([good, bad]), np.concatenate([np.zeros_like(good, bool), mask])
    expected = 0.5 + 0.25 * math.log(1e-4 / 3e-5) / 2.302585
    assert aupimo(maps, masks, [0, 0, 1])[2] == pytest.approx(expected, rel=1e-6)
    tensors = torch.from_numpy(maps), torch.from_numpy(masks), torch.tensor([0, 0, 1])
    assert aupimo(*tensors)[2] == pytest.approx(expected, rel=1e-6)


def test_too_few_good_pixels_or_none():
    maps, masks, labels = case(0, "continuous")
    assert aupimo(maps, masks, labels) is None  # 278 pixels know no rate of 1e-5
    assert aupimo(maps[4:], masks[4:], labels[4:], BOUNDS) is None
    line = np.arange(50.0)[None]
    assert aupimo([line], [np.zeros((1, 50), bool)], [0], BOUNDS) is not None  # 50 = 1 / 0.02: just enough
    assert aupimo([line[:, :49]], [np.zeros((1, 49), bool)], [0], BOUNDS) is None
    maps[4][0, 0] = np.nan
    with pytest.raises(UserError, match="not a number"):
        aupimo(maps, masks, labels, BOUNDS)


class Tested:
    defects = ("good", "dent", "hole", "dent", "dent")

    def __len__(self):
        return 5


def test_results_are_means_over_images_and_defects():
    rows = {"dent": {}, "hole": {}}
    areas = np.array([math.nan, 0.2, 0.5, 0.4, math.nan])
    results = aupimo_results(areas, Tested(), rows, seed=0)
    assert results["aupimo"] == pytest.approx(1.1 / 3)
    assert rows["dent"]["aupimo"] == pytest.approx(0.3) and rows["hole"]["aupimo"] == 0.5
    low, high = results["aupimo_interval"]
    assert 0.2 <= low < 0.3 and 0.4 < high <= 0.5
    for nothing in (None, np.full(5, math.nan)):
        assert aupimo_results(nothing, Tested(), rows, seed=0) == {"aupimo": None, "aupimo_interval": None}
        assert rows["dent"]["aupimo"] is None


def test_one_defect_has_an_interval_of_its_own_value():
    tested = SimpleNamespace(defects=["good", "dent"], __len__=lambda: 2)
    results = aupimo_results(np.array([math.nan, 0.25]), tested, {}, seed=0)
    assert results == {"aupimo": 0.25, "aupimo_interval": [0.25, 0.25]}
