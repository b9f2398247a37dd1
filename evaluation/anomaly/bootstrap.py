"""95 % intervals of the anomaly metrics by the bootstrap over images (Efron and Tibshirani 1993, chapter 13).

Pixels of one image are not independent, so whole images are drawn with replacement, 1000 times, the normal and the
anomalous ones separately (no replicate lacks a class); the interval runs from the 2.5 to the 97.5 percentile. A drawn
set is a vector of how often each image is in it, and its score histogram is that vector times the images' own: all
replicates at once are one product (R, N) x (N, K).

Image metrics have a bin for every distinct score and are exact. Pixel metrics have about 2000 bins between quantiles of
the pooled normal and of the pooled defect pixels: no bin holds much more than 1/1024 of either, except those of a
single value. Scores within a bin count as tied, which moves the metrics of the whole set by less than 1e-3 (tested;
1e-4 is usual), and an interval is far wider. The metrics beside the intervals are always the exact ones.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import sparse

from evaluation.anomaly.metrics import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    PRO_LIMITS,
    Array,
    Images,
    area_to_limit,
    image_metrics,
    mapped_images,
    pixel_metrics,
    region_shares,
    to_numpy,
)

REPLICATES = 1000
QUANTILES = 1024
SAMPLE = 2**22  # pixels the quantiles are taken from


class Histograms(NamedTuple):
    """Score histograms of N images over K bins, highest scores first; each (N, K)."""

    negatives: np.ndarray | sparse.csr_array
    positives: np.ndarray | sparse.csr_array
    shares: np.ndarray | sparse.csr_array  # positives weighted by 1 / the size of their region


def with_intervals(
    scores: Array,
    labels: Array,
    maps: Images | None,
    masks: Images | None,
    *,
    seed: int = 0,
    histograms: Histograms | None = None,
) -> dict[str, float | list[float] | None]:
    """All of `image_metrics` and `pixel_metrics`, each followed by `<key>_interval: [low, high]`.

    `scores` (N,), `labels` (N,), `maps` and `masks` as for `pixel_metrics` or None for either; `histograms`: their
    `pixel_histograms`, if they are there already. None where a metric is undefined. `seed` draws the replicates; image
    and pixel metrics share them. About 3 seconds for 250 images of 256 x 256 on one core.
    """
    metrics, labels = image_metrics(scores, labels), to_numpy(labels).astype(bool)
    intervals = dict.fromkeys(IMAGE_METRICS + PIXEL_METRICS)
    draws = draw_images(labels, seed)
    if metrics["image_auroc"] is not None:
        intervals |= percentiles(image_replicates(to_numpy(scores), labels, draws))
    if maps is None or masks is None:
        metrics |= dict.fromkeys(PIXEL_METRICS)
    else:
        metrics |= pixel_metrics(maps, masks)
        if metrics["aupro"] is not None:
            intervals |= percentiles(pixel_replicates(histograms or pixel_histograms(maps, masks), draws))
    return {
        name: value for key in metrics for name, value in ((key, metrics[key]), (f"{key}_interval", intervals[key]))
    }


def draw_images(labels: np.ndarray, seed: int | np.random.Generator, replicates: int | None = None) -> np.ndarray:
    """How often each replicate holds each image, (R, N) float64, for `labels` (N,) bool, or the numbers of classes;
    each class is drawn from by itself. `replicates`: R; None: REPLICATES."""
    rng, replicates = np.random.default_rng(seed), replicates or REPLICATES
    draws = np.zeros((replicates, len(labels)))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        n = len(members)
        cells = rng.integers(n, size=(replicates, n)) + n * np.arange(replicates)[:, None]
        draws[:, members] = np.bincount(cells.ravel(), minlength=replicates * n).reshape(replicates, n)
    return draws


def percentiles(replicates: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """{key: (R,)} -> {key: [low, high]}. NaN replicates (no anomalous image drawn has a mask) are left out."""
    return {key: np.nanpercentile(values, (2.5, 97.5)).tolist() for key, values in replicates.items()}


def image_replicates(scores: np.ndarray, labels: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Image metrics of every row of `draws` (R, N), exact: {key: (R,)}. `scores` (N,), `labels` (N,) bool."""
    levels, bins = np.unique(-scores, return_inverse=True)
    shape = (len(scores), len(levels))
    cells = (np.arange(len(scores)), bins)
    positives = sparse.csr_array((labels.astype(np.float64), cells), shape)
    negatives = sparse.csr_array(((~labels).astype(np.float64), cells), shape)
    return dict(zip(IMAGE_METRICS, replicate_metrics(Histograms(negatives, positives, positives), draws)))


def pixel_replicates(histograms: Histograms, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Pixel metrics of every row of `draws` (R, N), from `pixel_histograms`: {key: (R,)}."""
    return dict(zip(PIXEL_METRICS, replicate_metrics(histograms, draws)))


def pixel_histograms(maps: Images, masks: Images) -> Histograms:
    """Histograms of N maps inside and outside their masks, bins between quantiles of both. `maps` and `masks` as for
    `pixel_metrics`, with a masked and a normal pixel; only SAMPLE values are ever held twice."""
    maps, masks = mapped_images(maps, masks)
    masked = sum(np.count_nonzero(mask) for mask in masks)
    inside = quantiles((scores[mask] for scores, mask in zip(maps, masks)), masked)
    size = sum(mask.size for mask in masks) - masked
    outside = quantiles((scores[~mask] for scores, mask in zip(maps, masks)), size)
    edges, times = np.unique(np.concatenate([inside, outside]), return_counts=True)
    ties = edges[times > 1]  # a score that many pixels share gets a bin of its own, up to the next float
    edges = np.unique(np.concatenate([edges, np.nextafter(ties, np.inf, dtype=ties.dtype)]))
    k, rows = len(edges), []
    for scores, mask in zip(maps, masks):
        normal = np.sort(scores[~mask])  # sorting 65,536 values beats looking up a bin for each
        negatives = np.diff(np.searchsorted(normal, edges), append=len(normal))
        bins = np.searchsorted(edges, scores[mask], "right") - 1  # (P,)
        shares = np.bincount(bins, region_shares(mask), minlength=k)
        rows.append((negatives, np.bincount(bins, minlength=k), shares))
    return Histograms(*(np.stack(h)[:, ::-1].astype(np.float64) for h in zip(*rows)))


def quantiles(values: Iterable[np.ndarray], size: int) -> np.ndarray:
    """QUANTILES + 1 order statistics, evenly spaced, of N arrays with `size` values together: (Q + 1,), smallest first.

    Of more than SAMPLE values only every s-th of each sorted array is pooled, which moves the ranks by less than
    N / SAMPLE of all values.
    """
    stride = 1 + size // SAMPLE
    pooled = np.sort(np.concatenate([np.sort(v)[::stride].copy() for v in values]))
    return pooled[np.linspace(0, len(pooled) - 1, QUANTILES + 1).astype(np.int64)]


def replicate_metrics(histograms: Histograms, draws: np.ndarray) -> list[np.ndarray]:
    """AUROC, AP, F1-max and AU-PRO to each of `PRO_LIMITS` for each row of `draws` (R, N): six arrays (R,)."""
    n_chunks = 1 + draws.shape[0] * histograms.negatives.shape[1] // 2**18  # a dozen (r, K) arrays of 2 MB live at once
    chunks = [_replicate_metrics(histograms, chunk) for chunk in np.array_split(draws, min(n_chunks, len(draws)))]
    return [np.concatenate(metric) for metric in zip(*chunks)]


def _replicate_metrics(histograms: Histograms, draws: np.ndarray) -> list[np.ndarray]:
    negatives, positives, shares = (draws @ h for h in histograms)  # (r, K)
    false, true = negatives.cumsum(1), positives.cumsum(1)
    total_false, total_true = false[:, -1:], true[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):  # a replicate without positives: NaN
        after, width = false / total_false, negatives / total_false
        recall_gain, pro_gain = positives / total_true, shares / shares.sum(1, keepdims=True)
        f1 = np.max(2 * true / (total_true + true + false), 1)
    ap = np.sum(recall_gain * true / np.maximum(true + false, 1), 1)
    steps = [(recall_gain, 1.0), *((pro_gain, limit) for limit in PRO_LIMITS)]
    auroc, *aupro = [area_to_limit(gain, after - width, after, limit) for gain, limit in steps]
    return [auroc, ap, f1, *aupro]
