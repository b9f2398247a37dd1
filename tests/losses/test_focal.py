"""The focal term against exact decimal arithmetic, value and gradient, from p = 0 to p = 1."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from losses.focal import focal

getcontext().prec = 60
LOG_P = [-1e-9, -1e-4, -0.3, -math.log(2), -1.0, -4.0, -30.0, -800.0]


def exact(log_p, gamma):
    """-(1 - p)^gamma log p and its derivative by log p, of one float."""
    log_p, gamma = Decimal(log_p), Decimal(gamma)
    p = log_p.exp()
    value = -((1 - p) ** gamma) * log_p
    return float(value), float(gamma * p * (1 - p) ** (gamma - 1) * log_p - (1 - p) ** gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype, precision", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_exact_arithmetic_with_its_gradient(gamma, dtype, precision):
    log_p = torch.tensor(LOG_P, dtype=dtype, requires_grad=True)
    value = focal(log_p, gamma)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    values, gradients = torch.tensor([exact(x, gamma) for x in log_p.tolist()], dtype=dtype).T
    torch.testing.assert_close(value, values, rtol=precision, atol=1e-40)
    torch.testing.assert_close(gradient, gradients, rtol=precision, atol=1e-40)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_p_one_value_and_gradient_vanish(gamma, dtype):
    log_p = torch.tensor([0.0, -1e-30, -1e-16, -1e-13, -1e-12, -2e-12, -1e-11], dtype=dtype, requires_grad=True)
    value = focal(log_p, gamma)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert value.min() >= 0 and value.max() < 1e-11
    assert gradient.abs().max() < 1e-5  # NaN is not


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_at_p_zero_it_is_the_cross_entropy(gamma):
    log_p = torch.tensor([-110.0, -1e4, -1e30], requires_grad=True)  # p is 0 in float32
    value = focal(log_p, gamma)
    assert torch.equal(value, -log_p)
    assert torch.equal(torch.autograd.grad(value.sum(), log_p)[0], -torch.ones(3))


def test_gamma_zero_is_the_cross_entropy():
    log_p = torch.tensor([[0.0, -1.5], [-3.0, -200.0]])
    assert torch.equal(focal(log_p, 0), -log_p) and torch.equal(focal(log_p, 0.0), -log_p)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradient(gamma):
    log_p = -torch.rand(2, 5, dtype=torch.float64) - 0.01
    assert torch.autograd.gradcheck(lambda x: focal(x, gamma), log_p.requires_grad_())


def test_pairs_told_apart_already_count_less():
    log_p = torch.tensor([0.9, 0.5, 0.1]).log()
    share = focal(log_p, 2) / focal(log_p, 0)
    torch.testing.assert_close(share, torch.tensor([0.01, 0.25, 0.81]))
