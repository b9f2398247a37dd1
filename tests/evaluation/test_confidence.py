"""Temperature, calibration error and threshold against scipy, plain loops and counts."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax

from evaluation.confidence import calibrated, calibration_error, fit_temperature, reliability, remarks
from runtime.errors import UserError


def scores_of(logits):
    """Any function of the image will do."""
    return -logits.double().amax(1)


def kept_of(logits, labels, loss, unknown):
    return calibrated(logits, scores_of(logits), labels, loss, unknown)


def results_of(logits, labels, loss, kept):
    return reliability(logits, scores_of(logits), labels, loss, kept)


def problem(n=200, classes=5, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    labels = torch.where(torch.rand(n, generator=generator) < 0.7, logits.argmax(1), torch.arange(n) % classes)
    return logits, labels


def likelihood(logits, labels, loss, temperature):
    """The mean negative log likelihood, by scipy."""
    z, own = logits.double().numpy() / temperature, np.eye(logits.shape[1])[labels]
    if loss == "bce":
        return -(own * log_expit(z) + (1 - own) * log_expit(-z)).sum(1).mean()
    return -(own * log_softmax(z, axis=1)).sum(1).mean()


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_temperature_is_scipys(loss, scale):
    logits, labels = problem()
    if loss == "bce":
        logits = logits - 3
    found = fit_temperature(scale * logits, labels, loss)

    def value(log_t):
        return likelihood(scale * logits, labels, loss, math.exp(log_t))

    around = math.log(scale)
    expected = minimize_scalar(value, bounds=(around - 5, around + 5), method="bounded", options={"xatol": 1e-10})
    assert math.log(found) == pytest.approx(expected.x, abs=1e-6)
    assert value(math.log(found)) <= expected.fun + 1e-12
    assert found == pytest.approx(scale * fit_temperature(logits, labels, loss), rel=1e-5)  # logits are float32


def test_a_class_without_validation_images_and_one_class_alone():
    logits, labels = problem()
    some = labels != 2
    found = fit_temperature(logits[some], labels[some], "cross_entropy")
    best = likelihood(logits[some], labels[some], "cross_entropy", found)
    assert best < min(likelihood(logits[some], labels[some], "cross_entropy", found * f) for f in (0.99, 1.01))
    alone = labels == 1
    found = fit_temperature(logits[alone], labels[alone], "cross_entropy")
    best = likelihood(logits[alone], labels[alone], "cross_entropy", found)
    assert best < min(likelihood(logits[alone], labels[alone], "cross_entropy", found * f) for f in (0.99, 1.01))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_no_temperature_where_none_is_best(loss):
    """All right (one by a tie, or all but equal), always wrong, all logits equal, and a single image."""
    right = torch.tensor([[5.0, -1.0, -2.0], [-3.0, 0.1, -1.0], [-1e-4, -1e-3, 9e3]])
    for logits, labels in (
        (right, [0, 1, 2]),
        (-right, [0, 1, 2]),
        (torch.zeros(3, 3), [0, 1, 2]),
        (right[:1], [0]),
        (right[:1], [2]),
        (torch.tensor([[2.0, 2.0, -1.0], [3.0, -1.0, -1.0]]), [0, 0]),
    ):
        if loss == "bce" and logits[0, 0] == 2:
            continue  # of two classes of equal positive logits one answer is wrong
        assert fit_temperature(logits, torch.tensor(labels), loss) is None
    # nearly all right at any scale: rounding must not make up a root
    random = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).double()
    for scale in (1e-3, 1, 300):
        assert fit_temperature(scale * random, random.argmax(1), "cross_entropy") is None


def ece(confidences, hits, bins):
    """The plain loop."""
    error = 0.0
    for b in range(bins):
        inside = [
            (confidence, hit)
            for confidence, hit in zip(confidences.tolist(), hits.tolist())
            if b / bins < confidence <= (b + 1) / bins or (b == 0 and confidence == 0)
        ]
        if inside:
            claimed, right = (sum(column) / len(inside) for column in zip(*inside))
            error += len(inside) / len(hits) * abs(right - claimed)
    return error


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_calibration_error_is_the_plain_loops(bins):
    generator = torch.Generator().manual_seed(0)
    random, hits = torch.rand(300, generator=generator), torch.rand(300, generator=generator) < 0.6
    edges = torch.arange(300).double() % (bins + 1) / bins
    for confidence in (random, random.double() ** 4, edges, torch.zeros(300), torch.ones(300), random[:1]):
        right = hits[: len(confidence)]
        assert calibration_error(confidence, right, bins) == pytest.approx(ece(confidence, right, bins), abs=1e-12)
    edges = torch.arange(1, bins + 1).double() / bins  # right, and between them wrong
    confidence = torch.cat([edges, edges - 0.5 / bins])
    right = torch.arange(2 * bins) < bins
    assert calibration_error(confidence, right, bins) == pytest.approx(ece(confidence, right, bins), abs=1e-12)


def test_the_calibration_error_of_known_cases():
    for confidence, hits, error in ((1.0, 4, 0), (1.0, 3, 0.25), (0.5, 2, 0), (0.5, 4, 0.5), (0.0, 0, 0)):
        assert calibration_error(torch.full((4,), confidence), torch.arange(4) < hits) == error


def test_saturated_probabilities_are_those_of_the_largest_logit():
    logits = torch.tensor([[40.0, 60.0], [60.0, 40.0]])  # both sigmoids are 1 in float32
    kept = {"temperature": 0.5, "threshold": 0.0}
    assert results_of(logits, torch.tensor([1, 0]), "bce", kept)["test_ece"] == 0
    assert results_of(logits, torch.tensor([0, 0]), "bce", kept)["test_ece"] == 0.5


def test_temperature_lowers_the_calibration_error_of_what_is_too_sure():
    generator = torch.Generator().manual_seed(3)
    true = torch.randn(40_000, 6, generator=generator) * 2
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]  # so `true` is calibrated
    kept = kept_of(3 * true[:20_000], labels[:20_000], "cross_entropy", 0.05)
    assert kept["temperature"] == pytest.approx(3, rel=0.05)
    results = results_of(3 * true[20_000:], labels[20_000:], "cross_entropy", kept)
    assert results["test_ece_uncalibrated"] > 0.2 and results["test_ece"] < 0.02
    assert results["test_unknown"] == pytest.approx(0.05, abs=0.01)


def test_the_share_of_known_images_above_the_threshold_is_as_promised():
    """On average over many draws, with ties: at most `unknown`, and not much less where scores differ."""
    generator, n, unknown = torch.Generator().manual_seed(0), 39, 0.1
    logits = torch.randn(4000, n + 1, 3, generator=generator)
    for digits, least in ((6, 0.08), (0, 0.0)):
        rounded = logits.round(decimals=digits)
        labels = torch.zeros(n, dtype=torch.int64)
        above = 0
        for draw in rounded[:600]:
            limit = kept_of(draw[:n], labels, "bce", unknown)["threshold"]
            assert (scores_of(draw[:n]) > limit).sum() <= unknown * (n + 1)
            above += int(scores_of(draw[n:])[0] > limit)
        assert least < above / 600 + 1e-9 <= unknown + 3 * math.sqrt(unknown * (1 - unknown) / 600)


def test_the_threshold_does_not_depend_on_the_temperature_nor_on_the_labels():
    logits, labels = problem()
    first, second = (kept_of(logits, other, "cross_entropy", 0.05) for other in (labels, labels.flip(0)))
    assert first["temperature"] != second["temperature"] and first["threshold"] == second["threshold"]
    assert first["threshold"] == sorted(-logits.amax(1).double())[math.ceil(201 * 0.95) - 1]


def test_too_few_images_and_none():
    logits, labels = problem(n=7)
    kept = kept_of(logits, labels, "cross_entropy", 0.05)
    assert kept["threshold"] == float(scores_of(logits).max()) and kept["promised_unknown"] == 1 / 8
    assert "7 validation images cannot promise unknown=0.05" in " ".join(remarks(kept, 0.05))
    none = kept_of(logits[:0], labels[:0], "cross_entropy", 0.05)
    assert none == {"temperature": None, "threshold": None, "promised_unknown": None, "n_validation": 0}
    assert "no validation images" in remarks(none, 0.05)[0] and len(remarks(none, 0.05)) == 1
    results = results_of(logits, labels, "cross_entropy", none)
    assert results["test_ece"] == results["test_ece_uncalibrated"] and results["test_unknown"] is None
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        kept_of(logits, labels, "cross_entropy", 1.0)
