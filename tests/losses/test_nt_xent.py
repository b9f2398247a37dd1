"""NT-Xent against a loop over anchors in float64, closed forms, invariances, and two processes against one."""

import math

import pytest
import torch
from torch import nn

from losses.nt_xent import nt_xent
from tests.processes import run_processes


def by_loop(z1, z2, temperature):
    z = [row / row.norm() for row in torch.cat([z1, z2])]
    n, total = len(z1), 0.0
    for i in range(2 * n):
        terms = {j: torch.exp(z[i] @ z[j] / temperature) for j in range(2 * n) if j != i}
        total = total - torch.log(terms[(i + n) % (2 * n)] / sum(terms.values()))
    return total / (2 * n)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_equals_the_loop(batch, temperature):
    z1, z2 = torch.randn(2, batch, 7, dtype=torch.float64)
    torch.testing.assert_close(nt_xent(z1, z2, temperature), by_loop(z1, z2, temperature), rtol=1e-12, atol=1e-12)


def test_equal_embeddings_cost_the_logarithm_of_the_number_of_others():
    z = torch.ones(6, 4)
    assert nt_xent(z, z, 0.5).item() == pytest.approx(math.log(2 * 6 - 1), abs=1e-6)


def test_gradient():
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z[0], z[1], 0.2), z)


def test_invariances():
    z1, z2 = torch.randn(2, 5, 7, dtype=torch.float64)
    value, order = nt_xent(z1, z2, 0.3), torch.randperm(5)
    torch.testing.assert_close(nt_xent(z2, z1, 0.3), value)
    torch.testing.assert_close(nt_xent(z1[order], z2[order], 0.3), value)
    torch.testing.assert_close(nt_xent(3 * z1, 0.1 * z2, 0.3), value)
    assert not torch.allclose(nt_xent(z1, z2[[1, 0, 2, 3, 4]], 0.3), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_at_a_low_temperature(dtype):
    z1, z2 = torch.randn(2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1.to(dtype), z2.to(dtype), 0.04)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loop(z1.to(dtype).double(), z2.to(dtype).double(), 0.04).item(), rel=1e-5)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(4, 2\)"):
        nt_xent(torch.ones(3, 2), torch.ones(4, 2), 0.5)


def example():
    torch.manual_seed(3)
    images = torch.randn(2, 8, 6, dtype=torch.float64)
    return images, nn.Linear(6, 5).double()


def on_a_shard(rank, world_size):
    (view1, view2), network = example()
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    model = nn.parallel.DistributedDataParallel(network)
    loss = nt_xent(model(view1[mine]), model(view2[mine]), 0.2)
    loss.backward()
    return loss.detach(), network.weight.grad


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    (view1, view2), network = example()
    loss = nt_xent(network(view1), network(view2), 0.2)
    loss.backward()
    results = run_processes(on_a_shard, world_size)
    torch.testing.assert_close(sum(r[0] for r in results) / world_size, loss.detach(), rtol=0, atol=1e-12)
    for _, grad in results:
        torch.testing.assert_close(grad, network.weight.grad, rtol=0, atol=1e-12)
