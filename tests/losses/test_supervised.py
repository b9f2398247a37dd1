"""The classifier's losses against scikit-learn and plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from losses.supervised import LOSSES, binary_cross_entropy, focal_cross_entropy, probabilities, soft_targets
from tests.processes import assert_processes_equal_one

LABELS = [0, 2, 1, 2, 2]


def logits_of(n: int = 5, classes: int = 3) -> torch.Tensor:
    return 3 * torch.randn(n, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_targets_are_distributions():
    labels = torch.tensor([1, 0])
    assert soft_targets(labels, 2).tolist() == [[0, 1], [1, 0]]
    smooth = soft_targets(labels, 4, 0.2)
    torch.testing.assert_close(smooth, torch.tensor([[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert soft_targets(labels[:0], 3).shape == (0, 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_scikit_learns(smoothing):
    """Smoothed: the mean over all answers, each weighed by its share of the target."""
    logits, labels = logits_of(), torch.tensor(LABELS)
    p, targets = logits.softmax(1).numpy(), soft_targets(labels, 3, smoothing).double()
    loss = LOSSES["cross_entropy"](logits, targets)
    rows = [(row, answer, float(targets[row, answer])) for row in range(5) for answer in range(3)]
    rows = [each for each in rows if each[2]]
    expected = log_loss(
        [answer for _, answer, _ in rows],
        np.stack([p[row] for row, _, _ in rows]),
        sample_weight=[share for _, _, share in rows],
        labels=[0, 1, 2],
    )
    assert float(loss) == pytest.approx(expected, rel=1e-12 if not smoothing else 1e-6)
    if smoothing:
        torch_s = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert float(loss) == pytest.approx(float(torch_s), rel=1e-6)


def test_binary_cross_entropy_is_scikit_learns_of_each_class():
    logits, labels = logits_of(), torch.tensor(LABELS)
    p = logits.sigmoid().numpy()
    each = [log_loss(np.array(LABELS) == c, p[:, c], labels=[False, True]) for c in range(3)]
    assert float(binary_cross_entropy(logits, soft_targets(labels, 3))) == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_its_formula_with_its_gradient(gamma):
    logits, targets = logits_of().requires_grad_(), soft_targets(torch.tensor(LABELS), 3, 0.1)
    loss = focal_cross_entropy(logits, targets, gamma=gamma)
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        shares = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        expected -= sum(t * (1 - p) ** gamma * math.log(p) for p, t in zip(shares, target))
    assert loss.item() == pytest.approx(expected / 5, rel=1e-6)
    assert torch.autograd.gradcheck(lambda z: focal_cross_entropy(z, targets.double(), gamma=gamma), logits)
    if gamma == 0:
        assert float(loss) == float(LOSSES["cross_entropy"](logits, targets))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    logits, targets = logits_of().bfloat16(), soft_targets(torch.tensor(LABELS), 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](logits, targets)
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(LOSSES[name](logits.float(), targets)))


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_stay_finite(name):
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    for labels in ([0, 1], [1, 0]):
        loss = LOSSES[name](logits, soft_targets(torch.tensor(labels), 2))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()


def test_probabilities_are_those_that_the_loss_takes():
    logits = logits_of()
    for name in ("cross_entropy", "focal"):
        torch.testing.assert_close(probabilities(logits, name), logits.softmax(1))
        torch.testing.assert_close(probabilities(logits, name, 2.5), (logits / 2.5).softmax(1))
    torch.testing.assert_close(probabilities(logits.half(), "bce"), logits.half().float().sigmoid())
    torch.testing.assert_close(probabilities(logits, "bce", 0.5), (2 * logits).sigmoid())


def cases(rank: int, world: int) -> list:
    found = []
    for name in LOSSES:
        weight = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
        rows = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        targets = soft_targets(torch.arange(8) % 3, 3, 0.1).double()
        own = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = LOSSES[name](rows[own] @ weight, targets[own])
        loss.backward()
        gradient = weight.grad.clone()
        if world > 1:
            torch.distributed.all_reduce(gradient)
        found.append((loss.detach(), gradient / world))
    return found


def test_two_processes_equal_one():
    assert_processes_equal_one(cases, 2)
