"""The log-likelihood per channel against scipy, the loss and its gradient against a plain loop, processes, extremes."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from losses.flow_likelihood import flow_likelihood, log_density
from tests.processes import run_processes


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_density_is_the_normal_density_of_z_times_the_determinant(channels):
    z, log_det = torch.randn(5, channels, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    normal = multivariate_normal(mean=[0.0] * channels)
    expected = [(normal.logpdf(row) + float(d)) / channels for row, d in zip(z.numpy(), log_det)]
    torch.testing.assert_close(log_density(z, log_det), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 6])
def test_loss_and_gradient_equal_the_loop(count):
    z = torch.randn(count, 4, dtype=torch.float64).requires_grad_()
    log_det = (3 * torch.randn(count, dtype=torch.float64)).requires_grad_()
    ours = flow_likelihood(log_density(z, log_det))
    loop = 0
    for row, det in zip(z, log_det):
        per_channel = (4 * -0.9189385332046727 - 0.5 * sum(v**2 for v in row) + det) / 4
        loop = loop - torch.log(1 / (1 + torch.exp(-per_channel))) / count
    torch.testing.assert_close(ours, loop)
    for a, b in zip(torch.autograd.grad(ours, (z, log_det)), torch.autograd.grad(loop, (z, log_det))):
        torch.testing.assert_close(a, b)


def test_unlikely_and_likely_vectors_are_finite():
    for value, loss, slope in ((-1e6, 1e6, -1.0), (1e6, 0.0, 0.0), (0.0, math.log(2), -0.5)):
        density = torch.tensor([value], requires_grad=True)
        found = flow_likelihood(density)
        assert found.item() == pytest.approx(loss)
        assert torch.autograd.grad(found, density)[0].item() == pytest.approx(slope)


def test_float32_is_near_float64_also_inside_autocast():
    z, log_det = torch.randn(50, 512, dtype=torch.float64), 100 * torch.randn(50, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_density(z.float(), log_det.float())
        half = log_density(z.bfloat16(), log_det.bfloat16())
    assert found.dtype == half.dtype == torch.float32
    torch.testing.assert_close(found.double(), log_density(z, log_det), rtol=1e-5, atol=1e-5)


def on_a_shard(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, network = torch.randn(8, 3, dtype=torch.float64), nn.Linear(3, 3).double()
    model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    z = model(x[mine])
    loss = flow_likelihood(log_density(z, z.sum(1)))
    loss.backward()
    return loss.detach(), network.weight.grad


def test_two_processes_have_the_loss_and_the_gradient_of_one():
    loss, gradient = on_a_shard(0, 1)
    results = run_processes(on_a_shard, 2)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, loss)
    for _, each in results:
        torch.testing.assert_close(each, gradient)
