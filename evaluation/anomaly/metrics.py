"""Exact metrics of anomaly detection: AUROC, AP and F1-max of images and pixels, and AU-PRO. No threshold grid.

Every metric here is a sum over the positives (anomalous images, or pixels inside a mask), and needs for each of them
only how many negatives score above it, how many not below it, and how many positives not below it. So the negatives
(97 % of the pixels) are counted in chunks of whole images: by a histogram, and those in a bin with a positive are
sorted as bare values, in which the positives are looked up. This is exact, ties included, without the large argsort of
the usual form and without a second copy of the maps. Counts are int64 and sums float64: float32 can count to 2^24 only,
the pixels of 256 images of 256 x 256.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from runtime.errors import UserError

PRO_LIMITS = (0.3, 0.05, 0.01)  # largest false-positive rates of the three AU-PRO
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_005", "aupro_001")
NEIGHBORS_8 = np.ones((3, 3))
CHUNK = 2**24  # negatives counted at a time, by all threads together: 192 MB with their bins
BINS = 2**18  # a table of them is 2 MB
ONE_THREAD = 100_000  # negatives that are not worth a second thread, nor bins
BLOCK = 2**20  # positives taken at a time: a dozen temporaries of 8 MB

Array = np.ndarray | torch.Tensor
Images = Array | Sequence[Array]  # (N, H, W), or N arrays of (H_i, W_i)


class Counts(NamedTuple):
    """The ranking seen from each positive, by ascending score. The first three are (P,) int64."""

    above: np.ndarray  # negatives that score strictly higher
    false: np.ndarray  # negatives that score at least as high: false alarms with the threshold at this positive
    true: np.ndarray  # positives that score at least as high, itself included
    negatives: int

    def blocks(self) -> Iterator[tuple[slice, "Counts"]]:
        """Consecutive runs of BLOCK positives, each with its place."""
        for start in range(0, len(self.true), BLOCK):
            place = slice(start, start + BLOCK)
            yield place, Counts(self.above[place], self.false[place], self.true[place], self.negatives)

    @property
    def false_positive_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) false-positive rate just before and just after the threshold passes each positive's score."""
        return self.above / self.negatives, self.false / self.negatives


def image_metrics(scores: Array, labels: Array) -> dict[str, float | None]:
    """AUROC, AP and F1-max of one score an image.

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
    counts = count_ranks(np.sort(scores[labels]), [scores], [labels])
    return dict(zip(IMAGE_METRICS, ranking_metrics(counts)))


def pixel_metrics(maps: Images, masks: Images) -> dict[str, float | None]:
    """AUROC, AP and F1-max over the pixels of all images together, and AU-PRO up to the rates of `PRO_LIMITS`.

    `maps` (N, H, W), higher is more anomalous, and `masks` (N, H, W) bool, good images included with an empty mask;
    or sequences of N maps and masks (H_i, W_i) of any sizes. All None without a masked or without a normal pixel.
    Raises UserError on NaN scores. Beside its input it needs about 250 MB, and 50 bytes for each masked pixel.

    AU-PRO (Bergmann et al., IJCV 2021; MVTec's published evaluation code): PRO is the mean over all
    8-connected regions of all images of the share of the region that is found, the rate is over all normal pixels of
    all images; the area under PRO against the rate, linear between distinct scores and at the limit, is divided by
    the limit. Taken at the resolution of what is given (MVTec's code takes it at the original one).
    """
    maps, masks = mapped_images(maps, masks)
    masked = sum(np.count_nonzero(mask) for mask in masks)
    if masked in (0, sum(mask.size for mask in masks)):
        return dict.fromkeys(PIXEL_METRICS)
    positives, shares = sorted_positives(maps, masks)
    counts = count_ranks(positives, maps, masks)
    pro = [area_under(shares, counts, limit) / float(shares.sum()) for limit in PRO_LIMITS]
    return dict(zip(PIXEL_METRICS, [*ranking_metrics(counts), *pro]))


def segmentation_f1(maps: Images, masks: Images, threshold: float) -> float | None:
    """F1 of "the pixel scores above the threshold" over the pixels of all images together; None without a masked pixel.

    `maps` and `masks` as for `pixel_metrics`. Raises UserError on NaN scores.
    """
    maps, masks = mapped_images(maps, masks)
    masked = sum(np.count_nonzero(mask) for mask in masks)
    if not masked:
        return None
    above = sum(np.count_nonzero(scores > threshold) for scores in maps)
    return 2 * sum(np.count_nonzero(scores[mask] > threshold) for scores, mask in zip(maps, masks)) / (masked + above)


def sorted_positives(maps: list[np.ndarray], masks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the masked pixels, ascending, and with each 1 / the size of its region: (P,), (P,)."""
    positives = np.concatenate([scores[mask] for scores, mask in zip(maps, masks)])
    shares = np.concatenate([region_shares(mask) for mask in masks])
    order = np.argsort(positives)
    return positives[order], shares[order]


def count_ranks(positives: np.ndarray, scores: list[np.ndarray], labels: list[np.ndarray]) -> Counts:
    """`positives` (P,) sorted ascending, of the common dtype of `scores`; the negatives are `scores[i][~labels[i]]`,
    arrays of any shape.

    Of many negatives only those are sorted that share one of BINS equal bins with a positive: about a seventh. Counts
    add up, so chunks of whole arrays are counted in threads; at no time are there copies of more than CHUNK negatives
    and one array.
    """
    sizes = np.array([label.size for label in labels])
    negatives = int(sizes.sum()) - sum(np.count_nonzero(label) for label in labels)
    threads = torch.get_num_threads() if negatives > ONE_THREAD else 1
    chunk = -(-min(CHUNK, sizes.sum()) // threads)
    starts = np.flatnonzero(np.diff((sizes.cumsum() - 1) // chunk, prepend=-1))  # the first array of each chunk
    counts, lock = np.full((2, len(positives)), negatives), Lock()
    n_bins = BINS if negatives > ONE_THREAD else 1
    places, taken = bins(positives, positives, n_bins), np.zeros(n_bins, bool)
    taken[places] = True

    def count(members: np.ndarray) -> None:
        values = np.concatenate([scores[i][~labels[i]] for i in members])
        place = bins(values, positives, n_bins)
        passed = np.where(taken, 0, np.bincount(place, minlength=n_bins)).cumsum()  # in bins without positives
        values = values[taken[place]]
        values.sort()  # NumPy lets go of the interpreter lock while it sorts
        for first in range(0, len(positives), BLOCK):
            block = slice(first, first + BLOCK)
            for row, side in enumerate(("right", "left")):
                below = passed[places[block]] + np.searchsorted(values, positives[block], side)
                with lock:
                    counts[row, block] -= below

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(count, np.split(np.arange(len(sizes)), starts[1:])))
    lower = np.searchsorted(positives, positives, "left")
    return Counts(*counts, np.subtract(len(positives), lower, out=lower), negatives)


def bins(values: np.ndarray, positives: np.ndarray, n_bins: int) -> np.ndarray:
    """Bin of each of `values` (N,), int32 from 0 to n_bins - 1, which never falls where the value rises.

    The bins divide the range of the sorted `positives` without a thousandth of them at each end; where that is zero or
    infinite, all values are in one.
    """
    low, high = positives[len(positives) // 1000], positives[-1 - len(positives) // 1000]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale = positives.dtype.type(n_bins) / (high - low)
        if not (np.isfinite(scale) and scale > 0):
            return np.zeros(len(values), np.int32)
        place = values - low
        place *= scale
    return np.clip(place, 0, n_bins - 1, out=place).astype(np.int32)


def ranking_metrics(counts: Counts) -> tuple[float, float, float]:
    """(AUROC, AP, F1-max). The best F1 is at a positive's score: a threshold below it only adds false alarms."""
    n, ap, f1 = len(counts.true), 0.0, 0.0
    for _, part in counts.blocks():
        ap += float(np.sum(part.true / (part.true + part.false))) / n
        f1 = max(f1, float((2 * part.true / (n + part.true + part.false)).max()))
    return area_under(np.broadcast_to(1 / n, n), counts, limit=1.0), ap, f1


def area_under(gain: np.ndarray, counts: Counts, limit: float) -> float:
    """`area_to_limit` of a curve that rises by `gain` (P,) at the positives of `counts`, summed block by block."""
    return sum(float(area_to_limit(gain[place], *part.false_positive_rates, limit)) for place, part in counts.blocks())


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


def region_shares(mask: np.ndarray) -> np.ndarray:
    """1 / the size of its 8-connected region for each masked pixel of `mask` (H, W) bool, in the order of
    `mask[mask]`: (P,). They add up to the number of regions."""
    if not mask.any():
        return np.empty(0)
    regions = ndimage.label(mask, NEIGHBORS_8)[0][mask]  # (P,) numbered from 1
    return (1 / np.maximum(np.bincount(regions), 1))[regions]


def mapped_images(maps: Images, masks: Images) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """N maps (H_i, W_i) float32 or float64, and their masks (H_i, W_i) bool. ValueError when they do not fit."""
    maps = score_maps(maps, "anomaly-map pixels")
    masks = list(to_numpy(masks)) if isinstance(masks, Array) else [to_numpy(mask) for mask in masks]
    shapes = [scores.shape for scores in maps], [mask.shape for mask in masks]
    if shapes[0] != shapes[1] or any(mask.dtype != bool for mask in masks):
        differ = [f"{a} and {b}" for a, b in zip(*shapes) if a != b]
        types = sorted({str(mask.dtype) for mask in masks})
        raise ValueError(
            f"masks must be bool and as large as their maps: {len(maps)} maps, {len(masks)} masks of {types}, "
            f"different sizes: {differ[:3]}"
        )
    return maps, masks


def score_maps(maps: Images, what: str) -> list[np.ndarray]:
    """N maps (H_i, W_i) float32 or float64 from (N, H, W) or a sequence. UserError when some pixels are NaN."""
    if isinstance(maps, Array):
        images = list(real_numbers(to_numpy(maps), what))
    else:
        images = [real_numbers(to_numpy(image), f"{what} of image {i}") for i, image in enumerate(maps)]
    if any(image.ndim != 2 for image in images):
        raise ValueError(f"maps must be (N, H, W) or N times (H, W), not N times {images[0].shape}")
    return images


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
    if scores.size and np.isnan(scores.min()):  # no array of flags beside a gigabyte of scores
        missing = np.isnan(scores)
        index = np.unravel_index(missing.argmax(), scores.shape)
        place = ", ".join(map(str, index))
        raise UserError(
            f"{missing.sum()} of {scores.size} {what} are not a number, the first at index [{place}]: "
            "look for a loss that diverged (lower optim.lr) or for overflow (precision=fp32)"
        )
    return scores
