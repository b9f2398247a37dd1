"""A threshold from normal pictures alone, with a promised false-alarm rate."""

import math

import numpy as np

from evaluation.anomaly_metrics import Array, real_numbers, to_numpy
from training.errors import UserError


def normal_threshold(scores: Array, *, false_alarm_rate: float = 0.01) -> float:
    """Call a picture anomalous when its score is strictly above the returned value.

    `scores` (N,) of normal pictures that the detector was not fitted on (its own training pictures score too low). The
    split-conformal quantile (Vovk et al. 2005; Angelopoulos and Bates 2021, section 1): the
    ceil((N + 1)(1 - false_alarm_rate))-th smallest score, so that a new normal picture from the same source is above it
    with probability at most false_alarm_rate, whatever the scores' distribution. That rank is more than N when there
    are too few pictures for the promise (below 99 for 1 %); the largest score is returned then, and the rate that can
    be promised is 1 / (N + 1). Raises UserError on NaN scores and on a rate outside (0, 1).
    """
    scores = to_numpy(scores)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be (N,) with N >= 1, not {scores.shape}")
    if not 0 < false_alarm_rate < 1:
        raise UserError(f"false_alarm_rate must lie between 0 and 1, both excluded, not {false_alarm_rate}")
    scores = np.sort(real_numbers(scores, "scores of normal pictures"))
    rank = math.ceil((len(scores) + 1) * (1 - false_alarm_rate))
    return float(scores[min(rank, len(scores)) - 1])
