"""The loss of Barlow Twins."""

from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from runtime.distributed import gather, world_size
from runtime.precision import at_least_float32


@at_least_float32
def barlow_twins(z: Tensor, weight: float = 0.0051, *, gradient: Literal["exact", "official"] = "exact") -> Tensor:
    """Redundancy reduction (Zbontar et al. 2021, eq. 1 and 2; official main.py).

        C = mean over images of  z1_i z2_j,  each dimension of each view standardized over the images first
        loss = sum over i of (C_ii - 1)^2 + weight * sum over i != j of C_ij^2

    over the images of all processes, standardized together as under the official SyncBatchNorm (biased variance plus
    1e-5). More than two views: the mean over unordered pairs of views. Computed in at least float32 with autocast off.

    Args:
        z: (B, V, D) embeddings of V >= 2 views; B equal on all ranks.
        weight: lambda, the weight of the off-diagonal terms.
        gradient: `exact` is the gradient of a single process, however many there are. The official code sums C by an
            all_reduce that autograd does not see, so with W processes its gradient is 1 / W of that, and its learning
            rate of biases was tuned with it. `official` divides likewise.

    Returns:
        The scalar, equal on all ranks.
    """
    if z.ndim != 3 or z.shape[1] < 2:
        raise ValueError(f"barlow_twins needs (B, V, D) with two views or more, not {tuple(z.shape)}")
    z = gather(z)  # (W B, V, D)
    z = (z - z.mean(0)) * (z.var(0, correction=0) + 1e-5).rsqrt()
    losses = []
    for first, second in combinations(z.unbind(1), 2):
        c = first.T @ second / len(z)  # (D, D)
        diagonal = c.diagonal()
        losses.append((diagonal - 1).square().sum() + weight * (c.square().sum() - diagonal.square().sum()))
    loss = torch.stack(losses).mean()
    if gradient == "official":
        loss = loss.detach() + (loss - loss.detach()) / world_size()
    return loss
