"""Weighted histograms against the exact metrics of images that really are repeated."""

import json

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from evaluation.anomaly import bootstrap
from evaluation.anomaly.bootstrap import (
    draw_images,
    image_replicates,
    pixel_histograms,
    pixel_replicates,
    quantiles,
    with_intervals,
)
from evaluation.anomaly.metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, pixel_metrics
from runtime.errors import UserError


def scored(n: int, levels: int | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3 == 0
    scores = rng.normal(size=n) + labels
    return scores if levels is None else np.round(scores * levels / 4), labels


def mapped(n: int, size: int, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise, with a brighter blurred defect or two in every second image."""
    rng = np.random.default_rng(0)
    masks = np.zeros((n, size, size), dtype=bool)
    for i in range(0, n, 2):
        for _ in range(rng.integers(1, 3)):
            (y, x), (h, w) = rng.integers(0, size * 3 // 4, 2), rng.integers(2, size // 4, 2)
            masks[i, y : y + h, x : x + w] = True
    noise = gaussian_filter(rng.normal(size=masks.shape), (0, 2, 2)) * 7
    maps = noise + contrast * gaussian_filter(masks.astype(float), (0, 2, 2))
    return maps.astype(np.float32), masks


def repeats(draw: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(draw)), draw.astype(int))


@pytest.mark.parametrize("levels", [None, 3, 1])
def test_image_replicates_equal_repeated_images(levels):
    scores, labels = scored(40, levels)
    draws = draw_images(labels, seed=1)[:20]
    got = image_replicates(scores, labels, draws)
    for r, draw in enumerate(draws):
        chosen = repeats(draw)
        expected = image_metrics(scores[chosen], labels[chosen])
        assert {key: got[key][r] for key in got} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("contrast", [0.5, 3, 8])
def test_pixel_histograms_agree_with_exact_figures(contrast):
    maps, masks = mapped(24, 64, contrast)
    draws = np.concatenate([np.ones((1, 24)), draw_images(masks.any((1, 2)), seed=1)[:4]])
    got = pixel_replicates(pixel_histograms(maps, masks), draws)
    for r, draw in enumerate(draws):
        expected = pixel_metrics(maps[repeats(draw)], masks[repeats(draw)])
        assert {key: got[key][r] for key in got} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("sample", [2**22, 3000])
def test_images_of_different_sizes(monkeypatch, sample):
    """Also with quantiles from every 17th pixel only: a set so small that coarser bins show."""
    monkeypatch.setattr(bootstrap, "SAMPLE", sample)
    maps, masks = mapped(16, 64, 3)
    maps = [image[: 64 - i, i // 2 :] for i, image in enumerate(maps)]
    masks = [mask[: 64 - i, i // 2 :] for i, mask in enumerate(masks)]
    labels = np.array([mask.any() for mask in masks])
    draws = np.concatenate([np.ones((1, 16)), draw_images(labels, seed=1)[:3]])
    histograms = pixel_histograms(maps, masks)
    assert histograms.negatives.sum(1).tolist() == [np.count_nonzero(~mask) for mask in masks]
    assert histograms.positives.sum(1).tolist() == [np.count_nonzero(mask) for mask in masks]
    got = pixel_replicates(histograms, draws)
    for r, draw in enumerate(draws):
        expected = pixel_metrics([maps[i] for i in repeats(draw)], [masks[i] for i in repeats(draw)])
        assert {key: got[key][r] for key in got} == pytest.approx(expected, abs=1e-3 if sample > 3000 else 5e-3)
    low, high = with_intervals([m.max() for m in maps], labels, maps, masks)["aupro_001_interval"]
    assert low < high


@pytest.mark.parametrize("sample", [2**22, 9000])
def test_quantiles_are_evenly_spaced_ranks(monkeypatch, sample):
    monkeypatch.setattr(bootstrap, "SAMPLE", sample)
    arrays = [np.random.default_rng(i).normal(i % 3, size=4000 + i) for i in range(20)]
    pooled = np.sort(np.concatenate(arrays))
    ranks = np.searchsorted(pooled, quantiles(arrays, len(pooled))) / (len(pooled) - 1)
    assert np.abs(ranks - np.linspace(0, 1, 1025)).max() <= 1e-4 + (20 / 9000 if sample == 9000 else 0)
    assert ranks[0] == 0


@pytest.mark.parametrize("levels", [1, 4, 30])
def test_tied_pixels_are_exact(levels):
    """Every value has a bin of its own, so no score is taken for mixed with others."""
    maps, masks = mapped(12, 48, 3)
    maps = np.round(maps * levels / 4)
    got = pixel_replicates(pixel_histograms(maps, masks), np.ones((1, 12)))
    assert {key: got[key][0] for key in got} == pytest.approx(pixel_metrics(maps, masks), abs=1e-9)


def test_half_the_pixels_tied_at_zero():
    maps, masks = mapped(12, 48, 3)
    maps = np.maximum(maps, np.median(maps))
    got = pixel_replicates(pixel_histograms(maps, masks), np.ones((1, 12)))
    assert {key: got[key][0] for key in got} == pytest.approx(pixel_metrics(maps, masks), abs=1e-3)


def test_draws_keep_the_number_of_each_class_and_are_seeded():
    labels = np.arange(17) < 5
    draws = draw_images(labels, seed=3)
    assert draws.shape == (1000, 17)
    assert (draws[:, labels].sum(1) == 5).all() and (draws[:, ~labels].sum(1) == 12).all()
    assert np.abs(draws.mean(0) - 1).max() < 0.15  # each image once on average, standard error 0.03
    assert np.abs(draws.var(0) - np.where(labels, 4 / 5, 11 / 12)).max() < 0.25  # multinomial
    assert (draws == draw_images(labels, seed=3)).all() and (draws != draw_images(labels, seed=4)).any()


def test_auroc_interval_is_as_wide_as_delong_says():
    scores, labels = scored(300, None)
    wins = scores[labels][:, None] > scores[~labels]
    spread = np.sqrt(wins.mean(1).var(ddof=1) / labels.sum() + wins.mean(0).var(ddof=1) / (~labels).sum())
    low, high = with_intervals(scores, labels, None, None)["image_auroc_interval"]
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert low < wins.mean() < high


def test_figures_stand_beside_their_intervals():
    maps, masks = mapped(16, 32, 3)
    labels = masks.any((1, 2))
    scores = maps.max((1, 2))
    got = with_intervals(
        torch.from_numpy(scores), torch.from_numpy(labels), torch.from_numpy(maps), torch.tensor(masks)
    )
    exact = image_metrics(scores, labels) | pixel_metrics(maps, masks)
    assert list(got) == [name for key in IMAGE_METRICS + PIXEL_METRICS for name in (key, f"{key}_interval")]
    for key, value in exact.items():
        low, high = got[f"{key}_interval"]
        assert got[key] == value and 0 <= low < high <= 1 + 1e-12
    assert json.loads(json.dumps(got)) == got
    assert got == with_intervals(scores, labels, maps, masks)
    assert got != with_intervals(scores, labels, maps, masks, seed=1)


def test_undefined_figures_have_no_interval():
    maps, masks = mapped(6, 16, 3)
    labels = masks.any((1, 2))
    got = with_intervals(maps.max((1, 2)), labels, maps, None)
    assert got["image_auroc_interval"] is not None
    assert got["aupro"] is None and got["aupro_interval"] is None
    got = with_intervals(maps.max((1, 2)), labels, maps, np.zeros_like(masks))
    assert got["pixel_ap"] is None and got["pixel_ap_interval"] is None
    got = with_intervals(maps[::2].max((1, 2)), labels[::2], maps[::2], masks[::2])  # anomalous images alone
    assert got["image_ap"] is None and got["image_ap_interval"] is None and got["aupro_interval"] is not None
    assert set(with_intervals([], [], None, None).values()) == {None}


def test_one_image_of_each_class_has_an_interval_of_no_width():
    got = with_intervals([1.0, 2.0], [0, 1], None, None)
    assert got["image_auroc"] == 1 and got["image_auroc_interval"] == [1, 1]


def test_replicates_without_any_mask_are_left_out():
    """Two anomalous images, one with a mask: a quarter of the replicates draw only the other."""
    maps, masks = mapped(4, 16, 3)
    masks[2] = False
    got = with_intervals(maps.max((1, 2)), [1, 0, 1, 0], maps, masks)
    assert np.isfinite(got["aupro_interval"]).all()


def test_nan_is_an_error():
    with pytest.raises(UserError, match="not a number"):
        with_intervals([1.0, float("nan")], [0, 1], None, None)
