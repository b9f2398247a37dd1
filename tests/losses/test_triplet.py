"""The triplet loss against loops in float64, torch's TripletMarginLoss, angles on a circle, ties, and processes."""

import math

import pytest
import torch
from torch import nn

from losses.triplet import triplet
from tests.processes import run_processes

MINING = ["semi_hard", "hardest", "own"]


def by_loop(anchor, positive, negative, margin, mining):
    """Loss, mean distances and share of active images of float64 (B, D); semi_hard as in triplet_semihard_loss."""
    a, p, n = ([row / row.norm() for row in z] for z in (anchor, positive, negative))
    near, far = [(x - y).norm() for x, y in zip(a, p)], []
    for i, x in enumerate(a):
        distances = [(x - y).norm() for y in n]
        outside = [d for d in distances if d > near[i]]
        if mining == "own":
            far.append(distances[i])
        elif mining == "hardest":
            far.append(min(distances))
        else:
            far.append(min(outside) if outside else max(distances))
    each = [(d - e + margin).clamp(min=0) for d, e in zip(near, far)]
    active = sum(loss > 0 for loss in each) / len(each)
    return sum(each) / len(each), sum(near) / len(near), sum(far) / len(far), active


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_equals_the_loop_with_its_gradients(mining, batch, margin):
    z = [torch.randn(batch, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    loss, stats = triplet(*z, margin, mining=mining)
    expected, near, far, active = by_loop(*z, margin, mining)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats["positive_distance"], near.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats["negative_distance"], far.detach(), rtol=1e-12, atol=0)
    assert stats["active"].item() == pytest.approx(float(active))
    assert not any(value.requires_grad for value in stats.values())
    ours, theirs = (torch.autograd.grad(each, z) for each in (loss, expected))
    for mine, other in zip(ours, theirs):  # anchors, positives and negatives
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mining", MINING)
def test_gradient(mining):
    z = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: triplet(*z.unbind(1), 1.0, mining=mining)[0], z)


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_own_is_torchs_triplet_margin_loss_on_unit_vectors(margin):
    z = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = nn.TripletMarginLoss(margin, p=2, eps=1e-12)(*nn.functional.normalize(z, dim=2).unbind(1))
    loss, _ = triplet(*z.unbind(1), margin, mining="own")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def at(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.float64)


@pytest.mark.parametrize(
    "positive, mining, negative",
    [
        (60, "semi_hard", 90),  # the nearest of those outside the positive
        (20, "semi_hard", 30),
        (100, "semi_hard", 150),
        (170, "semi_hard", 150),  # none outside: the farthest
        (60, "hardest", 30),
        (170, "hardest", 30),
    ],
)
def test_which_negative_an_anchor_takes(positive, mining, negative):
    loss, stats = triplet(at(0, 0, 0), at(*[positive] * 3), at(150, 30, 90), 2.0, mining=mining)
    near, far = (2 * math.sin(math.radians(degrees) / 2) for degrees in (positive, negative))
    assert stats["negative_distance"].item() == pytest.approx(far, abs=1e-12)
    assert loss.item() == pytest.approx(near - far + 2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_at_the_place_of_the_positive_is_not_outside(dtype):
    anchor, positive = torch.randn(2, 5, 16, dtype=dtype).unbind(0)
    negative = torch.cat([positive[:4], -anchor[:1]])  # four anchors have their own negative there
    loss, stats = triplet(anchor, positive, negative, 0.2)
    expected, _, far, _ = by_loop(anchor.double(), positive.double(), negative.double(), 0.2, "semi_hard")
    assert stats["negative_distance"].item() == pytest.approx(far.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    same = positive[:1].expand(5, -1)
    loss, stats = triplet(anchor, same, same, 0.2)  # no negative is outside any positive: all are the farthest
    assert loss.item() == pytest.approx(0.2)
    assert stats["active"] == 1


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 128])
def test_one_embedding_for_all_costs_exactly_the_margin(mining, dtype, width):
    for _ in range(10):
        z = torch.randn(width, dtype=dtype).expand(6, 3, -1).clone().requires_grad_()
        loss, stats = triplet(*z.unbind(1), 0.25, mining=mining)
        assert loss == 0.25
        assert stats == {"positive_distance": 0, "negative_distance": 0, "active": 1}
        loss.backward()
        assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("mining", MINING)
def test_small_distances_are_not_lost_in_float32(mining):
    z = torch.randn(1, 1, 64) + 1e-4 * torch.randn(6, 3, 64)  # distances of about 2e-4
    loss, stats = triplet(*z.unbind(1), 1e-4, mining=mining)
    expected, near, far, _ = by_loop(*z.double().unbind(1), 1e-4, mining)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert stats["positive_distance"].item() == pytest.approx(near.item(), rel=0.01)
    assert stats["negative_distance"].item() == pytest.approx(far.item(), rel=0.01)


@pytest.mark.parametrize("mining", MINING)
def test_zeros_and_satisfied_triplets_have_finite_gradients(mining):
    zeros = torch.zeros(3, 3, 4, requires_grad=True)
    loss, _ = triplet(*zeros.unbind(1), 0.2, mining=mining)
    loss.backward()
    assert loss.item() == pytest.approx(0.2)
    assert zeros.grad.isfinite().all()
    z = torch.randn(3, 4, requires_grad=True)  # positives on their anchors
    loss, stats = triplet(z[:1], z[:1], -z[:1], 0.2, mining=mining)
    loss.backward()
    assert loss == stats["active"] == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("mining", MINING)
def test_invariances(mining):
    z, order = torch.randn(6, 3, 5, dtype=torch.float64), torch.randperm(6)
    value = triplet(*z.unbind(1), 0.3, mining=mining)[0]
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    for same in (z[order], z @ rotation, z * (torch.rand(6, 3, 1, dtype=torch.float64) + 0.5)):
        torch.testing.assert_close(triplet(*same.unbind(1), 0.3, mining=mining)[0], value)
    anchor, positive, negative = z.unbind(1)
    mixed = triplet(anchor, positive, negative.roll(1, 0), 0.3, mining=mining)[0]
    assert torch.isclose(mixed, value) == (mining != "own")  # who owns a negative matters to `own` alone


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(mining, dtype):
    z = torch.randn(8, 3, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = triplet(*z.unbind(1), 0.2, mining=mining)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_loop(*z.double().unbind(1), 0.2, mining)[0].item(), rel=1e-5)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\), \(3, 2\), \(4, 2\)"):
        triplet(torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 2), 0.2)
    with pytest.raises(ValueError, match=r"\(3, 2\), \(2, 2\), \(3, 2\)"):
        triplet(torch.ones(3, 2), torch.ones(2, 2), torch.ones(3, 2), 0.2)
    with pytest.raises(ValueError, match=r"three \(B, D\)"):
        triplet(*torch.ones(3, 2, 2, 2), 0.2)


def on_a_shard(rank, world_size):
    torch.manual_seed(3)
    images, network = torch.randn(8, 3, 6, dtype=torch.float64), nn.Linear(6, 5).double()
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    results = {}
    for mining in MINING:
        model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
        loss, _ = triplet(*model(images[mine]).unbind(1), 0.2, mining=mining)
        network.zero_grad()
        loss.backward()
        results[mining] = loss.detach(), network.weight.grad.clone()
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    alone, ranks = on_a_shard(0, 1), run_processes(on_a_shard, world_size)
    for mining, (loss, gradient) in alone.items():
        torch.testing.assert_close(sum(r[mining][0] for r in ranks) / world_size, loss, rtol=0, atol=1e-12)
        for result in ranks:
            torch.testing.assert_close(result[mining][1], gradient, rtol=0, atol=1e-12)
