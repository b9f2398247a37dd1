"""Exact figures of anomaly detection: AUROC, AP and F1-max of images and pixels, and AU-PRO. No threshold grid.

Every figure here is a sum over the positives (anomalous images, or pixels inside a mask), and needs for each of them
only how many negatives score above it, how many not below it, and how many positives not below it. So the negatives
(97 % of the pixels) are sorted as bare values and the positives are looked up in them, which spares the large argsort
of the usual form and is exact, ties included. Counts are int64 and sums float64: float32 can count to 2^24 only, the
pixels of 256 pictures of 256 x 256.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from training.errors import UserError

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_005")
NEIGHBORS_8 = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # no neighbors in the next picture

Array = np.ndarray | torch.Tensor


class Counts(NamedTuple):
    """The ranking seen from each positive, by ascending score. The first three are (P,) int64."""

    above: np.ndarray  # negatives that score strictly higher
    false: np.ndarray  # negatives that score at least as high: false alarms with the threshold at this positive
    true: np.ndarray  # positives that score at least as high, itself included
    negatives: int

    @property
    def false_positive_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) false-positive rate just before and just after the threshold passes each positive's score."""
        return self.above / self.negatives, self.false / self.negatives


def image_metrics(scores: Array, labels: Array) -> dict[str, float | None]:
    """AUROC, AP and F1-max of one score a picture.

    `scores` (N,), higher is more anomalous; `labels` (N,), 1 anomalous and 0 normal. All None when a class is missing.
    Raises UserError on NaN scores. AP is scikit-learn's step-wise sum, not a trapezoid under the PR curve.
    """
    scores, labels = to_numpy(scores), to_numpy(labels)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"scores and labels must both be (N,), not {scores.shape} and {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 (normal) or 1 (anomalous), not {np.unique(labels)[:10]}")
    scores, labels = real_numbers(scores, "image scores"), labels.astype(bool)
    if labels.all() or not labels.any():
        return dict.fromkeys(IMAGE_METRICS)
    counts = count_ranks(np.sort(scores[labels]), scores[~labels])
    return dict(zip(IMAGE_METRICS, ranking_metrics(counts)))


def pixel_metrics(maps: Array, masks: Array) -> dict[str, float | None]:
    """AUROC, AP and F1-max over the pixels of all pictures together, and AU-PRO up to false-positive rate 0.3 and 0.05.

    `maps` (N, H, W), higher is more anomalous; `masks` (N, H, W) bool, good pictures included with an empty mask. All
    None without a masked or without a normal pixel. Raises UserError on NaN scores.

    AU-PRO (Bergmann et al., IJCV 2021; MVTec's published evaluation code): PRO is the mean over all
    8-connected regions of all pictures of the share of the region that is found, the rate is over all normal pixels of
    all pictures; the area under PRO against the rate, linear between distinct scores and at the limit, is divided by
    the limit. Taken at the maps' resolution (MVTec's code takes it at the original one).
    """
    maps, masks = to_numpy(maps), to_numpy(masks)
    if maps.ndim != 3 or masks.shape != maps.shape or masks.dtype != bool:
        raise ValueError(f"maps and masks must be (N, H, W), masks bool, not {maps.shape}, {masks.shape} {masks.dtype}")
    maps = real_numbers(maps, "anomaly-map pixels")
    if masks.all() or not masks.any():
        return dict.fromkeys(PIXEL_METRICS)
    positives, shares = maps[masks], region_shares(masks)
    order = np.argsort(positives)
    counts = count_ranks(positives[order], maps[~masks])
    before, after = counts.false_positive_rates
    gain = shares[order] / shares.sum()
    pro = [float(area_to_limit(gain, before, after, limit)) for limit in (0.3, 0.05)]
    return dict(zip(PIXEL_METRICS, [*ranking_metrics(counts), *pro]))


def count_ranks(positives: np.ndarray, negatives: np.ndarray) -> Counts:
    """`positives` (P,) sorted ascending, `negatives` (M,) in any order: counts add up, so chunks sort in threads."""

    def count(chunk: np.ndarray) -> np.ndarray:
        chunk = np.sort(chunk)
        return len(chunk) - np.stack([np.searchsorted(chunk, positives, side) for side in ("right", "left")])  # (2, P)

    threads = torch.get_num_threads() if len(negatives) > 100_000 else 1
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter lock while it sorts
        above, false = sum(pool.map(count, np.array_split(negatives, threads)))
    return Counts(above, false, len(positives) - np.searchsorted(positives, positives, "left"), len(negatives))


def ranking_metrics(counts: Counts) -> tuple[float, float, float]:
    """(AUROC, AP, F1-max). The best F1 is at a positive's score: a threshold below it only adds false alarms."""
    n = len(counts.true)
    auroc = area_to_limit(np.full(n, 1 / n), *counts.false_positive_rates, limit=1.0)
    ap = np.mean(counts.true / (counts.true + counts.false))
    f1 = 2 * counts.true / (n + counts.true + counts.false)
    return float(auroc), float(ap), float(f1.max())


def area_to_limit(gain: np.ndarray, before: np.ndarray, after: np.ndarray, limit: float) -> np.ndarray:
    """Area under a curve over [0, limit], divided by limit: (..., K) steps -> (...).

    Step k raises the curve by `gain` while the false-positive rate goes from `before` to `after`, in a straight line
    (negatives tied with it) or at once (`before == after`). Its part of the area is the integral of that ramp, so the
    whole area is a sum over steps, in any order. Limit 1 with equal gains is the Mann-Whitney AUROC, ties half.
    """
    before = np.minimum(before, limit)
    width = np.where(after > before, after - before, 1)
    whole = limit - (before + after) / 2  # the ramp ends left of the limit
    cut = (limit - before) ** 2 / (2 * width)  # the limit cuts the ramp
    return np.sum(gain * np.where(after <= limit, whole, cut), axis=-1) / limit


def region_shares(masks: np.ndarray) -> np.ndarray:
    """1 / the size of its 8-connected region for each masked pixel of `masks` (N, H, W) bool, in the order of
    `masks[masks]`: (P,). The shares of a picture add up to its number of regions."""
    regions = ndimage.label(masks, NEIGHBORS_8)[0][masks]  # (P,) numbered from 1 over the whole set
    return 1 / np.bincount(regions)[regions].astype(np.float64)


def to_numpy(x: Array) -> np.ndarray:
    """A NumPy view or copy of a tensor on any device; half precision becomes float32, which holds it exactly."""
    if isinstance(x, torch.Tensor):
        x = x.detach().float() if x.dtype in (torch.bfloat16, torch.float16) else x.detach()
        return x.cpu().numpy()
    return np.asarray(x)


def real_numbers(scores: np.ndarray, what: str) -> np.ndarray:
    """`scores` as float32 or float64 (integers become float64). UserError when some are NaN; infinities are ranked."""
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32 if scores.dtype == np.float16 else np.float64)
    missing = np.isnan(scores)
    if missing.any():
        index = np.unravel_index(missing.argmax(), scores.shape)
        place = ", ".join(map(str, index))
        raise UserError(
            f"{missing.sum()} of {scores.size} {what} are not a number, the first at index [{place}]: "
            "look for a loss that diverged (lower optim.lr) or for overflow (precision=fp32)"
        )
    return scores
