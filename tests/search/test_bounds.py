"""The certificate of LowerBounds, and the small parts of the exact searches."""

import pytest
import torch

from runtime.errors import UserError
from search.bounds import (
    BLOCK,
    ROUNDING,
    LowerBounds,
    block_minima,
    entries_within,
    extent,
    matmul_precision,
    pair_distances,
    pieces,
)
from tests.search.test_nearest import BANKS, OPERANDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gaussian", "offset", "near copies", "clusters", "grid", "mixed scales"])
def test_bounds_hold_on_both_sides(name, dtype):
    points = BANKS[name]()
    bounds = LowerBounds(*extent(points, "points"), dtype=dtype)
    rows, columns = bounds.rows(points), bounds.columns(points)
    largest = bounds.largest(columns)
    low = (rows @ columns.T).double()
    assert low.shape[1] % BLOCK == 0
    low = low[:, : len(points)]
    true = (points.double()[:, None] - points.double()).square().sum(2)
    assert (low <= true).all()
    assert (true <= low + bounds.width(rows, largest)[:, None]).all()
    norms = (points.double() - bounds.centre).square().sum(1)
    assert (bounds.width(rows, largest) < 100 * points.shape[1] * torch.finfo(dtype).eps * norms.max() + 1e-30).all()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", ["gaussian", "offset", "near copies", "clusters", "grid", "mixed scales"])
def test_bounds_of_a_row_may_be_compared_in_low_precision(name, precision):
    points = BANKS[name]()
    bounds = LowerBounds(*extent(points, "points"), dtype=torch.float32)
    rows, columns = bounds.rows(points), bounds.columns(points)
    wide = bounds.width(rows, bounds.largest(columns), precision)[:, None]
    low = (OPERANDS[precision](rows) @ OPERANDS[precision](columns).T).double()[:, : len(points)]
    true = (points.double()[:, None] - points.double()).square().sum(2)
    constant = (OPERANDS[precision](rows[:, -4]) - rows[:, -4]).double()[:, None]
    assert ((low - constant - true).abs() <= wide / 2).all()  # so two bounds of a row are off by `wide` at most
    norms = (points.double() - bounds.centre).square().sum(1)
    assert (wide < 10 * ROUNDING[precision] * norms.max() + 1e-30).all()
    assert torch.equal(columns[:, -3:], OPERANDS[precision](columns[:, -3:]))  # no rounding changes the norms
    assert torch.equal(columns[: len(points), -3:].sum(1, dtype=torch.float64), rows[:, -4].double())


def test_rows_lie_where_they_should():
    points, made = torch.randn(2000, 3), []
    bounds = LowerBounds(*extent(points, "points"))
    rows = bounds.rows(points, lambda *shape, dtype: made.append(torch.empty(shape, dtype=dtype)) or made[0])
    assert rows is made[0] and torch.equal(rows, bounds.rows(points))


@pytest.mark.parametrize("n", [1, 5, 3000])
def test_extent_in_pieces_and_over_processes(n):
    points = torch.randn(n, 2000) + torch.arange(2000)
    assert len(pieces(points)) == -(-n // 2097) and torch.equal(torch.cat(pieces(points)), points)
    centre, spread = extent(points, "points")
    torch.testing.assert_close(centre, points.double().mean(0))
    assert spread == float((points.double() - centre).abs().max())
    none, everything = points[:0], torch.zeros(1, 6001)
    everything[:, 0] = 1
    assert pieces(none) == ()
    parts = []
    for part in (points[: n // 3], points[n // 3 :], none):  # what each process sends
        extent(part, "points", lambda sent: parts.append(sent) or torch.cat([sent, everything]))
    joint = extent(points[: n // 3], "points", lambda _: torch.cat(parts))
    torch.testing.assert_close(joint[0], centre)
    assert abs(joint[1] - spread) < 1e-9


def test_bad_rows_are_found_in_any_piece():
    points = torch.zeros(5000, 2000)
    points[4321, 7], points[4500, 0] = torch.nan, torch.inf
    with pytest.raises(UserError, match="points: row 4321 of 5000 holds NaN or inf"):
        extent(points, "points")


def test_pairs_and_blocks():
    a, b = torch.randn(9, 3), torch.randn(7, 3)
    i, j = torch.tensor([8, 0, 0]), torch.tensor([6, 1, 1])
    assert torch.equal(pair_distances(a, i, b, j), (a[i].double() - b[j].double()).square().sum(1))
    assert len(pair_distances(a, i[:0], b, j[:0])) == 0
    bounds = torch.arange(4 * BLOCK).float().view(2, -1)
    i, j = entries_within(bounds, block_minima(bounds), torch.tensor([1.0, -torch.inf], dtype=torch.float64))
    assert (i.tolist(), j.tolist()) == ([0, 0], [0, 1])


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_matmul_precision_is_local(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with matmul_precision(torch.device("cpu"), precision):
            assert torch.backends.mkldnn.matmul.fp32_precision == precision
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
