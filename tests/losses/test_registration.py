"""RegAD's loss against a plain loop, where its gradient goes, and two processes with unequal parts against one."""

import math

import pytest
import torch
from torch import Tensor, nn

from losses.registration import symmetric_negative_cosine
from tests.processes import run_processes


def sides(batch: int = 3) -> list[Tensor]:
    """p1, z1, p2, z2."""
    return [torch.randn(batch, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def by_loop(p1: Tensor, z1: Tensor, p2: Tensor, z2: Tensor) -> Tensor:
    """Position by position; embeddings as plain numbers."""
    total, count = 0, 0
    for prediction, embedding in ((p1, z2), (p2, z1)):
        for b in range(len(prediction)):
            for y in range(prediction.shape[2]):
                for x in range(prediction.shape[3]):
                    p, z = prediction[b, :, y, x], embedding[b, :, y, x].tolist()
                    length = math.sqrt(sum(value * value for value in z))
                    total = total - sum(a * c for a, c in zip(p, z)) / (p.square().sum().sqrt() * length)
                    count += 1
    return total / count


@pytest.mark.parametrize("batch", [1, 3])
def test_loss_and_gradient_equal_the_loop(batch):
    given = sides(batch)
    ours, loop = symmetric_negative_cosine(*given), by_loop(*given)
    torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
    p1, z1, p2, z2 = given
    for a, b in zip(torch.autograd.grad(ours, [p1, p2]), torch.autograd.grad(loop, [p1, p2])):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    both = symmetric_negative_cosine(*given)
    assert torch.autograd.grad(both, [z1, z2], allow_unused=True) == (None, None)  # embeddings are targets only


def test_it_lies_between_the_same_direction_and_the_opposite_one():
    p1, z1, p2, z2 = (x.detach() for x in sides())
    assert symmetric_negative_cosine(2 * z2, z1, 3 * z1, z2).item() == pytest.approx(-1)
    assert symmetric_negative_cosine(-z2, z1, -z1, z2).item() == pytest.approx(1)
    nothing = torch.zeros_like(p1, requires_grad=True)
    loss = symmetric_negative_cosine(nothing, z1, nothing, z2)
    assert loss == 0 and torch.autograd.grad(loss, nothing)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"\(2, 5, 2, 3\)"):
        symmetric_negative_cosine(p1[:2], z1, p2, z2)


def test_float32_is_near_float64_also_inside_autocast():
    given = sides()
    exact = symmetric_negative_cosine(*given).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = symmetric_negative_cosine(*(x.float() for x in given))
        half = symmetric_negative_cosine(*(x.bfloat16() for x in given))
    assert loss.dtype == half.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, abs=1e-6) and half.item() == pytest.approx(exact, abs=0.01)


def example() -> tuple[list[Tensor], nn.Module]:
    torch.manual_seed(5)
    return [x.detach() for x in sides(5)], nn.Conv2d(5, 5, 1).double()


def on_a_shard(rank: int, world_size: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    (x1, z1, x2, z2), network = example()
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    model = nn.parallel.DistributedDataParallel(network)
    p1, p2 = model(torch.cat([x1[mine], x2[mine]])).chunk(2)
    loss = symmetric_negative_cosine(p1, z1[mine], p2, z2[mine])
    loss.backward()
    return loss.detach(), network.weight.grad


def test_two_processes_with_three_and_two_images_are_one_with_five():
    (x1, z1, x2, z2), network = example()
    p1, p2 = network(torch.cat([x1, x2])).chunk(2)
    loss = symmetric_negative_cosine(p1, z1, p2, z2)
    loss.backward()
    results = run_processes(on_a_shard, 2)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, loss.detach(), rtol=1e-12, atol=1e-12)
    for _, gradient in results:
        torch.testing.assert_close(gradient, network.weight.grad, rtol=1e-11, atol=1e-12)
