"""Exact nearest neighbors: matrix products that bound the distances from below, float64 differences that decide."""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.errors import UserError
from search.bounds import (
    BLOCK,
    LowerBounds,
    Precision,
    block_minima,
    entries_within,
    extent,
    matmul_precision,
    pair_distances,
    require_finite,
)
from search.traced import traced_nearest

CANDIDATES = 64  # more than this many a query, on average, are not worth a product in low precision


class Prepared(NamedTuple):
    """What `nearest` needs of a bank, for banks searched more than once."""

    bounds: LowerBounds
    columns: Tensor  # (M', D + 4)
    largest: Tensor  # () float64, norm
    precision: Precision


@torch.no_grad()
def prepare(bank: Tensor, *, precision: Precision | None = None) -> Prepared:
    """bank (M, D), M >= 1 -> its half of the matrix products: one copy in float32, and the norms.

    precision: of the products. It changes no result, only how many distances are evaluated by difference afterwards.
    None: tf32 on CUDA, ieee elsewhere. bf16 is the CPU's, and used where oneDNN finds it fast.

    Raises ValueError on a precision that the device does not have, UserError when the bank holds NaN or inf.
    """
    precision = precision or ("tf32" if bank.device.type == "cuda" else "ieee")
    if precision not in ("ieee", "tf32", "bf16") or (precision == "bf16" and bank.device.type == "cuda"):
        raise ValueError(f"nearest: precision {precision} on {bank.device.type}: ieee, tf32, or on a CPU bf16")
    bank = _float32(bank)
    bounds = LowerBounds(*extent(bank, "bank"))
    columns = bounds.columns(bank)
    return Prepared(bounds, columns, bounds.largest(columns), precision)


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int = 1,
    *,
    prepared: Prepared | None = None,
    chunk: int | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest bank entries of each query: (distances (Q, k) float32, Euclidean, ascending; indices (Q, k) int64).

    queries (Q, D), bank (M, D), any floating dtype, taken as float32. The neighbors, their order and their distances
    are those of a full search with float64 differences (`pair_distances`) rounded to float32 at the end, ties to the
    lowest index; a query that is in the bank has distance 0. A GPU sums in another order than a CPU, so between the two
    only neighbors whose float64 distances agree to the last bits can change places.

    Args:
        prepared: `prepare(bank)`, saves that work when the same bank is searched again.
        chunk: how many of the Q x M bounds exist at once. Where most of the bank ties for the nearest, the search is as
            slow as the differences are.
        exclude: groups of the queries (Q,) and of the bank entries (M,), int64. For a query the entries of its own
            group do not exist; where fewer than k are left, the distance is inf and the index -1.
        precision: see `prepare`, which has it where `prepared` is given.

    Raises:
        ValueError: a wrong shape, k, chunk or precision, an empty bank.
        UserError: NaN, inf or values too large for float32 squares.
    """
    squared, indices = nearest_squared(
        queries, bank, k, prepared=prepared, chunk=chunk, exclude=exclude, precision=precision
    )
    return squared.sqrt().float(), indices


@torch.no_grad()
def nearest_squared(
    queries: Tensor,
    bank: Tensor,
    k: int = 1,
    *,
    prepared: Prepared | None = None,
    chunk: int | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]:
    """`nearest` with its squared distances, (Q, k) float64, before they are rounded: to merge with those of others."""
    _check(queries, bank, k, prepared, chunk, exclude, precision)
    if torch.compiler.is_exporting():
        return traced_nearest(queries, bank, k)
    queries, bank = _float32(queries), _float32(bank)
    prepared = prepared or prepare(bank, precision=precision)
    step = max(1, (chunk or (2**22 if queries.device.type == "cpu" else 2**25)) // len(prepared.columns))
    if exclude is not None:
        own, theirs = exclude
        theirs = torch.cat([theirs, theirs[-1:].expand(-len(bank) % BLOCK)])  # (M',)
    # Column k takes what comes after the k nearest.
    squared = queries.new_full((len(queries), k + 1), torch.inf, dtype=torch.float64)
    indices = torch.full_like(squared, -1, dtype=torch.int64)
    for first in range(0, len(queries), step):
        block = queries[first : first + step]
        rows = prepared.bounds.rows(block)
        if not rows[:, -4].max() <= torch.finfo(rows.dtype).max / 100:
            require_finite(queries, "queries")
            raise UserError(f"queries: values up to {block.abs().max():g} are too large for float32; check the weights")
        away = None if exclude is None else own[first : first + step, None] == theirs  # (n, M')
        i, j = _candidates(rows, len(bank), k, prepared, away, prepared.precision)
        if prepared.precision != "ieee" and len(i) > CANDIDATES * len(block):
            i, j = _candidates(rows, len(bank), k, prepared, away, "ieee")
        found = pair_distances(block, i, bank, j)
        order = found.argsort(stable=True)  # then by query: two stable sorts keep the lowest index first among ties
        order = order[i[order].argsort(stable=True)]
        i, count = i[order], i.bincount(minlength=len(block))
        place = torch.arange(len(i), device=i.device) - (count.cumsum(0) - count)[i]
        at = first + i, place.clamp(max=k)
        squared[at], indices[at] = found[order], j[order]
    return squared[:, :k], indices[:, :k]


def with_gradient(queries: Tensor, entries: Tensor) -> Tensor:
    """Squared distances (Q, k) float64 of queries (Q, D) to the entries (Q, k, D) that a search has found, by
    differences that autograd follows, as it does not follow the search. The gradient at distance 0 is 0, also of the
    root."""
    return (queries[:, None].double() - entries.double()).square().sum(2).clamp(min=1e-30)  # (Q, k)


def _candidates(
    rows: Tensor, n_entries: int, k: int, prepared: Prepared, away: Tensor | None, precision: Precision
) -> tuple[Tensor, Tensor]:
    """All (i, j) where entry j can be one of the k nearest of row i, row by row; away (n, M'): where it cannot."""
    bounds, columns, largest, _ = prepared
    with matmul_precision(rows.device, precision):
        low = rows @ columns.T  # (n, M')
    if away is not None:
        low.masked_fill_(away, torch.inf)
    minima = block_minima(low)
    if k == 1:
        kth = minima.amin(1)
    else:  # the k-th least block minimum is an upper bound of the k-th least entry, and cheaper
        kth = (minima if minima.shape[1] >= k else low[:, :n_entries]).topk(k, largest=False).values[:, -1]
    limit = kth.double() + bounds.width(rows, largest, precision)
    i, j = entries_within(low, minima, limit.clamp(max=torch.finfo(low.dtype).max / 2))  # so that none is inf
    real = j < n_entries
    return i[real], j[real]


def _float32(points: Tensor) -> Tensor:
    """float64 rounded to float32; narrower dtypes as they are, since every use widens them in pieces."""
    return points.float() if points.dtype == torch.float64 else points


def _check(queries, bank, k, prepared, chunk, exclude, precision) -> None:
    """Raise ValueError; see `nearest`."""
    if queries.dim() != 2 or bank.dim() != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"nearest: queries {tuple(queries.shape)} and bank {tuple(bank.shape)} must be (Q, D) and (M, D)"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"nearest: k = {k} is not in 1..M for bank {tuple(bank.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"nearest: chunk {chunk} must be at least 1")
    if exclude is not None and [x.shape for x in exclude] != [queries.shape[:1], bank.shape[:1]]:
        raise ValueError(f"nearest: exclude {[tuple(x.shape) for x in exclude]} must be of (Q,) and (M,)")
    if prepared is not None and precision is not None:
        raise ValueError("nearest: precision is chosen in prepare()")
