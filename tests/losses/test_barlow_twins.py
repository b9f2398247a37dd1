"""Barlow Twins against loops in float64, the official main.py with its in-place all_reduce, closed forms, processes."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from losses.barlow_twins import barlow_twins
from tests.processes import run_processes


def by_loop(z, weight, eps=1e-5):
    """Float64 (B, V, D): image by image, dimension by dimension, pair by pair."""
    batch, views, width = z.shape
    columns = {}  # each dimension of each view, standardized
    for v in range(views):
        for i in range(width):
            column = [z[b, v, i] for b in range(batch)]
            mean = sum(column) / batch
            variance = sum((x - mean) ** 2 for x in column) / batch
            columns[v, i] = [(x - mean) / (variance + eps).sqrt() for x in column]
    pairs = [(v, w) for v in range(views) for w in range(v + 1, views)]
    total = 0.0
    for v, w in pairs:
        for i in range(width):
            for j in range(width):
                c = sum(x * y for x, y in zip(columns[v, i], columns[w, j])) / batch
                total = total + ((c - 1) ** 2 if i == j else weight * c**2)
    return total / len(pairs)


def official(z1, z2, norm, batch_size, weight, add_up):
    """forward of facebookresearch/barlowtwins main.py behind its projector, each operation in place as there."""
    c = norm(z1).T @ norm(z2)
    c.div_(batch_size)
    add_up(c)
    on_diag = torch.diagonal(c).add_(-1).pow_(2).sum()
    off_diag = c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:].flatten().pow_(2).sum()
    return on_diag + weight * off_diag


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("batch, width", [(1, 3), (2, 4), (5, 1), (5, 3)])
def test_equals_the_loop_with_its_gradient(views, batch, width):
    z = torch.randn(batch, views, width, dtype=torch.float64, requires_grad=True)
    loss, expected = barlow_twins(z, 0.03), by_loop(z, 0.03)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_equals_the_official_code_with_its_gradient():
    z = torch.randn(12, 2, 5, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm1d(5, affine=False).double()
    expected = official(z[:, 0], z[:, 1], norm, 12, 0.0051, lambda c: c)
    loss = barlow_twins(z)  # the default weight is the official one
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    alone = torch.autograd.grad(barlow_twins(z, gradient="official"), z)[0]  # 1 / W of it, W = 1
    torch.testing.assert_close(alone, ours, rtol=0, atol=0)


@pytest.mark.parametrize("gradient", ["exact", "official"])
def test_gradient(gradient):
    z = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: barlow_twins(z, 0.1, gradient=gradient), z)


@pytest.mark.parametrize("views", [2, 3])
def test_one_feature_in_all_dimensions_costs_each_pair_of_them_the_weight(views):
    z = 1e3 * torch.randn(9, 1, 1, dtype=torch.float64).expand(-1, views, 6)  # C = 1 everywhere; eps is nothing here
    torch.testing.assert_close(barlow_twins(z, 0.0051).item(), 0.0051 * 6 * 5, rtol=1e-9, atol=0)


def hadamard(order):
    rows = torch.ones(1, 1)
    while len(rows) < order:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


def test_views_that_agree_in_decorrelated_dimensions_cost_nothing_and_opposite_ones_four_each():
    z = hadamard(8)[:, 1:, None].transpose(1, 2)  # (8, 1, 7): each dimension has mean 0, variance 1; C = identity
    assert barlow_twins(z.expand(-1, 2, -1)).item() == pytest.approx(0, abs=1e-6)
    assert barlow_twins(torch.cat([z, -z], dim=1)).item() == pytest.approx(4 * 7, rel=1e-4)


def test_constant_embeddings_cost_one_for_each_dimension():
    for z in (torch.full((6, 2, 5), 3.0), torch.zeros(6, 2, 5), torch.randn(1, 2, 5)):  # the last: one image
        z.requires_grad_()
        loss = barlow_twins(z)
        loss.backward()
        assert loss.item() == pytest.approx(5, abs=1e-6)  # C = 0
        assert z.grad.isfinite().all()


def test_invariances():
    z = 100 * torch.randn(7, 2, 4, dtype=torch.float64)
    value = barlow_twins(z, 0.1)
    scale, shift = torch.rand(2, 4, dtype=torch.float64) + 0.5, torch.randn(2, 4, dtype=torch.float64)
    for same in (z.flip(1), z[torch.randperm(7)], z[..., torch.randperm(4)], z * torch.tensor([1, -1, -1, 1])):
        torch.testing.assert_close(barlow_twins(same, 0.1), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(barlow_twins(z * scale + shift, 0.1), value, rtol=1e-6, atol=0)  # up to eps
    assert not torch.isclose(barlow_twins(torch.stack([z[:, 0], z[:, 1].flip(0)], 1), 0.1), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    z = torch.randn(32, 2, 6).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = barlow_twins(z, 0.0051)
    assert loss.dtype == torch.float32
    exact = z.detach().double().requires_grad_()
    expected = by_loop(exact, 0.0051)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # a bf16 C would be wrong in the third digit
    theirs = torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], theirs.to(dtype), rtol=1e-2, atol=1e-5)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"two views or more, not \(3, 2\)"):
        barlow_twins(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"two views or more, not \(3, 1, 4\)"):
        barlow_twins(torch.ones(3, 1, 4))


class Total(torch.autograd.Function):
    """Sum over processes, and so is its gradient."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004
        return Total.forward(None, grad)


def sync_batch_norm(z):
    """torch's SyncBatchNorm without parameters, which is for GPUs only."""
    count = len(z) * dist.get_world_size()
    centered = z - Total.apply(z.sum(0)) / count
    return centered / (Total.apply(centered.square().sum(0)) / count + 1e-5).sqrt()


def on_a_shard(rank, world_size):
    """{case: (loss, gradient)} of a network some of whose embeddings this process has."""
    torch.manual_seed(3)
    images, network = torch.randn(8, 3, 6, dtype=torch.float64), nn.Linear(6, 5).double()
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    results = {}
    for case in ("exact", "official", "main.py", "three views") if world_size > 1 else ("exact", "three views"):
        model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
        z = model(images[mine] if case == "three views" else images[mine, :2])
        if case == "main.py":
            warnings.simplefilter("ignore")  # torch warns that autograd does not see the all_reduce, the very point
            loss = official(z[:, 0], z[:, 1], sync_batch_norm, 8, 0.1, dist.all_reduce)
        else:
            loss = barlow_twins(z, 0.1, gradient="official" if case == "official" else "exact")
        network.zero_grad()
        loss.backward()
        results[case] = loss.detach(), network.weight.grad.clone()
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one_and_in_the_official_code_a_share(world_size):
    alone = on_a_shard(0, 1)
    for results in run_processes(on_a_shard, world_size):
        for case, (loss, gradient) in results.items():
            expected, whole = alone["three views" if case == "three views" else "exact"]
            share = world_size if case in ("official", "main.py") else 1
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(gradient, whole / share, rtol=0, atol=1e-12)
