"""MoCo's losses against loops over images in float64, the official cross-entropies, closed forms, and processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from losses.info_nce import batch_nce, queue_nce
from tests.processes import assert_processes_equal_one

GAMMAS = [0.0, 0.5, 1.0, 2.0]


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def term(query, positive, negatives, temperature, gamma):
    """-(1 - p)^gamma log p of one image; 1 - p without cancellation."""
    query, positive = query / query.norm(), positive / positive.norm()
    own = torch.exp(query @ positive / temperature)
    rest = sum(torch.exp(query @ (other / other.norm()) / temperature) for other in negatives)
    told_apart = rest / (own + rest) if len(negatives) else 0.0  # 0^gamma of a tensor has no gradient
    return -(told_apart**gamma) * torch.log(own / (own + rest))


def queue_by_loop(queries, keys, queue, temperature, gamma=0.0):
    return sum(term(q, k, queue, temperature, gamma) for q, k in zip(queries, keys)) / len(queries)


def batch_by_loop(queries, keys, temperature, gamma=0.0):
    total = 0.0
    for i, query in enumerate(queries):
        total = total + term(query, keys[i], [k for j, k in enumerate(keys) if j != i], temperature, gamma)
    return 2 * temperature * total / len(queries)


def assert_same_with_gradient(loss, expected, queries):
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, queries)[0] for each in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equal_the_loops_with_their_gradients(batch, temperature, gamma):
    queries, keys = torch.randn(2, batch, 7, dtype=torch.float64)
    queries.requires_grad_()
    for rows in (1, 6):
        queue = unit(rows, 7)
        loss = queue_nce(queries, keys, queue, temperature, gamma=gamma)
        assert_same_with_gradient(loss, queue_by_loop(queries, keys, queue, temperature, gamma), queries)
    loss = batch_nce(queries, keys, temperature, gamma=gamma)
    assert_same_with_gradient(loss, batch_by_loop(queries, keys, temperature, gamma), queries)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_ties(gamma):
    """Queries that are their own keys, keys that are equal, and keys that the queue already holds."""
    keys = torch.randn(4, 5, dtype=torch.float64)[[0, 1, 0, 2]]
    queries = keys.clone().requires_grad_()
    queue = F.normalize(keys, dim=1)
    loss = queue_nce(queries, keys, queue, 0.2, gamma=gamma)
    assert_same_with_gradient(loss, queue_by_loop(queries, keys, queue, 0.2, gamma), queries)
    loss = batch_nce(queries, keys, 0.2, gamma=gamma)
    assert_same_with_gradient(loss, batch_by_loop(queries, keys, 0.2, gamma), queries)


def test_equal_the_official_cross_entropies():
    q, k, queue = unit(6, 8), unit(6, 8), unit(10, 8)
    l_pos, l_neg = torch.einsum("nc,nc->n", q, k)[:, None], torch.einsum("nc,ck->nk", q, queue.T)
    expected = F.cross_entropy(torch.cat([l_pos, l_neg], dim=1) / 0.07, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(queue_nce(3 * q, 0.5 * k, queue, 0.07), expected, rtol=1e-12, atol=1e-12)
    expected = F.cross_entropy(torch.einsum("nc,mc->nm", q, k) / 0.2, torch.arange(6)) * (2 * 0.2)
    torch.testing.assert_close(batch_nce(3 * q, 0.5 * k, 0.2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_equal_embeddings_cost_the_logarithm_of_the_number_of_keys(gamma):
    ones = torch.ones(6, 4)
    for terms, loss, factor in (
        (1 + 9, queue_nce(ones, ones, torch.full((9, 4), 0.5), 0.2, gamma=gamma), 1),
        (6, batch_nce(ones, ones, 0.2, gamma=gamma), 2 * 0.2),
        (1, batch_nce(ones[:1], ones[:1], 0.2, gamma=gamma), 2 * 0.2),
    ):
        assert loss.item() == pytest.approx(factor * (1 - 1 / terms) ** gamma * math.log(terms), abs=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient(gamma):
    queries, keys = torch.randn(2, 4, 5, dtype=torch.float64)
    queries, queue = queries.requires_grad_(), unit(3, 5)
    assert torch.autograd.gradcheck(lambda q: queue_nce(q, keys, queue, 0.2, gamma=gamma), queries)
    assert torch.autograd.gradcheck(lambda q: batch_nce(q, keys, 0.2, gamma=gamma), queries)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_key_found_surely_costs_nothing_and_a_lost_one_stays_finite(gamma):
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for keys, cost in ((queries, 0), (-queries, 200)):  # p = 1 - exp(-200), p = exp(-200)
        leaf = queries.clone().requires_grad_()
        found = queue_nce(leaf[:1], keys[:1], -keys[:1], 0.01, gamma=gamma)
        for loss, factor in ((found, 1), (batch_nce(leaf, keys, 0.01, gamma=gamma), 0.02)):
            assert loss.item() == pytest.approx(factor * cost, abs=1e-3)
            assert torch.autograd.grad(loss, leaf)[0].isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_invariances(gamma):
    (queries, keys), queue = torch.randn(2, 5, 7, dtype=torch.float64), unit(6, 7)
    order, sizes = torch.randperm(5), 10 * torch.rand(2, 5, 1, dtype=torch.float64) + 0.1
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    one, other = queue_nce(queries, keys, queue, 0.3, gamma=gamma), batch_nce(queries, keys, 0.3, gamma=gamma)
    for q, k, rows in (
        (queries[order], keys[order], queue.flip(0)),
        (sizes[0] * queries, sizes[1] * keys, queue),
        (queries @ rotation, keys @ rotation, queue @ rotation),
    ):
        torch.testing.assert_close(queue_nce(q, k, rows, 0.3, gamma=gamma), one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(batch_nce(q, k, 0.3, gamma=gamma), other, rtol=1e-12, atol=1e-12)
    mispaired = keys[[1, 0, 2, 3, 4]]
    assert not torch.allclose(queue_nce(queries, mispaired, queue, 0.3, gamma=gamma), one)
    assert not torch.allclose(batch_nce(queries, mispaired, 0.3, gamma=gamma), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size, gamma", [(1, 0.0), (1, 0.5), (3000, 0.0)])  # float16's squares end at 65504
def test_low_precision_at_a_low_temperature(dtype, size, gamma):
    queries, keys = (size * torch.randn(2, 6, 16)).to(dtype)
    queries, queue = queries.requires_grad_(), unit(9, 16).float()
    exact = queries.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype):
        losses = queue_nce(queries, keys, queue, 0.04, gamma=gamma), batch_nce(queries, keys, 0.04, gamma=gamma)
    expected = (
        queue_by_loop(exact, keys.double(), queue.double(), 0.04, gamma),
        batch_by_loop(exact, keys.double(), 0.04, gamma),
    )
    for loss, value in zip(losses, expected):
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(value.item(), rel=1e-5)
        ours, theirs = (torch.autograd.grad(1024 * y, x)[0] for y, x in ((loss, queries), (value, exact)))
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_keys_and_queue_have_no_gradient_and_no_value_is_read_on_the_host():
    queries, keys, queue = (torch.randn(4, 3, requires_grad=True) for _ in range(3))
    for loss in (queue_nce(queries, keys, queue, 0.3), batch_nce(queries, keys, 0.3)):
        gradients = torch.autograd.grad(loss, [queries, keys, queue], allow_unused=True)
        assert gradients[0].abs().sum() > 0 and gradients[1] is None and gradients[2] is None
    with FakeTensorMode(), torch.device("cuda"):
        assert queue_nce(torch.randn(2, 3), torch.randn(2, 3), torch.randn(5, 3), 0.3, gamma=0.5).is_cuda
        assert batch_nce(torch.randn(2, 3), torch.randn(2, 3), 0.3, gamma=0.5).is_cuda


def test_wrong_shapes():
    for queries, keys, shapes in (
        (torch.ones(3, 2), torch.ones(4, 2), r"\(3, 2\) and \(4, 2\)"),
        (torch.ones(3, 2), torch.ones(3, 1), r"\(3, 2\) and \(3, 1\)"),
        (torch.ones(3), torch.ones(3), r"\(3,\) and \(3,\)"),
        (torch.ones(3, 2, 4), torch.ones(3, 2, 4), r"\(3, 2, 4\) and \(3, 2, 4\)"),
    ):
        with pytest.raises(ValueError, match="queue_nce needs two .* not " + shapes):
            queue_nce(queries, keys, torch.ones(5, 2), 0.5)
        with pytest.raises(ValueError, match="batch_nce needs two .* not " + shapes):
            batch_nce(queries, keys, 0.5)


def on_a_shard(rank, world_size):
    mine, results = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size), []
    for gamma in (0.0, 0.5):
        for form in ("queue", "batch"):
            torch.manual_seed(3)
            views, network = torch.randn(2, 8, 6, dtype=torch.float64), nn.Linear(6, 5).double()
            queue, key_weight = unit(7, 5), torch.randn(6, 5, dtype=torch.float64)
            model = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network
            queries, keys = model(views[0, mine]), views[1, mine] @ key_weight
            if form == "queue":
                loss = queue_nce(queries, keys, queue, 0.2, gamma=gamma)
            else:
                loss = batch_nce(queries, keys, 0.2, gamma=gamma)
            loss.backward()
            results.append((loss.detach(), network.weight.grad))
    return results


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradient_of_one(world_size):
    assert_processes_equal_one(on_a_shard, world_size)
