"""AUPIMO: how much of each defect is found while hardly any pixel of the good images is flagged.

Bertoldo et al. 2024, "AUPIMO: redefining visual anomaly detection benchmarks with high speed and low tolerance".
"""

import math

import numpy as np

from evaluation.anomaly.bootstrap import draw_images, percentiles
from evaluation.anomaly.metrics import Array, Images, mapped_images, to_numpy

BOUNDS = (1e-5, 1e-4)  # of the false-positive rate on good images


def aupimo(maps: Images, masks: Images, labels: Array, bounds: tuple[float, float] = BOUNDS) -> np.ndarray | None:
    """AUPIMO of each image, (N,) float64, NaN for good images and those without a masked pixel.

    `maps`, `masks` as for `metrics.pixel_metrics`, `labels` (N,) 0 or 1. None: the good images have fewer pixels than
    1 / the lower bound, so that their rate cannot be that low.

    F(t) is the mean over the good images of the share of an image's pixels that score t or more. At the rate z the
    threshold is the lowest t with F(t) <= z, T_i(z) the share of the masked pixels of image i that score at least t,
    and its AUPIMO the integral of T_i over log z between the bounds, divided by its length. Each masked pixel counts in
    T_i from z = F(its score) on, so the integral is a sum over pixels, exact; anomalib's code takes 300,000 thresholds
    and a trapezoid.

    Raises:
        UserError: a score is NaN.
    """
    maps, masks = mapped_images(maps, masks)
    labels, (low, high) = to_numpy(labels).astype(bool), bounds
    good = [scores.ravel() for scores, label in zip(maps, labels) if not label and scores.size]
    if sum(scores.size for scores in good) < 1 / low:
        return None
    top, weights = [], []
    for scores in good:  # of one image no more pixels can lie above a threshold with F <= high
        k = min(scores.size, math.floor(high * len(good) * scores.size) + 1)
        top.append(np.partition(scores, scores.size - k)[scores.size - k :])
        weights.append(np.full(k, 1 / (len(good) * scores.size)))
    values = np.concatenate(top)
    order = np.argsort(values)
    values, rates = values[order], np.concatenate(weights)[order][::-1].cumsum()[::-1]
    rates = np.append(rates, 0.0)  # F at each of `values`, and above all
    areas = np.full(len(maps), np.nan)
    for i in np.flatnonzero(labels):
        scores = maps[i][masks[i]]
        if scores.size:
            rate = rates[np.searchsorted(values, scores, "left")].clip(low, high)
            areas[i] = np.mean(np.log(high / rate)) / math.log(high / low)
    return areas


def aupimo_results(areas: np.ndarray | None, dataset, per_defect: dict[str, dict], *, seed: int) -> dict:
    """`aupimo`, the mean over the defective images, and its interval, for which these alone are drawn anew.

    The mean over the images of each defect is put into its row of `per_defect`.
    """
    areas = np.full(len(dataset), np.nan) if areas is None else areas
    known, defects = ~np.isnan(areas), np.array(dataset.defects)
    for name, row in per_defect.items():
        own = areas[known & (defects == name)]
        row["aupimo"] = float(own.mean()) if len(own) else None
    if not known.any():
        return {"aupimo": None, "aupimo_interval": None}
    draws = draw_images(known, seed)[:, known]  # (R, D)
    means = draws @ areas[known] / known.sum()
    return {"aupimo": float(areas[known].mean())} | {"aupimo_interval": percentiles({"aupimo": means})["aupimo"]}
