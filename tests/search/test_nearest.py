"""nearest against a full search with float64 differences, and the certificate that its filter rests on."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import search.nearest
from runtime.errors import UserError
from search.bounds import BLOCK, LowerBounds
from search.nearest import nearest, nearest_squared, prepare


def full_search(queries, bank, k, exclude=None, rounded=True):
    squared = (queries.double()[:, None] - bank.double()).square().sum(2)  # (Q, M)
    if exclude is not None:
        squared[exclude[0][:, None] == exclude[1]] = torch.inf
    values, indices = (x[:, :k] for x in squared.sort(dim=1, stable=True))
    return values.sqrt().float() if rounded else values, indices.where(values < torch.inf, -1)


def queries_for(bank):
    """Some entries of the bank, and others beside them."""
    spread = bank.std(0, correction=0) + 1e-30
    return torch.cat([bank[::3], bank[:40] + spread * torch.randn(len(bank[:40]), bank.shape[1])])


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
    "one column": lambda: torch.randn(300, 1),
    "one entry": lambda: torch.randn(1, 16),
    "exactly one block": lambda: torch.randn(BLOCK, 16),
    "not contiguous": lambda: torch.randn(16, 600).T[::2],
}


@pytest.mark.parametrize("name", BANKS)
def test_equals_the_full_search(name):
    bank = BANKS[name]()
    queries = queries_for(bank)
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


@pytest.mark.parametrize("name", BANKS)
def test_squared_distances_are_those_of_the_differences(name):
    bank = BANKS[name]().contiguous()
    queries = queries_for(bank)
    k = min(5, len(bank))
    squared, indices = nearest_squared(queries, bank, k)
    expected = full_search(queries, bank, k, rounded=False)
    assert squared.dtype == torch.float64
    assert torch.equal(squared, expected[0]) and torch.equal(indices, expected[1])


@pytest.mark.parametrize("name", BANKS)
def test_the_own_group_does_not_exist(name):
    bank = BANKS[name]()
    queries = queries_for(bank)
    for n_groups in (1, 2, 20):
        groups = torch.randint(0, n_groups, (len(bank),)), torch.randint(0, n_groups + 1, (len(queries),))
        exclude = groups[1], groups[0]
        for k in sorted({1, min(4, len(bank)), len(bank)}):
            for chunk in (None, 900):
                expected = full_search(queries, bank, k, exclude)
                for precision in ("ieee", "bf16"):
                    distances, indices = nearest(queries, bank, k, chunk=chunk, exclude=exclude, precision=precision)
                    assert torch.equal(indices, expected[1]) and torch.equal(distances, expected[0])
        if n_groups == 1:
            alone = exclude[0] == 0
            assert (indices[alone] == -1).all() and (distances[alone] == torch.inf).all()
            assert (indices[~alone] >= 0).all()


def truncated(x, bits):
    """float32 with only this many of its 23 stored bits, as TF32 hardware may read them."""
    return (x.view(torch.int32) >> (23 - bits) << (23 - bits)).view(torch.float32)


OPERANDS = {"tf32": lambda x: truncated(x, 10), "bf16": lambda x: x.bfloat16().float(), "ieee": lambda x: x}


class Hardware:
    """A matrix product whose operands lose bits on the way in: what tensor cores make of rows @ columns.T."""

    def __init__(self, monkeypatch):
        self.used = []
        monkeypatch.setattr(torch.Tensor, "__matmul__", self.product(torch.Tensor.__matmul__))

    def product(self, plain):
        def call(a, b):
            precision = torch.backends.mkldnn.matmul.fp32_precision
            self.used.append(precision)
            rounded = OPERANDS[precision if a.dtype == torch.float32 else "ieee"]
            return plain(rounded(a), rounded(b))

        return call


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", BANKS)
def test_low_precision_products_change_nothing(name, precision, monkeypatch):
    bank = BANKS[name]()
    queries = queries_for(bank)
    expected = {k: full_search(queries, bank, k) for k in {1, min(6, len(bank)), len(bank)}}
    hardware = Hardware(monkeypatch)
    for k in expected:
        for chunk in (None, 1, 5000):
            distances, indices = nearest(queries, bank, k, chunk=chunk, precision=precision)
            assert torch.equal(indices, expected[k][1]) and torch.equal(distances, expected[k][0])
    assert precision in hardware.used


def test_low_precision_leaves_few_candidates_or_falls_back(monkeypatch):
    counts, candidates = [], search.nearest._candidates
    monkeypatch.setattr(
        search.nearest,
        "_candidates",
        lambda *args: counts.append((args[-1], len((found := candidates(*args))[0]))) or found,
    )
    hidden = torch.randn(3000, 6)
    bank = (hidden @ torch.randn(6, 64) + torch.randn(64)).relu() @ torch.randn(64, 128)
    queries = bank[:200] + 0.1 * torch.randn(200, 128)
    for precision, most in (("ieee", 1.1), ("tf32", 2), ("bf16", 8)):
        counts.clear()
        nearest(queries, bank, precision=precision)
        assert [p for p, _ in counts] == [precision] and counts[0][1] <= most * len(queries), precision
    counts.clear()
    bank = near_copies()[:, :1] + torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 300)[:300]
    bank = torch.cat([bank[:, :16], torch.full((300, 1), 1e4) * torch.tensor([[-1.0], [1.0]]).repeat(150, 1)], 1)
    expected = full_search(bank, bank, 2)
    distances, indices = nearest(bank, bank, 2, precision="bf16")
    assert [p for p, _ in counts] == ["bf16", "ieee"] and counts[0][1] > 64 * len(bank)
    assert torch.equal(indices, expected[1]) and torch.equal(distances, expected[0])


def test_the_emulated_hardware_is_wrong_without_the_wider_bounds(monkeypatch):
    bank, queries = torch.randn(3000, 16), torch.randn(500, 16)
    expected = full_search(queries, bank, 1)[1]
    monkeypatch.setattr(LowerBounds, "width", lambda _, rows, *__: 0 * rows[:, 0].double())
    Hardware(monkeypatch)
    assert not torch.equal(nearest(queries, bank, precision="bf16")[1], expected)


def test_float64_is_rounded_to_float32_first():
    bank, queries = torch.randn(70, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    expected = full_search(queries.float(), bank.float(), 3)
    distances, indices = nearest(queries, bank, 3)
    assert torch.equal(indices, expected[1]) and torch.equal(distances, expected[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    bank, queries = torch.randn(300, 16), torch.randn(90, 16)
    distances, indices = nearest(queries.cuda(), bank.cuda(), 4)
    expected = full_search(queries, bank, 4)
    assert torch.equal(indices.cpu(), expected[1])
    torch.testing.assert_close(distances.cpu(), expected[0])


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 0},
        {"precision": "fp8"},
        {"precision": "tf32", "prepared": prepare(torch.ones(5, 4))},
        {"exclude": (torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))},
        {"exclude": (torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=r"nearest: "):
        nearest(torch.randn(3, 4), torch.randn(5, 4), **options)


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
