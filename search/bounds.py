"""Bounds of squared distances by matrix products, with a certificate, and the exact distances by float64 differences.

A product |x|^2 + |y|^2 - 2 x.y is fast but loses digits where the distance is small against the norms. Here it only
says which pairs cannot matter, with a bound on its own rounding; the few pairs left are evaluated by difference.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from runtime.errors import UserError

Precision = Literal["ieee", "tf32", "bf16"]
ROUNDING = {"tf32": 2**-10, "bf16": 2**-8}  # relative error of an operand: TF32 may truncate to 10 bits, bf16 rounds
PAIRS = 1024  # rows of float64 differences held at once: they stay in the caches
BLOCK = 32  # columns whose minimum is taken first, so that the search for small entries skips the others


def pair_distances(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """|a[i] - b[j]|^2 -> (n,) float64 for index pairs i, j (n,): by difference, so without cancellation."""
    out = torch.empty(len(i), dtype=torch.float64, device=a.device)
    at_once = 32 * PAIRS
    if a.device.type == "cpu":
        # below 2^15 numbers torch wakes no threads, which would cost more than the work
        at_once = PAIRS if len(i) > 32 * PAIRS else max(1, (2**15 - 1) // a.shape[1])
    for some, p, q in zip(out.split(at_once), i.split(at_once), j.split(at_once)):
        difference = a.index_select(0, p).double().sub_(b.index_select(0, q))  # (PAIRS, D)
        torch.sum(difference.square_(), -1, out=some)
    return out


def pieces(points: Tensor) -> tuple[Tensor, ...]:
    """points (n, D) in runs of rows of about 16 MiB: a float64 copy of one is small, wherever the points lie."""
    return points.split(max(1, 2**22 // points.shape[1])) if len(points) else ()


def require_finite(points: Tensor, name: str) -> None:
    """Raise `UserError` with the first row of points (n, D) that holds NaN or inf.

    An exported program lets them pass, and its scores are not finite either.
    """
    if torch.compiler.is_exporting():
        return
    first = 0
    for piece in pieces(points):
        bad = (~piece.isfinite().all(1)).nonzero()
        if len(bad):
            row = first + int(bad[0])
            raise UserError(f"{name}: row {row} of {len(points)} holds NaN or inf; check the weights and the precision")
        first += len(piece)


def extent(points: Tensor, name: str, together: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, float]:
    """Mean of points (n, D), (D,) float64, and the largest distance of an entry from it along one axis.

    together: (1, c) -> (W, c), the same of all processes, to have it for the points of all. At least one has a point.
    Raises UserError with the first row that holds NaN or inf.
    """
    total = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
    most, least = torch.full_like(total, -torch.inf), torch.full_like(total, torch.inf)
    for piece in pieces(points):
        total += piece.sum(0, dtype=torch.float64)  # of float32 numbers: cannot overflow
        most, least = torch.maximum(most, piece.amax(0).double()), torch.minimum(least, piece.amin(0).double())
    if not total.isfinite().all():
        require_finite(points, name)
    found = together(torch.cat([total.new_tensor([len(points)]), total, most, -least])[None]).to(points.device)
    centre = found[:, 1 : len(total) + 1].sum(0) / found[:, 0].sum()
    most, least = found[:, len(total) + 1 :].amax(0).chunk(2)
    return centre, float(torch.maximum(most - centre, least + centre).max())


@contextmanager
def matmul_precision(device: torch.device, precision: Precision):
    """Matrix products of float32 at this precision, of other dtypes in their own; no autocast."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


def full_precision(device: torch.device):
    """`matmul_precision` of the operands: no TF32 and no bfloat16 in their place."""
    return matmul_precision(device, "ieee")


class LowerBounds:
    """Lower bounds of squared distances by one matrix product, `rows(x) @ columns(y).T`, with a certificate:

        bound <= |x - y|^2 <= bound + 2 E (n_x + n_y) + 4 tiny,    n_x = |x - centre|^2,

    |x - y|^2 being what `pair_distances` returns. The product is |x|^2 + |y|^2 - 2 x.y with norms shrunk by 1 - E,
    and E is the worst that rounding can do. With unit roundoff u, gamma_n = n u / (1 - n u), in units of n_x + n_y:

    * rounding x - centre and y - centre moves their squared distance by 4 u + O(u^2), rounding the norms by 2 u;
    * a product of D + 4 terms, summed in any order, by gamma_{D+4} (2 sum |x_k y_k| + n_x + 1.01 n_y), that is by at
      most 2.01 gamma_{D+4};
    * the norms and the differences in float64 by less than 4 gamma_{D+5} with u = 2^-53.

    `tiny` covers underflow. A centre amid the points keeps the norms, and so E's weight, small.

    When the hardware computes the product in TF32 or bf16 (`matmul_precision`), the bound moves, for a given x, by a
    constant (the rounding of its norm) and by up to F (n_x + n_y) either way; so only bounds of the same x may be
    compared. With r of `ROUNDING`, F is 2 r + r^2 for the operands and 2 (D + 5) 2^-21 for a float32 sum whose terms
    are truncated, not rounded, as tensor cores do (Fasi et al. 2021). The norms of the columns ride in three parts of
    8 bits, which no rounding changes; this also makes the width D + 4, which keeps rows aligned for tensor cores.

    Args:
        centre, spread: of `extent`, for all points that will come, or about so.
        dtype: of the product; by default float32 where its squares neither overflow nor vanish, else float64.
    """

    def __init__(self, centre: Tensor, spread: float, *, dtype: torch.dtype | None = None):
        self.dtype = dtype or (torch.float32 if 1e-12 < spread < 1e15 else torch.float64)
        self.centre = centre.to(self.dtype)
        info, self.terms = torch.finfo(self.dtype), len(centre) + 5
        u = info.eps / 2
        self.slack = 2.01 * self.terms * u / (1 - self.terms * u) + 8 * u + 4 * self.terms * 2**-53
        self.tiny = 32 * self.terms * info.tiny

    def rows(self, points: Tensor, empty: Callable[..., Tensor] | None = None) -> Tensor:
        """(n, D) -> (n, D + 4): centred point, shrunk norm, 1, 1, 1; in `empty(n, D + 4, dtype=...)`."""
        out = (empty or points.new_empty)(len(points), points.shape[1] + 4, dtype=self.dtype)
        for i in range(0, len(points), 4 * PAIRS):
            x = out[i : i + 4 * PAIRS]
            x[:, :-4] = points[i : i + 4 * PAIRS].to(self.dtype) - self.centre
            x[:, -4] = x[:, :-4].square().sum(1, dtype=torch.float64) * (1 - self.slack) - self.tiny
            x[:, -3:] = 1
        return out

    def columns(self, points: Tensor) -> Tensor:
        """(m, D) -> (m', D + 4): -2 centred point, 1, norm in three parts; the last repeated to fill a block."""
        padded = len(points) + -len(points) % BLOCK
        out = points.new_empty(padded, points.shape[1] + 4, dtype=self.dtype)
        for i in range(0, len(points), PAIRS):
            rows = self.rows(points[i : i + PAIRS])
            y, norm = out[i : i + len(rows)], rows[:, -4]
            torch.mul(rows[:, :-4], -2, out=y[:, :-4])
            y[:, -4] = 1
            for part in (-3, -2, -1):
                y[:, part] = norm.bfloat16() if self.dtype == torch.float32 else norm
                norm = norm - y[:, part]
        out[len(points) :] = out[len(points) - 1]
        return out

    def largest(self, columns: Tensor) -> Tensor:
        """The largest norm among columns, () float64, which `width` takes."""
        return columns[:, -3:].sum(1, dtype=torch.float64).max()

    def width(self, rows: Tensor, largest: Tensor, precision: Precision = "ieee") -> Tensor:
        """(n,) float64: how far above its bound a squared distance of each row can be, and a bound above that of a pair
        that is not farther (2.1 shrunk norms > 2 norms)."""
        slack = self.slack
        if precision in ROUNDING and self.dtype == torch.float32:
            r = ROUNDING[precision]
            slack += 2 * r + r * r + 2 * self.terms * 2**-21
        return 2.1 * slack * (rows[:, -4].double() + largest) + 8 * self.tiny


def block_minima(bounds: Tensor) -> Tensor:
    """(n, m) with m a multiple of `BLOCK` -> (n, m / BLOCK)."""
    return bounds.unflatten(1, (-1, BLOCK)).amin(2)


def entries_within(bounds: Tensor, minima: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, j), row by row, where bounds[i, j] <= limit[i]; bounds (n, m), minima of its blocks; limit (n,)."""
    limit = limit.to(bounds.dtype).nextafter(limit.new_tensor(torch.inf, dtype=bounds.dtype))  # never rounded down
    i, block = (minima <= limit[:, None]).nonzero(as_tuple=True)
    entry, j = (bounds.unflatten(1, (-1, BLOCK))[i, block] <= limit[i, None]).nonzero(as_tuple=True)
    return i[entry], block[entry] * BLOCK + j
