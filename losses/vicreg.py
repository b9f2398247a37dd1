"""The loss of VICReg."""

from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import gather
from runtime.precision import at_least_float32


@at_least_float32
def vicreg(
    z: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    form: Literal["official", "solo"] = "official",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Variance, invariance and covariance (Bardes, Ponce & LeCun 2022, eq. 1 to 6; official main_vicreg.py).

        invariance: mean over images and dimensions of (z1 - z2)^2
        variance:   mean over views and dimensions of max(0, 1 - sqrt(var + 1e-4))
        covariance: sum over both views of  sum over i != j of cov_ij^2 / D

    each times its coefficient; var and cov, with N - 1, over the images of all processes. More than two views: the
    mean over pairs, the mean over views, and twice the mean over views. The paper and solo-learn add the variance terms
    of the two views up, so that their 25 is 50 here: `form="solo"`. Computed in at least float32 with autocast off.

    Args:
        z: (B, V, D) embeddings of V >= 2 views, not normalized; B equal on all ranks and two images or more in all.

    Returns:
        The scalar loss, whose gradient averaged over ranks is that of the whole batch, and the three terms before their
        coefficients, detached.
    """
    if z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"vicreg needs (B, V, D) with two views or more, not {tuple(z.shape)}")
    _, views, features = z.shape
    apart = torch.stack([F.mse_loss(one, other) for one, other in combinations(z.unbind(1), 2)]).mean()
    z = gather(z)  # (N, V, D)
    if len(z) < 2:
        raise ValueError("vicreg needs two images or more for a variance")
    z = z - z.mean(0)
    variances = z.square().sum(0) / (len(z) - 1)  # (V, D)
    spread = F.relu(1 - (variances + 1e-4).sqrt()).mean() * (2 if form == "solo" else 1)
    cov = torch.einsum("nvi,nvj->vij", z, z) / (len(z) - 1)  # (V, D, D)
    cov.diagonal(dim1=1, dim2=2).zero_()  # taken off the sum of squares instead, it would leave its rounding error
    correlation = 2 * cov.square().sum() / (views * features)
    loss = invariance * apart + variance * spread + covariance * correlation
    terms = {"invariance": apart, "variance": spread, "covariance": correlation}
    return loss, {name: term.detach() for name, term in terms.items()}
