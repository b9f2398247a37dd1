"""BYOL's and SimSiam's losses against loops over ordered pairs of views in float64, closed forms, and processes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from losses.siamese import byol, cross_view_cosine, simsiam
from tests.processes import assert_processes_equal_one

LOSSES = [cross_view_cosine, simsiam, byol]


def by_loop(predictions, targets):
    """Of the three losses; BYOL's from squared distances, as it is written in the paper."""
    cosine, distance, pairs = 0.0, 0.0, 0
    for p, z in zip(predictions, targets):
        for u in range(len(p)):
            for v in range(len(z)):
                if u != v:
                    one, other = p[u] / p[u].norm(), z[v] / z[v].norm()
                    cosine = cosine + one @ other
                    distance = distance + ((one - other) ** 2).sum()
                    pairs += 1
    return cosine / pairs, -cosine / pairs, 2 * distance / pairs


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_equal_the_loops_with_their_gradients(batch, views, tied):
    predictions, targets = torch.randn(2, batch, views, 7, dtype=torch.float64)
    if tied:  # two views predict the same, which is the target of both
        predictions[:, 1] = predictions[:, 0]
        targets[:, :2] = predictions[:, :2]
    predictions.requires_grad_()
    for loss_of, expected in zip(LOSSES, by_loop(predictions, targets)):
        loss = loss_of(predictions, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(x, predictions, retain_graph=True)[0] for x in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_with_two_views_they_are_the_official_losses():
    (p1, p2), (z1, z2) = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    p, z = torch.stack([p1, p2], dim=1), torch.stack([z1, z2], dim=1)
    cosine = nn.CosineSimilarity(dim=1)
    expected = -(cosine(p1, z2).mean() + cosine(p2, z1).mean()) * 0.5  # simsiam/main_simsiam.py
    torch.testing.assert_close(simsiam(p, z), expected, rtol=1e-12, atol=1e-12)
    normed = [F.normalize(x, dim=1) for x in (p1, p2, z1, z2)]
    regression = (normed[0] - normed[3]).square().sum(1) + (normed[1] - normed[2]).square().sum(1)
    torch.testing.assert_close(byol(p, z), regression.mean(), rtol=1e-12, atol=1e-12)  # byol_experiment.py


@pytest.mark.parametrize("views", [2, 3])
def test_opposite_orthogonal_and_equal_views(views):
    targets = torch.eye(4)[:1].expand(5, views, 4)
    for predictions, cosine in ((-targets, -1.0), (targets.roll(1, 2), 0.0), (targets, 1.0)):
        assert cross_view_cosine(predictions, targets).item() == pytest.approx(cosine, abs=1e-6)
        assert simsiam(predictions, targets).item() == pytest.approx(-cosine, abs=1e-6)  # 1, 0, -1
        assert byol(predictions, targets).item() == pytest.approx(4 - 4 * cosine, abs=1e-6)  # 8, 4, 0


def test_a_view_is_not_compared_with_itself():
    predictions = torch.eye(3)[None]  # three views at right angles
    assert cross_view_cosine(predictions, predictions).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss_of", LOSSES)
def test_gradient(loss_of):
    predictions, targets = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: loss_of(p, targets), predictions.requires_grad_())


@pytest.mark.parametrize("loss_of", LOSSES)
@pytest.mark.parametrize("views", [2, 3, 4])
def test_invariances(loss_of, views):
    predictions, targets = torch.randn(2, 5, views, 7, dtype=torch.float64)
    value, order = loss_of(predictions, targets), torch.randperm(5)
    sizes = 10 * torch.rand(2, 5, views, 1, dtype=torch.float64) + 0.1
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    for same in (
        (predictions[order], targets[order]),
        (predictions.flip(1), targets.flip(1)),
        (predictions.roll(1, 1), targets.roll(1, 1)),
        (sizes[0] * predictions, sizes[1] * targets),
        (predictions @ rotation, targets @ rotation),
        (targets, predictions),  # each pair is met in both orders
    ):
        torch.testing.assert_close(loss_of(*same), value, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(loss_of(predictions, targets[[1, 0, 2, 3, 4]]), value)
    assert not torch.allclose(loss_of(predictions, targets.roll(1, 1)), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3000])  # float16's squares end at 65504
def test_low_precision(dtype, size):
    predictions, targets = (size * torch.randn(2, 6, 3, 16)).to(dtype)
    predictions.requires_grad_()
    exact = predictions.detach().double().requires_grad_()
    for loss_of, expected in zip(LOSSES, by_loop(exact, targets.double())):
        with torch.autocast("cpu", dtype):
            loss = loss_of(predictions, targets)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        ours = torch.autograd.grad(1024 * loss, predictions)[0]
        theirs = torch.autograd.grad(1024 * expected, exact, retain_graph=True)[0]
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("loss_of", LOSSES)
def test_targets_have_no_gradient_and_no_value_is_read_on_the_host(loss_of):
    predictions, targets = (torch.randn(3, 2, 4, requires_grad=True) for _ in range(2))
    gradients = torch.autograd.grad(loss_of(predictions, targets), [predictions, targets], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None
    with FakeTensorMode(), torch.device("cuda"):
        assert loss_of(torch.randn(2, 3, 4), torch.randn(2, 3, 4)).is_cuda


@pytest.mark.parametrize("loss_of", LOSSES)
def test_wrong_shapes(loss_of):
    for predictions, targets, shapes in (
        ((3, 2, 4), (3, 3, 4), r"\(3, 2, 4\) and \(3, 3, 4\)"),
        ((3, 1, 4), (3, 1, 4), r"\(3, 1, 4\) and \(3, 1, 4\)"),
        ((3, 4), (3, 4), r"\(3, 4\) and \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=shapes):
            loss_of(torch.ones(predictions), torch.ones(targets))


def on_a_shard(rank, world_size):
    mine, results = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size), []
    for loss_of in (simsiam, byol):
        for views in (2, 3):
            torch.manual_seed(3)
            images, targets = torch.randn(8, views, 6).double(), torch.randn(8, views, 5).double()
            network = nn.Linear(6, 5).double()
            model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
            loss = loss_of(model(images[mine]), targets[mine])
            loss.backward()
            results.append((loss.detach(), network.weight.grad))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    assert_processes_equal_one(on_a_shard, world_size)
