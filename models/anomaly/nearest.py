"""Exact nearest neighbours: matrix products that bound the distances from below, float64 differences that decide.

A product |x|^2 + |y|^2 - 2 x.y is fast but loses digits where the distance is small against the norms. Here it only
says which pairs cannot matter, with a bound on its own rounding; the few pairs left are evaluated by difference.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from training.errors import UserError

PAIRS = 1024  # rows of float64 differences held at once: they stay in the caches
BLOCK = 32  # columns whose minimum is taken first, so that the search for small entries skips the others


def pair_distances(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """|a[i] - b[j]|^2 -> (n,) float64 for index pairs i, j (n,): by difference, so without cancellation."""
    out = a.new_empty(len(i), dtype=torch.float64)
    for some, p, q in zip(out.split(PAIRS), i.split(PAIRS), j.split(PAIRS)):
        difference = a.index_select(0, p).double().sub_(b.index_select(0, q))  # (PAIRS, D)
        torch.sum(difference.square_(), -1, out=some)
    return out


def require_finite(points: Tensor, name: str) -> None:
    """Raise `UserError` with the first row of points (n, D) that holds NaN or inf."""
    if not points.sum(dtype=torch.float64).isfinite():  # a float64 sum of float32 numbers cannot overflow
        row = int((~points.isfinite().all(1)).nonzero()[0])
        raise UserError(f"{name}: row {row} of {len(points)} holds NaN or inf; check the weights and the precision")


@contextmanager
def full_precision(device: torch.device):
    """Matrix products in the dtype of their operands: no autocast, no TF32, no bfloat16 in their place."""
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


class LowerBounds:
    """Lower bounds of squared distances by one matrix product, `rows(x) @ columns(rows(y)).T`, with a certificate:

        bound <= |x - y|^2 <= bound + 2 E (n_x + n_y) + 4 tiny,    n_x = |x - centre|^2,

    |x - y|^2 being what `pair_distances` returns. The product is |x|^2 + |y|^2 - 2 x.y with norms shrunk by 1 - E,
    and E is the worst that rounding can do. With unit roundoff u, gamma_n = n u / (1 - n u), in units of n_x + n_y:

    * rounding x - centre and y - centre moves their squared distance by 4 u + O(u^2), rounding the norms by 2 u;
    * a product of D + 2 terms, summed in any order, by gamma_{D+2} (2 sum |x_k y_k| + n_x + n_y) <= 2 gamma_{D+2};
    * the norms and the differences in float64 by less than 4 gamma_{D+3} with u = 2^-53.

    `tiny` covers underflow. The centre is the mean of `points`: it keeps the norms, and so E's weight, small.
    """

    def __init__(self, points: Tensor, *, dtype: torch.dtype | None = None):
        centre = points.mean(0, dtype=torch.float64)
        spread = float((torch.stack([points.amax(0), points.amin(0)]) - centre).abs().max())
        # Outside this range float32 squares overflow or vanish; float64 has room for the squares of every float32.
        self.dtype = dtype or (torch.float32 if 1e-12 < spread < 1e15 else torch.float64)
        self.centre = centre.to(self.dtype)
        info, terms = torch.finfo(self.dtype), points.shape[1] + 3
        u = info.eps / 2
        self.slack = 2 * terms * u / (1 - terms * u) + 8 * u + 4 * terms * 2**-53
        self.tiny = 32 * terms * info.tiny

    def rows(self, points: Tensor) -> Tensor:
        """(n, D) -> (n, D + 2): centred point, shrunk norm, 1."""
        out = points.new_empty(len(points), points.shape[1] + 2, dtype=self.dtype)
        for i in range(0, len(points), PAIRS):
            x = out[i : i + PAIRS]
            x[:, :-2] = points[i : i + PAIRS].to(self.dtype) - self.centre
            x[:, -2] = x[:, :-2].square().sum(1, dtype=torch.float64) * (1 - self.slack) - self.tiny
        out[:, -1] = 1
        return out

    def columns(self, rows: Tensor) -> Tensor:
        """(m, D + 2) of `rows` -> (m', D + 2): -2 centred point, 1, norm; the last repeated to fill a block."""
        columns = torch.cat([rows[:, :-2] * -2, rows[:, -1:], rows[:, -2:-1]], 1)
        return torch.cat([columns, columns[-1:].expand(-len(rows) % BLOCK, -1)])

    def width(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(n,) float64: how far above its bound a squared distance of each row can be (2.1 shrunk norms > 2 norms)."""
        return 2.1 * self.slack * (rows[:, -2].double() + columns[:, -1].max()) + 8 * self.tiny


def block_minima(bounds: Tensor) -> Tensor:
    """(n, m) with m a multiple of `BLOCK` -> (n, m / BLOCK)."""
    return bounds.unflatten(1, (-1, BLOCK)).amin(2)


def entries_within(bounds: Tensor, minima: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, j), row by row, where bounds[i, j] <= limit[i]; bounds (n, m), minima of its blocks; limit (n,)."""
    limit = limit.to(bounds.dtype).nextafter(limit.new_tensor(torch.inf, dtype=bounds.dtype))  # never rounded down
    i, block = (minima <= limit[:, None]).nonzero(as_tuple=True)
    entry, j = (bounds.unflatten(1, (-1, BLOCK))[i, block] <= limit[i, None]).nonzero(as_tuple=True)
    return i[entry], block[entry] * BLOCK + j


class Prepared(NamedTuple):
    """What `nearest` needs of a bank, for banks searched more than once."""

    bounds: LowerBounds
    columns: Tensor  # (M', D + 2)


@torch.no_grad()
def prepare(bank: Tensor) -> Prepared:
    """bank (M, D), M >= 1 -> its half of the matrix products. Raises UserError when the bank holds NaN or inf."""
    bank = bank.float()
    require_finite(bank, "bank")
    bounds = LowerBounds(bank)
    return Prepared(bounds, bounds.columns(bounds.rows(bank)))


@torch.no_grad()
def nearest(
    queries: Tensor, bank: Tensor, k: int = 1, *, prepared: Prepared | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest bank entries of each query: (distances (Q, k) float32, Euclidean, ascending; indices (Q, k) int64).

    queries (Q, D), bank (M, D), any floating dtype, taken as float32. The neighbours, their order and their distances
    are those of a full search with float64 differences (`pair_distances`) rounded to float32 at the end, ties to the
    lowest index; a query that is in the bank has distance 0. A GPU sums in another order than a CPU, so between the two
    only neighbours whose float64 distances agree to the last bits can change places.

    prepared: `prepare(bank)`, saves that work when the same bank is searched again. chunk: how many of the Q x M bounds
    exist at once. Where most of the bank ties for the nearest, the search is as slow as the differences are.
    Raises ValueError on a wrong shape, k or empty bank, UserError on NaN, inf or values too large for float32 squares.
    """
    if queries.dim() != 2 or bank.dim() != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"nearest: queries {tuple(queries.shape)} and bank {tuple(bank.shape)} must be (Q, D) and (M, D)"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"nearest: k = {k} is not in 1..M for bank {tuple(bank.shape)}")
    queries, bank = queries.float(), bank.float()
    require_finite(queries, "queries")
    bounds, columns = prepared or prepare(bank)
    step = max(1, (chunk or (2**22 if queries.device.type == "cpu" else 2**25)) // len(columns))
    distances, indices = queries.new_empty(len(queries), k), queries.new_empty(len(queries), k, dtype=torch.int64)
    for first in range(0, len(queries), step):
        block = queries[first : first + step]
        rows = bounds.rows(block)
        if rows[:, -2].max() > torch.finfo(rows.dtype).max / 100:
            raise UserError(f"queries: values up to {block.abs().max():g} are too large for float32; check the weights")
        with full_precision(queries.device):
            low = rows @ columns.T  # (n, M')
        minima = block_minima(low)
        if k == 1:
            kth = minima.amin(1)
        else:  # the k-th least block minimum is an upper bound of the k-th least entry, and cheaper
            kth = (minima if minima.shape[1] >= k else low[:, : len(bank)]).topk(k, largest=False).values[:, -1]
        i, j = entries_within(low, minima, kth.double() + bounds.width(rows, columns))
        i, j = i[j < len(bank)], j[j < len(bank)]
        squared = pair_distances(block, i, bank, j)
        order = squared.argsort(stable=True)  # then by query: two stable sorts keep the lowest index first among ties
        order = order[i[order].argsort(stable=True)]
        count = i.bincount(minlength=len(block))
        order = order[(count.cumsum(0) - count)[:, None] + torch.arange(k, device=i.device)]  # (n, k)
        distances[first : first + step], indices[first : first + step] = squared[order].sqrt(), j[order]
    return distances, indices
