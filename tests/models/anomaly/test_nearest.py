"""nearest against a full search with float64 differences, and the certificate that its filter rests on."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from models.anomaly.nearest import (
    BLOCK,
    LowerBounds,
    block_minima,
    entries_within,
    full_precision,
    nearest,
    pair_distances,
    prepare,
)
from training.errors import UserError


def full_search(queries, bank, k):
    squared = (queries.double()[:, None] - bank.double()).square().sum(2)  # (Q, M)
    values, indices = squared.sort(dim=1, stable=True)
    return values[:, :k].sqrt().float(), indices[:, :k]


def near_copies():
    """Entries closer to each other than float32 products can tell: in front of a norm of 1000, steps of 1e-4."""
    return 1000 + 1e-4 * torch.randint(0, 4, (300, 16)).float() + torch.randn(1, 16)


BANKS = {
    "gaussian": lambda: torch.randn(300, 16),
    "offset": lambda: torch.randn(300, 16) + 1000,
    "near copies": near_copies,
    "clusters": lambda: 10 * torch.randn(4, 16)[torch.randint(0, 4, (300,))] + 1e-4 * torch.randn(300, 16),
    "duplicates": lambda: torch.randn(20, 16)[torch.randint(0, 20, (300,))],
    "grid": lambda: torch.randint(0, 3, (300, 4)).float() / 10,
    "identical": lambda: torch.full((300, 16), 0.1),
    "tiny": lambda: torch.randn(300, 16) * 1e-25,
    "huge": lambda: torch.randn(300, 16) * 1e30,
    "mixed scales": lambda: torch.randn(300, 16) * 10 ** (12 * torch.rand(300, 1) - 6),
    "one entry": lambda: torch.randn(1, 16),
    "exactly one block": lambda: torch.randn(BLOCK, 16),
    "not contiguous": lambda: torch.randn(16, 600).T[::2],
}


@pytest.mark.parametrize("name", BANKS)
def test_equals_the_full_search(name):
    bank = BANKS[name]()
    spread = bank.std(0, correction=0) + 1e-30
    queries = torch.cat([bank[::3], bank[:40] + spread * torch.randn(len(bank[:40]), bank.shape[1])])
    for k in sorted({1, min(2, len(bank)), min(9, len(bank)), min(40, len(bank)), len(bank)}):
        for chunk in (None, 1, 5000):
            distances, indices = nearest(queries, bank, k, chunk=chunk)
            expected_distances, expected_indices = full_search(queries, bank, k)
            assert torch.equal(indices, expected_indices), f"k {k}, chunk {chunk}"
            assert torch.equal(distances, expected_distances), f"k {k}, chunk {chunk}"
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64


def test_equals_scikit_learn():
    queries, bank = torch.randn(50, 7), torch.randn(120, 7)
    distances, indices = nearest(queries, bank, 5)
    expected = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(bank.numpy()).kneighbors(queries.numpy())
    assert torch.equal(indices, torch.from_numpy(expected[1]))
    torch.testing.assert_close(distances, torch.from_numpy(expected[0]).float())


def test_a_query_of_the_bank_has_distance_zero_where_products_cancel():
    bank = near_copies()
    distances, indices = nearest(bank, bank)
    assert (distances == 0).all()
    assert torch.equal(bank[indices[:, 0]], bank)
    assert (torch.cdist(bank, bank, compute_mode="use_mm_for_euclid_dist").diagonal() > 0).any()  # the case is hard


def test_a_prepared_bank_gives_the_same_and_stays_usable():
    bank, queries = torch.randn(70, 5), torch.randn(30, 5)
    prepared = prepare(bank)
    for _ in range(2):
        for k in (1, 3):
            assert all(
                torch.equal(a, b)
                for a, b in zip(nearest(queries, bank, k, prepared=prepared), nearest(queries, bank, k))
            )


def test_half_precision_inputs_and_autocast():
    bank, queries = torch.randn(70, 5).bfloat16(), torch.randn(30, 5).half()
    expected = full_search(queries, bank, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances, indices = nearest(queries, bank, 3)
    assert torch.equal(indices, expected[1]) and torch.equal(distances, expected[0])


def test_no_queries():
    distances, indices = nearest(torch.empty(0, 4), torch.randn(6, 4), 2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    bank, queries = torch.randn(300, 16), torch.randn(90, 16)
    distances, indices = nearest(queries.cuda(), bank.cuda(), 4)
    expected = full_search(queries, bank, 4)
    assert torch.equal(indices.cpu(), expected[1])
    torch.testing.assert_close(distances.cpu(), expected[0])


@pytest.mark.parametrize(
    "queries, bank, k",
    [
        (torch.randn(3, 4), torch.randn(5, 4), 6),
        (torch.randn(3, 4), torch.randn(5, 4), 0),
        (torch.randn(3, 4), torch.randn(0, 4), 1),
        (torch.randn(3, 4), torch.randn(5, 3), 1),
        (torch.randn(4), torch.randn(5, 4), 1),
        (torch.randn(3, 4), torch.randn(4), 1),
    ],
)
def test_wrong_shapes_are_named(queries, bank, k):
    with pytest.raises(ValueError, match=r"nearest: .*\("):
        nearest(queries, bank, k)


def test_bad_values_are_named():
    bank = torch.randn(5, 4)
    with pytest.raises(UserError, match="queries: row 1 of 2 holds NaN or inf"):
        nearest(torch.tensor([[0.0] * 4, [0, torch.nan, 0, 0]]), bank)
    with pytest.raises(UserError, match="bank: row 0 of 1 holds NaN or inf"):
        nearest(bank, torch.full((1, 4), torch.inf))
    with pytest.raises(UserError, match="queries: values up to 1e\\+30 are too large"):
        nearest(torch.full((2, 4), 1e30), bank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gaussian", "offset", "near copies", "clusters", "grid", "mixed scales"])
def test_bounds_hold_on_both_sides(name, dtype):
    points = BANKS[name]()
    bounds = LowerBounds(points, dtype=dtype)
    rows = bounds.rows(points)
    columns = bounds.columns(rows)
    low = (rows @ columns.T).double()
    assert low.shape[1] % BLOCK == 0
    low = low[:, : len(points)]
    true = (points.double()[:, None] - points.double()).square().sum(2)
    assert (low <= true).all()
    assert (true <= low + bounds.width(rows, columns)[:, None]).all()
    norms = (points.double() - bounds.centre).square().sum(1)
    assert (bounds.width(rows, columns) < 100 * points.shape[1] * torch.finfo(dtype).eps * norms.max() + 1e-30).all()


def test_pairs_and_blocks():
    a, b = torch.randn(9, 3), torch.randn(7, 3)
    i, j = torch.tensor([8, 0, 0]), torch.tensor([6, 1, 1])
    assert torch.equal(pair_distances(a, i, b, j), (a[i].double() - b[j].double()).square().sum(1))
    assert len(pair_distances(a, i[:0], b, j[:0])) == 0
    bounds = torch.arange(4 * BLOCK).float().view(2, -1)
    i, j = entries_within(bounds, block_minima(bounds), torch.tensor([1.0, -torch.inf], dtype=torch.float64))
    assert (i.tolist(), j.tolist()) == ([0, 0], [0, 1])


def test_full_precision_is_local():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
