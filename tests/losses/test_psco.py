"""PsCo: Sinkhorn and the loss against plain loops after the official models.py, ties, extremes, and processes."""

import math

import pytest
import torch
from torch import nn

from losses.psco import psco
from losses.sinkhorn import sinkhorn
from tests.processes import run_processes


def sinkhorn_by_loop(similarities, epsilon=0.05, iterations=3):
    """distributed_sinkhorn of alinlab/PsCo models.py with normalization='row', on lists of Python's float64."""
    q = [[math.exp(s / epsilon) for s in row] for row in similarities.tolist()]
    images, rows = range(len(q)), range(len(q[0]))
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        for k in rows:
            column = sum(q[b][k] for b in images)
            for b in images:
                q[b][k] = q[b][k] / column / len(rows)
        for b in images:
            whole = sum(q[b])
            q[b] = [x / whole / len(images) for x in q[b]]
    return [[x * len(images) for x in row] for row in q]


def shots_by_loop(keys, queue, shots):
    """For each of the float64 keys (B, D) the rows of the queue (K, D) most assigned to it, the first one first."""
    assigned = sinkhorn_by_loop(
        torch.tensor([[(key @ row / key.norm()).item() for row in queue] for key in keys], dtype=torch.float64)
    )
    return [sorted(range(len(queue)), key=lambda r: -row[r])[:shots] for row in assigned]


def by_loop(queries, queue, chosen, temperature):
    """Loss of float64 (B, D) and (K, D), given each image's shots."""
    total = 0.0
    for query, mine in zip(queries, chosen):
        logits = [query @ row / query.norm() / temperature for row in queue]
        everyone = sum(torch.exp(logits[r]) for rows in chosen for r in rows)
        total = total + everyone.log() - sum(logits[r] for r in mine) / len(mine)
    return total / len(queries)


def unit(*shape, dtype=torch.float64):
    return nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 6), (4, 1), (2, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("epsilon, iterations", [(0.05, 3), (0.05, 1), (0.3, 10)])
def test_sinkhorn_equals_the_loop(batch, length, epsilon, iterations):
    similarities = unit(batch, 8) @ unit(length, 8).T
    ours = sinkhorn(similarities, epsilon=epsilon, iterations=iterations)
    expected = torch.tensor(sinkhorn_by_loop(similarities, epsilon, iterations), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(ours.sum(1), torch.ones(batch, dtype=torch.float64), rtol=1e-12, atol=0)


def test_sinkhorn_uses_all_rows_alike_in_the_end():
    q = sinkhorn(unit(6, 4) @ unit(10, 4).T, epsilon=0.2, iterations=200)
    torch.testing.assert_close(q.sum(0), torch.full((10,), 6 / 10, dtype=torch.float64))
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=torch.float64))


def test_sinkhorn_ignores_a_rows_or_images_offset_and_shares_ties():
    similarities = unit(5, 4) @ unit(7, 4).T
    ours = sinkhorn(similarities, iterations=200)
    offset = 0.1 * torch.randn(5, 1, dtype=torch.float64) + 0.1 * torch.randn(1, 7, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(similarities + offset, iterations=200), ours, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(sinkhorn(torch.full((3, 8), 0.9)), torch.full((3, 8), 1 / 8))
    tied = sinkhorn(similarities[:, [0, 0, 1]])
    assert torch.equal(tied[:, 0], tied[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sinkhorn_of_extreme_similarities_is_finite(dtype):
    similarities = torch.full((4, 6), -1.0, dtype=dtype)  # exp(-100) and exp(100): 0 and infinite in float32
    similarities[0, 0] = similarities[1, 1] = similarities[1, 2] = 1
    q = sinkhorn(similarities, epsilon=0.01)
    assert q.dtype == torch.float32
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(4))
    expected = torch.tensor(sinkhorn_by_loop(similarities.double(), 0.01))
    torch.testing.assert_close(q, expected.float(), rtol=1e-4, atol=1e-6)
    for sign in (1, -1):
        torch.testing.assert_close(sinkhorn(torch.full((4, 6), float(sign)), epsilon=0.01), torch.full((4, 6), 1 / 6))


@pytest.mark.parametrize("shots", [1, 3, 12])
@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_equals_the_loop_with_its_gradient(shots, batch, temperature):
    queries, keys = torch.randn(2, batch, 5, dtype=torch.float64).unbind(0)
    queries, keys, queue = queries.requires_grad_(), keys.requires_grad_(), unit(12, 5)
    loss, rows = psco(queries, keys, queue, shots=shots, temperature=temperature)
    assert rows.tolist() == shots_by_loop(keys, queue, shots)
    expected = by_loop(queries, queue, rows.tolist(), temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, queries, retain_graph=True)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    loss.backward()
    assert keys.grad is None  # the assignments are labels


def test_one_image_has_any_shots():
    query, key, queue = unit(1, 5), unit(1, 5), unit(12, 5)
    q = sinkhorn(key @ queue.T)  # it shares itself out among all rows alike, so that no row is nearer than another
    torch.testing.assert_close(q, torch.full((1, 12), 1 / 12, dtype=torch.float64))
    loss, rows = psco(query, key, queue, shots=3)
    torch.testing.assert_close(loss, by_loop(query, queue, rows.tolist(), 1.0))


def test_gradient():
    queries, keys, queue = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), unit(4, 3), unit(9, 3)
    assert torch.autograd.gradcheck(lambda q: psco(q, keys, queue, shots=2, temperature=0.3)[0], queries)


def test_the_number_of_iterations_is_sinkhorns():
    keys, queue = unit(8, 3), unit(20, 3)
    for iterations in (1, 3, 50):
        _, rows = psco(unit(8, 3), keys, queue, shots=4, iterations=iterations)
        assert torch.equal(rows, sinkhorn(keys @ queue.T, iterations=iterations).topk(4).indices)


@pytest.mark.parametrize("shots", [1, 4])
def test_a_queue_of_one_embedding_costs_the_logarithm_of_the_number_of_shots(shots):
    queries, keys = torch.randn(2, 5, 6).unbind(0)
    queries.requires_grad_()
    loss, rows = psco(queries, keys, unit(1, 6, dtype=torch.float32).expand(9, -1), shots=shots)
    assert loss.item() == pytest.approx(math.log(5 * shots), abs=1e-5)
    assert rows.shape == (5, shots)
    assert all(len(set(row)) == shots and set(row) <= set(range(9)) for row in rows.tolist())
    loss.backward()
    assert queries.grad.abs().max() < 1e-6


def test_zeros_are_finite():
    queries = torch.zeros(3, 4, requires_grad=True)
    loss, _ = psco(queries, torch.zeros(3, 4), torch.zeros(5, 4), shots=2)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3 * 2))
    assert queries.grad.isfinite().all()


def test_invariances():
    queries, keys, queue = unit(6, 5), unit(6, 5), unit(12, 5)
    value, rows = psco(queries, keys, queue, shots=3)
    order, places = torch.randperm(6), torch.randperm(12)
    torch.testing.assert_close(psco(3 * queries, 0.1 * keys, queue, shots=3)[0], value)
    permuted, permuted_rows = psco(queries[order], keys[order], queue, shots=3)
    torch.testing.assert_close(permuted, value)
    assert torch.equal(permuted_rows, rows[order])
    moved, moved_rows = psco(queries, keys, queue[places], shots=3)
    torch.testing.assert_close(moved, value)
    assert torch.equal(places[moved_rows], rows)
    assert not torch.isclose(psco(queries.flip(0), keys, queue, shots=3)[0], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_at_a_low_temperature(dtype):
    queries, keys, queue = torch.randn(6, 8).to(dtype), torch.randn(6, 8).to(dtype), unit(12, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rows = psco(queries, keys, queue, shots=2, temperature=0.04)
    assert loss.dtype == torch.float32
    assert rows.tolist() == shots_by_loop(keys.double(), queue.double(), 2)
    expected = by_loop(queries.double(), queue.double(), rows.tolist(), 0.04)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\), \(4, 2\)"):
        psco(torch.ones(3, 2), torch.ones(4, 2), torch.ones(9, 2), shots=1)
    with pytest.raises(ValueError, match="4 of 3"):
        psco(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 2), shots=4)
    with pytest.raises(ValueError, match="two"):
        psco(torch.ones(3, 2, 2), torch.ones(3, 2, 2), torch.ones(9, 2), shots=1)


def on_a_shard(rank, world_size):
    torch.manual_seed(3)
    views, queue, network = torch.randn(2, 8, 6, dtype=torch.float64), unit(20, 5), nn.Linear(6, 5).double()
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    with torch.no_grad():
        keys = network(views[1])
    model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
    loss, rows = psco(model(views[0, mine]), keys[mine], queue, shots=3, temperature=0.5)
    loss.backward()
    assigned = sinkhorn(nn.functional.normalize(keys, dim=1)[mine] @ queue.T, epsilon=0.01, iterations=5)
    return loss.detach(), network.weight.grad, rows, assigned


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_shots_and_the_gradient_of_one(world_size):
    loss, gradient, rows, assigned = on_a_shard(0, 1)
    results = run_processes(on_a_shard, world_size)
    torch.testing.assert_close(torch.cat([r[3] for r in results]), assigned, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.cat([r[2] for r in results]), rows)
    torch.testing.assert_close(sum(r[0] for r in results) / world_size, loss, rtol=0, atol=1e-12)
    for result in results:
        torch.testing.assert_close(result[1], gradient, rtol=0, atol=1e-12)
