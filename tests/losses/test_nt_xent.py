"""NT-Xent against a loop over pairs in float64, closed forms, invariances, and two processes against one."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from losses.nt_xent import nt_xent
from tests.processes import assert_processes_equal_one

GAMMAS = [0.0, 0.5, 1.0, 2.0]


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def by_loop(z, temperature, bank=(), gamma=0.0):
    rows = [(i, view / view.norm()) for i, image in enumerate(z) for view in image]
    total, pairs = 0.0, 0
    for a, (image, anchor) in enumerate(rows):
        terms = {j: torch.exp(anchor @ other / temperature) for j, (_, other) in enumerate(rows) if j != a}
        repelled = [torch.exp(anchor @ other / temperature) for other in bank]
        for p, (other, _) in enumerate(rows):
            if p != a and other == image:
                rest = sum(term for j, term in terms.items() if j != p) + sum(repelled)
                whole = rest + terms[p]
                told_apart = (rest / whole).item() if rest == 0 else rest / whole  # 0^gamma has no gradient
                total = total - told_apart**gamma * torch.log(terms[p] / whole)
                pairs += 1
    assert pairs == z.shape[0] * z.shape[1] * (z.shape[1] - 1)
    return total / pairs


def assert_equals_the_loop(z, temperature, bank, gamma):
    z.requires_grad_()
    loss = nt_xent(z, temperature, bank=bank, gamma=gamma)
    expected = by_loop(z, temperature, () if bank is None else bank, gamma)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2, 4), (5, 2), (3, 3)])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rows", [0, 3])
def test_equals_the_loop_with_its_gradient(shape, temperature, gamma, rows):
    bank = unit(rows, 7) if rows else None
    assert_equals_the_loop(torch.randn(*shape, 7, dtype=torch.float64), temperature, bank, gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_ties(gamma):
    z = torch.randn(2, 3, 5, dtype=torch.float64)
    z[0, 1] = z[0, 0]  # a positive that is the anchor itself
    z[1, 2] = z[0, 0]  # and a negative
    assert_equals_the_loop(z[[0, 1, 0]], 0.1, F.normalize(z[:, 0], dim=1), gamma)


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equal_embeddings_cost_the_logarithm_of_the_number_of_others(rows, gamma):
    bank = torch.full((rows, 4), 0.5) if rows else None
    for batch, views in ((6, 2), (4, 3), (1, 4)):
        others = batch * views - 1 + rows
        loss = nt_xent(torch.ones(batch, views, 4), 0.5, bank=bank, gamma=gamma)
        assert loss.item() == pytest.approx((1 - 1 / others) ** gamma * math.log(others), abs=1e-6)


@pytest.mark.parametrize("views", [2, 3])
def test_images_at_right_angles(views):
    z = torch.eye(4)[:, None].expand(4, views, 4)
    others = (views - 1) * math.exp(1 / 0.3) + 3 * views
    assert nt_xent(z, 0.3).item() == pytest.approx(math.log(others) - 1 / 0.3, abs=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rows", [0, 3])
def test_gradient(gamma, rows):
    bank = unit(rows, 4) if rows else None
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.2, bank=bank, gamma=gamma), z)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_pair_told_apart_surely_costs_nothing_and_a_lost_one_stays_finite(gamma):
    axis = torch.tensor([1.0, 0.0])
    sure = torch.stack([axis, axis, -axis, -axis]).view(2, 2, 2).requires_grad_()  # p = 1 - 2 exp(-200)
    lost = torch.stack([axis, -axis, axis, -axis]).view(2, 2, 2).requires_grad_()  # p = exp(-200)
    alone = torch.randn(1, 2, 3, requires_grad=True)  # p = 1
    for z, value in ((sure, 0), (lost, 200), (alone, 0)):
        loss = nt_xent(z, 0.01, gamma=gamma)
        assert loss.item() == pytest.approx(value, abs=1e-3)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_invariances(gamma, views):
    z, bank = torch.randn(5, views, 7, dtype=torch.float64), unit(6, 7)
    value = nt_xent(z, 0.3, bank=bank, gamma=gamma)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    sizes = 10 * torch.rand(5, views, 1, dtype=torch.float64) + 0.1
    for same, rows in (
        (z[torch.randperm(5)], bank),
        (z.roll(1, 1), bank),
        (z.flip(1), bank),
        (sizes * z, bank),
        (z, bank.flip(0)),
        (z @ rotation, bank @ rotation),
    ):
        torch.testing.assert_close(nt_xent(same, 0.3, bank=rows, gamma=gamma), value, rtol=1e-12, atol=1e-12)
    mispaired = torch.cat([z[:, :1], z[[1, 0, 2, 3, 4], 1:]], dim=1)
    assert not torch.allclose(nt_xent(mispaired, 0.3, bank=bank, gamma=gamma), value)
    assert nt_xent(z, 0.3, gamma=gamma) < value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size, gamma", [(1, 0.0), (1, 0.5), (3000, 0.0)])  # float16's squares end at 65504
def test_low_precision_at_a_low_temperature(dtype, size, gamma):
    z, bank = (size * torch.randn(4, 3, 16)).to(dtype).requires_grad_(), unit(5, 16).float()
    with torch.autocast("cpu", dtype):
        loss = nt_xent(z, 0.04, bank=bank, gamma=gamma)
    exact = z.detach().double().requires_grad_()
    expected = by_loop(exact, 0.04, bank.double(), gamma)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(1024 * value, x)[0] for value, x in ((loss, z), (expected, exact)))
    torch.testing.assert_close(ours, theirs.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_the_bank_has_no_gradient_and_no_value_is_read_on_the_host():
    z, bank = torch.randn(2, 2, 3, requires_grad=True), unit(4, 3).requires_grad_()
    gradients = torch.autograd.grad(nt_xent(z, 0.3, bank=bank), [z, bank], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None
    with FakeTensorMode(), torch.device("cuda"):
        assert nt_xent(torch.randn(2, 3, 4), 0.3, bank=torch.randn(5, 4), gamma=0.5).device.type == "cuda"


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 4), (3, 2, 4, 4)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(f"two views or more, not {shape}")):
        nt_xent(torch.ones(shape), 0.5)


VARIANTS = [(2, 0, 0.0), (3, 0, 0.0), (2, 5, 0.0), (4, 5, 0.5)]  # views, rows of the bank, gamma


def on_a_shard(rank, world_size):
    results = []
    for views, rows, gamma in VARIANTS:
        torch.manual_seed(3)
        images, network = torch.randn(8, views, 6, dtype=torch.float64), nn.Linear(6, 5).double()
        bank = unit(rows, 5) if rows else None
        mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
        loss = nt_xent(model(images[mine]), 0.2, bank=bank, gamma=gamma)
        loss.backward()
        results.append((loss.detach(), network.weight.grad))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    assert_processes_equal_one(on_a_shard, world_size)
