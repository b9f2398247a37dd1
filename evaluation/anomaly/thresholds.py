"""Thresholds from normal images alone, with a promised rate of false alarms, and normal images that look wrong.

The promises hold for scores of images that the detector was not fitted on, if these and the later images are
exchangeable: whatever the scores' distribution, on average over the draw of the normal images.
"""

import bisect
import math
from collections import Counter
from fractions import Fraction
from typing import Annotated

import numpy as np
from scipy.stats import binomtest

from evaluation.anomaly.metrics import Array, Images, real_numbers, score_maps, to_numpy
from runtime.errors import UserError
from runtime.values import Range

FalseAlarmRate = Annotated[float, Range(least=1e-9, below=1)]


def normal_threshold(scores: Array, *, false_alarm_rate: float = 0.01) -> float:
    """Call an image anomalous when its score is strictly above the returned value.

    `scores` (N,) of normal images that the detector was not fitted on (its own training images score too low). The
    split-conformal quantile (Vovk et al. 2005; Angelopoulos and Bates 2021, section 1): the
    ceil((N + 1)(1 - false_alarm_rate))-th smallest score, so that a new normal image from the same source is above it
    with probability at most false_alarm_rate. That rank is more than N when there are too few images for the promise
    (below 99 for 1 %); the largest score is returned then, and the rate that can be promised is 1 / (N + 1).

    Leave-one-out scores, each from a detector fitted on the other N - 1 images, need no image kept aside, but the
    promise above is not proved for them: a new image is scored by a detector that knows all N. It is the jackknife,
    and the rate is close to the wanted one where one image more or less changes little, as in a memory bank of many
    (a new image is then scored a little lower, on the safe side). No distribution-free bound holds for it; of the
    jackknife+, which scores a new image by all N detectors, Barber et al. (2021, theorem 1) prove at most twice
    false_alarm_rate.

    Raises UserError on NaN scores and on a rate outside (0, 1).
    """
    scores = to_numpy(scores)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be (N,) with N >= 1, not {scores.shape}")
    scores = np.sort(real_numbers(scores, "scores of normal images"))
    rank = math.ceil((len(scores) + 1) * (1 - exact_rate(false_alarm_rate)))
    return float(scores[min(rank, len(scores)) - 1])


def pixel_threshold(maps: Images, false_alarm_rate: float = 0.01) -> float:
    """Call a pixel anomalous when its score is strictly above the returned value.

    `maps` (N, H, W), or a sequence of (H_i, W_i) without padding, of normal images that the detector was not fitted
    on, or leave-one-out maps (see `normal_threshold`). Conformal risk control (Angelopoulos et al. 2022, theorem 1)
    with the share of an image's pixels above t as its loss, which is at most 1: the smallest t with

        N / (N + 1) * mean over images of (share of the pixels above t) + 1 / (N + 1) <= false_alarm_rate,

    so that the expected share of a new normal image's pixels above t is at most false_alarm_rate. With too few
    images for the promise (below 99 for 1 %) the largest pixel is returned, and 1 / (N + 1) can be promised. Exact;
    the pixels are copied and sorted once, then looked through about 25 times.

    Raises UserError on NaN pixels and on a rate outside (0, 1).
    """
    maps = score_maps(maps, "pixels of normal anomaly maps")
    if not maps or not all(image.size for image in maps):
        raise ValueError(f"maps must be one or more images with pixels, not {[image.shape for image in maps]}")
    most = (len(maps) + 1) * exact_rate(false_alarm_rate) - 1  # sum of the images' shares above t, at most

    def holds(t: float) -> bool:
        above = Counter()  # {pixels of an image: pixels above t in images of that size}
        for image in maps:
            above[image.size] += np.count_nonzero(image > t)
        return sum(Fraction(count, size) for size, count in above.items()) <= most

    values = np.sort(np.concatenate([image.ravel() for image in maps]))
    first = bisect.bisect_left(range(len(values)), True, key=lambda i: holds(values[i]))
    return float(values[min(first, len(values) - 1)])


def three_sigma(maps: Images) -> float:
    """Mean and three standard deviations of the pixels of normal images, `maps` as for `pixel_threshold`: the baseline
    by which MVTec AD 2's script for submissions proposes to binarize maps. It promises no rate.

    Raises UserError on NaN pixels.
    """
    maps = score_maps(maps, "pixels of normal anomaly maps")
    pixels = sum(image.size for image in maps)
    mean = sum(float(image.sum(dtype=np.float64)) for image in maps) / pixels
    variance = sum(float(np.square(image - mean, dtype=np.float64).sum()) for image in maps) / pixels
    return mean + 3 * math.sqrt(variance)


def exact_rate(rate: float) -> Fraction:
    """The decimal number that was written: 0.45 is 9/20, not the float beside it, so that ranks do not slip by one."""
    if not 0 < rate < 1:
        raise UserError(f"false_alarm_rate must lie between 0 and 1, both excluded, not {rate}")
    return Fraction(str(rate))


def suspicious(scores: Array, paths: list[str]) -> list[dict]:
    """Training images that may be defective or of another kind: `[{"path", "score"}]`, the highest score first.

    `scores` (N,) leave-one-out, `paths` N. Those beyond Tukey's outer fence (1977), the upper quartile plus three
    times the distance of the quartiles (interpolated), of which a normal distribution has 1 in 850,000. None of
    fewer than four images, and none of identical scores. Raises UserError on NaN scores.
    """
    scores = real_numbers(to_numpy(scores), "leave-one-out scores")
    if scores.shape != (len(paths),):
        raise ValueError(f"scores must be (N,) for {len(paths)} paths, not {scores.shape}")
    if len(scores) < 4:
        return []
    lower, upper = np.percentile(scores.astype(np.float64), (25, 75))
    order = np.argsort(-scores, kind="stable")
    found = order[scores[order] > upper + 3 * (upper - lower)]
    return [{"path": str(paths[i]), "score": float(scores[i])} for i in found]


def binomial_interval(alarms: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the rate behind `alarms` in `n` independent trials (Clopper and Pearson 1934): covers it with
    probability `level` at least, whatever the rate; the whole of [0, 1] without trials."""
    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(alarms, n).proportion_ci(level, method="exact")
    return float(low), float(high)
