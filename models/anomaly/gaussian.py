"""Gaussians fitted to few images, many at once, and their distances as if one of the images had not been fitted.

All is float64. A left-out distance is that of a refit to the others, from one factorization for all images: without
image i, at distance delta from the mean of n, the mean is further away by delta / (n - 1), the scatter matrix is
S - n / (n - 1) delta delta^T, and the inverse follows by Sherman and Morrison (1950).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.distributed import all_reduce_sum


class Gaussians(NamedTuple):
    """P Gaussians over d channels. With delta = x - mean, the squared distance of x is

    * |factor delta|^2 in covariance form,
    * (|delta|^2 - |factor deviations delta|^2) / regularization in low-rank form (computed another way: padim.py).
    """

    mean: Tensor  # (P, d) float32
    deviations: Tensor  # (P, n, d) float32, each image minus the mean; (P, 0, d) in covariance form
    factor: Tensor  # (P, d, d) or (P, n, n) float64, lower triangular
    left_out: Tensor  # (n of this process, P) float64: each image's distance from the Gaussian of the others
    failed: Tensor  # (P,) not 0 where a matrix was not positive definite


def covariance_form(x: Tensor, n: int, regularization: float) -> Gaussians:
    """Gaussians of x (n of this process, P, d) float32, n images over all processes: their sums are reduced.

    factor = L^-1, where L L^T = S / (n - 1) + regularization I; with one image S / (n - 1) is taken as 0.
    """
    mean = all_reduce_sum(x.double().sum(0)) / n  # (P, d)
    centred = (x - mean).transpose(0, 1)  # (P, n_r, d)
    scatter = all_reduce_sum(centred.mT @ centred)  # (P, d, d)
    cholesky, failed = torch.linalg.cholesky_ex(_ridge(scatter / max(n - 1, 1), regularization))
    if n > 2:
        others, _ = torch.linalg.cholesky_ex(_ridge(scatter, regularization * (n - 2)))
        leverage = torch.linalg.solve_triangular(others, centred.mT, upper=False).square().sum(1)  # (P, n_r)
        left_out = _without_itself(leverage, n)
    else:
        left_out = _of_two(centred.square().sum(2), n, regularization)
    return Gaussians(mean.float(), x.new_empty(x.shape[1], 0, x.shape[2]), _inverse(cholesky), left_out.T, failed)


def low_rank_form(x: Tensor, regularization: float) -> Gaussians:
    """Gaussians of x (n, P, d) float32, all images, by n x n matrices (Woodbury 1950): equal, and cheaper if n < d.

    With the deviations X (n, d) of one position and r = regularization, (X^T X / (n - 1) + r I)^-1 is
    (I - X^T (X X^T + r (n - 1) I)^-1 X) / r; factor = L^-1, where L L^T = X X^T + r (n - 1) I.
    """
    n = len(x)
    centred = x.transpose(0, 1).contiguous().double()  # (P, n, d)
    mean = centred.mean(1)  # (P, d)
    centred -= mean[:, None]
    gram = centred @ centred.mT  # (P, n, n)
    cholesky, failed = torch.linalg.cholesky_ex(_ridge(gram, regularization * max(n - 1, 1)))
    if n > 2:
        ridge = regularization * (n - 2)
        others, _ = torch.linalg.cholesky_ex(_ridge(gram, ridge))
        leverage = 1 - ridge * _inverse(others).square().sum(1)  # (P, n)
        left_out = _without_itself(leverage, n)
    else:
        left_out = _of_two(gram.diagonal(dim1=1, dim2=2), n, regularization)
    return Gaussians(mean.float(), centred.float(), _inverse(cholesky), left_out.T, failed)


def shrunk_gaussian(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, Cholesky factor and a failure flag of one Gaussian with Ledoit and Wolf's covariance, scikit-learn's.

    C = (1 - s) Sigma + s tr(Sigma) / D I with Sigma = S / n and the shrinkage s of Ledoit and Wolf (2004), lemma 3.3.

    Args:
        x: (n, D) float64. Returns (D,), (D, D), and (), True where C is singular: n < 3, or all images alike.
    """
    from sklearn.covariance import ledoit_wolf  # here, for it takes seconds to import and only this needs it

    covariance = torch.from_numpy(ledoit_wolf(x.cpu().numpy())[0]).to(x.device)
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    least = len(covariance) * torch.finfo(x.dtype).eps * covariance.diagonal().amax()  # rounding of a pivot
    failed = (failed > 0) | (cholesky.diagonal().square().amin() <= least) | (x == x[0]).all() | (len(x) < 3)
    return x.mean(0), cholesky, failed


def shrunk_left_out(x: Tensor) -> Tensor:
    """Each row's distance from the `shrunk_gaussian` of the others, inf if that is singular: (n, D) float64 -> (n,).

    Equal to refits, shrinkage included. With y_k, the m other rows centred, Ledoit and Wolf's shrinkage needs tr S,
    |S|_F^2 and the sum of |y_k|^4 only, which follow from sums over all rows; and in the axes of the whole S every
    (1 - s) S / m + s mu I is diagonal, but for the one term of the row that is left out.
    """
    n, dimensions = x.shape
    if n < 4:  # the shrinkage of two is 0
        return x.new_full((n,), torch.inf)
    x = x - x[0]  # exactly 0 for copies
    m, share, centred = n - 1, n / (n - 1), x - x.mean(0)
    tiny, eps = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    gram = n <= dimensions  # the smaller of X X^T and S = X^T X, which have the same spread
    spread, axes = torch.linalg.eigh(centred @ centred.T if gram else centred.T @ centred)
    spread = spread.clamp(min=0)  # (r,), ascending
    energy = axes.square() * spread if gram else (centred @ axes).square()  # (n, r), squared coordinates
    squares, along = centred.square().sum(1), energy @ spread  # (n,) each: |x|^2, x^T S x

    total, moved = squares.sum(), squares / m**2
    trace = total - share * squares
    norm = spread.square().sum() - 2 * share * along + (share * squares).square()
    fourth = squares.square().sum() + 2 * moved * total + n * moved.square() - (share**2 * squares).square()
    fourth += 4 / m * (centred @ (centred.T @ squares)) + 4 / m**2 * along
    mean_variance = trace / (m * dimensions)
    delta = (norm / m**2 / dimensions - mean_variance.square()).clamp(min=0)
    beta = fourth / m - norm / m**2
    beta = torch.where(beta > 16 * eps * total**2 / m, beta, 0) / (m * dimensions)  # below it is rounding
    beta = beta.minimum(delta)
    shrinkage = torch.where(beta > 0, beta / delta, 0)

    weight, amount = (1 - shrinkage) / m, shrinkage * mean_variance  # (n,) each
    variances = weight[:, None] * spread + amount[:, None]  # (n, r)
    leverage = (energy / variances.clamp(min=tiny)).sum(1)  # (n,)
    rest = 1 - weight * share * leverage
    least = amount if gram else variances[:, 0]
    singular = (least <= dimensions * eps * trace / m) | (rest <= 100 * eps)
    distances = torch.where(singular, torch.inf, share * (leverage / rest.clamp(min=eps)).sqrt())
    for i in (trace < 1e-3 * total).nonzero()[:, 0].tolist():  # one at most; differences of its sums would cancel
        mean, cholesky, failed = shrunk_gaussian(torch.cat([x[:i], x[i + 1 :]]))
        away = torch.linalg.solve_triangular(cholesky, (x[i] - mean)[:, None], upper=False).norm()
        distances[i] = torch.where(failed, torch.inf, away)
    return distances


def _without_itself(leverage: Tensor, n: int) -> Tensor:
    """Distances from the Gaussian of the n - 1 others; leverage is delta^T (S + r (n - 2) I)^-1 delta, n > 2."""
    share = n / (n - 1)
    rest = (1 - share * leverage).clamp(min=torch.finfo(leverage.dtype).eps)  # above 0 but for rounding
    return ((n - 2) * share**2 * leverage.clamp(min=0) / rest).sqrt()


def _of_two(squared: Tensor, n: int, regularization: float) -> Tensor:
    """The same of 2 images, of which one remains, by their squared distance from the mean; of 1 image: inf."""
    return 2 * (squared / regularization).sqrt() if n == 2 else torch.full_like(squared, torch.inf)


def _ridge(matrices: Tensor, amount: float) -> Tensor:
    """(P, m, m) + amount I."""
    matrices = matrices.clone()
    matrices.diagonal(dim1=1, dim2=2).add_(amount)
    return matrices


def _inverse(lower: Tensor) -> Tensor:
    """Inverses of lower triangular (P, m, m)."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)


def put_left_out(distances: Tensor, table: Tensor, numbers: Tensor, leave_out: Tensor) -> Tensor:
    """distances (B, ...) with those of fitted images replaced by their rows of table (N, ...).

    numbers (N,) ascending are the fitted images', leave_out (B,) the images'; one that was not fitted stays.
    """
    row = torch.searchsorted(numbers, leave_out).clamp(max=len(numbers) - 1)  # (B,)
    fitted = (numbers[row] == leave_out).view(-1, *[1] * (distances.dim() - 1))  # (B, 1, ...)
    return torch.where(fitted, table[row].to(distances.dtype), distances)
