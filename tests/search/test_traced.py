"""The search that torch.export traces, against a loop of float64 differences."""

import pytest
import torch
from torch import Tensor

from search import traced
from search.nearest import nearest_squared
from search.traced import traced_nearest


def by_loop(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = []
    for query in queries.double():
        squared = [float(((query - entry) ** 2).sum()) for entry in bank.double()]
        rows.append(sorted(range(len(bank)), key=lambda j: (squared[j], j))[:k])
    found = torch.tensor(rows)
    differences = queries.double()[:, None] - bank.double()[found]
    return differences.square().sum(2), found


@pytest.mark.parametrize("block", [7, 2**13])
@pytest.mark.parametrize("k", [1, 3])
def test_neighbors_are_those_of_a_loop(k, block, monkeypatch):
    monkeypatch.setattr(traced, "BLOCK", block)
    bank = torch.randn(40, 12) + 50  # far from the origin, where products lose digits
    queries = torch.cat([torch.randn(9, 12) + 50, bank[[3, 39]]])
    squared, index = traced_nearest(queries, bank, k)
    assert squared.dtype == torch.float64 and index.dtype == torch.int64
    expected, neighbors = by_loop(queries, bank, k)
    assert torch.equal(index, neighbors) and torch.equal(index, nearest_squared(queries, bank, k)[1])
    assert torch.allclose(squared, expected, rtol=1e-12, atol=0)
    assert (squared[9:, 0] == 0).all()


def test_ties_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setattr(traced, "BLOCK", 2)
    bank = torch.tensor([[1.0], [3.0], [1.0], [3.0], [1.0]])
    assert traced_nearest(torch.tensor([[2.0]]), bank, 3)[1].tolist() == [[0, 1, 2]]
    assert traced_nearest(torch.tensor([[1.0]]), bank, 2)[1].tolist() == [[0, 2]]


def test_banks_of_one_entry_no_query_and_float64():
    squared, index = traced_nearest(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]), 1)
    assert (squared.item(), index.item()) == (25, 0)
    squared, index = traced_nearest(torch.empty(0, 2), torch.zeros(3, 2), 2)
    assert squared.shape == index.shape == (0, 2)
    assert traced_nearest(torch.ones(1, 2).double(), torch.zeros(3, 2).double(), 1)[0].item() == 2


def test_what_is_not_finite_stays_so():
    queries = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]])
    squared, _ = traced_nearest(queries, torch.ones(5, 2), 1)
    assert squared[0].isnan().all() and squared[1].item() == 2
