"""How far a classifier's probabilities can be trusted: a temperature, the calibration error, and a threshold above
which an image is called none of the classes. Temperature and threshold come from validation images, never from test
images.
"""

import numpy as np
from scipy.optimize import brentq
from torch import Tensor

from evaluation.anomaly.thresholds import normal_threshold
from losses.supervised import probabilities, soft_targets

BINS = 15  # of the calibration error, as in Guo et al. 2017
SHARPEST = 2.0**60  # 1 / temperature, at most


def fit_temperature(logits: Tensor, labels: Tensor, loss: str) -> float | None:
    """The temperature T of `probabilities(logits, loss, T)` that makes the labels likeliest (Guo et al. 2017, 4.2).

    The likelihood is that of the network: of one class by a softmax, or with `bce` of C answers, each a sigmoid. In
    s = 1 / T the negative log likelihood is convex, with the derivative

        mean over the images of the sum over c of (p_c(s z) - t_c) z_c,  t one-hot,

    whose root is found in float64 to its last bits. Without a root there is no best temperature, hence None: all
    images are right, so that a sharper one is always better (likewise with `bce`, if each answer is right), or the
    logits are no better than chance.

    Args:
        logits: (N, C), N at least 1.
        labels: (N,) int64 in [0, C); a class may have none.
    """
    z, targets = logits.double(), soft_targets(labels, logits.shape[1]).double()  # (N, C) each
    if loss != "bce":  # which a softmax does not notice; right images then only add what is at most 0, rounded or not
        z = z - z.gather(1, labels[:, None])

    def slope(s: float) -> float:
        return float(((probabilities(s * z, loss) - targets) * z).sum(1).mean())

    high = 1.0
    while slope(high) <= 0 and high < SHARPEST:
        high *= 2
    if slope(high) <= 0 or slope(0.0) >= 0:
        return None
    return 1 / float(brentq(slope, 0.0, high, xtol=np.finfo(np.float64).tiny, maxiter=2000))


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): the mean, over the images, of the distance between the
    accuracy and the mean confidence of the images in a bin. Bin i of B has those in (i / B, (i + 1) / B]; the first has
    0 too.

    Args:
        confidence: (N,) in [0, 1], the probability of the class that is predicted.
        right: (N,) bool, whether it is the true one.
    """
    claimed, hit = confidence.double().cpu().numpy(), right.cpu().numpy()
    bin_of = np.searchsorted(np.arange(1, bins) / bins, claimed, side="left")  # (N,)
    return float(np.abs(np.bincount(bin_of, hit - claimed, bins)).sum() / len(hit))


def calibrated(logits: Tensor, scores: Tensor, labels: Tensor, loss: str, unknown: float) -> dict:
    """What a run keeps of its validation images, plain values for the checkpoint, None without images:

    temperature: `fit_temperature`. threshold: of the `novelty`, the split-conformal quantile of
    `thresholds.normal_threshold`: a new image of the known classes is above it with probability `unknown` at most, on
    average over the classes. promised_unknown: what so few images can promise. n_validation: their number.

    The promise is exact if these images chose nothing that the novelty depends on (the temperature is no such thing)
    and new ones come from the same source: early_stopping and plateau follow the loss of the same images, which makes
    it optimistic.

    Args:
        logits: (N, C). scores: (N,) `models.classifier.novelty`. labels: (N,) int64.
        unknown: share of images of the known classes that may be called none of them.
    """
    n = len(labels)
    if n == 0:
        return {"temperature": None, "threshold": None, "promised_unknown": None, "n_validation": 0}
    return {
        "temperature": fit_temperature(logits, labels, loss),
        "threshold": normal_threshold(scores, false_alarm_rate=unknown),
        "promised_unknown": max(unknown, 1 / (n + 1)),
        "n_validation": n,
    }


def reliability(logits: Tensor, scores: Tensor, labels: Tensor, loss: str, calibration: dict) -> dict:
    """Of the test images: test_ece_uncalibrated and test_ece, their calibration error by the probabilities as trained
    and with the temperature, if there is one; test_unknown, the share above the threshold, None without one. Arguments
    as of `calibrated`.

    The predicted class is that of the largest logit: probabilities may round to equal ones.
    """
    right, errors = logits.argmax(1) == labels, []
    for temperature in (1.0, calibration["temperature"] or 1.0):
        errors.append(calibration_error(probabilities(logits, loss, temperature).amax(1), right))
    above = None if calibration["threshold"] is None else scores > calibration["threshold"]
    return {
        "test_ece_uncalibrated": errors[0],
        "test_ece": errors[1],
        "test_unknown": None if above is None else float(above.double().mean()),
    }


def remarks(calibration: dict, unknown: float) -> list[str]:
    """What to tell the user where something could not be fitted or promised."""
    n, lines = calibration["n_validation"], []
    if n == 0:
        return [
            "no validation images: probabilities stay as trained, and no image is called none of these (holdout=0.1)"
        ]
    if calibration["temperature"] is None:
        lines.append(
            f"no temperature: the {n} validation images have no best one, as all are right, or no better than chance; "
            "probabilities stay as trained"
        )
    if (rate := calibration["promised_unknown"]) > unknown:
        lines.append(f"{n} validation images cannot promise unknown={unknown:g}: the threshold is good for {rate:.1%}")
    return lines
