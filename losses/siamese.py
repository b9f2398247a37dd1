"""Losses of BYOL and SimSiam: predictions of one view against projections of the others, without negatives."""

import torch.nn.functional as F
from torch import Tensor

from runtime.precision import at_least_float32


@at_least_float32
def cross_view_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over images and ordered pairs of views u != v of cos(prediction_u, target_v).

    Args:
        predictions: (B, V, D) of V >= 2 views, normalized here.
        targets: (B, V, D), normalized here; no gradient flows into them.

    Returns:
        The scalar mean over this process's images: equal batches on all ranks make DDP's average the global one.
        Computed in at least float32 with autocast off.
    """
    if predictions.ndim != 3 or predictions.shape != targets.shape or predictions.shape[1] < 2:
        shapes = f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"views are compared as two (B, V, D) of one shape with V >= 2, not {shapes}")
    p, z = F.normalize(predictions, dim=2), F.normalize(targets.detach(), dim=2)
    views = p.shape[1]
    # The sum over u != v of p_u.z_v is that over all pairs without those of a view with itself
    all_pairs = (p.sum(1) * z.sum(1)).sum(1)  # (B, D) -> (B,)
    same_view = (p * z).sum((1, 2))  # (B, V, D) -> (B,)
    return (all_pairs - same_view).mean() / (views * (views - 1))


def simsiam(predictions: Tensor, targets: Tensor) -> Tensor:
    """-cos, symmetrized (Chen & He 2021, eq. 1 to 4): with two views (D(p1, z2) + D(p2, z1)) / 2, from 1 to -1. More
    than two: the mean over ordered pairs (FastSiam averages the targets instead)."""
    return -cross_view_cosine(predictions, targets)


def byol(predictions: Tensor, targets: Tensor) -> Tensor:
    """2 - 2 cos, summed over the two directions (Grill et al. 2020, eq. 2; official byol_experiment.py loss_fn), from 8
    to 0. More than two views: twice the mean over ordered pairs."""
    return 4 - 4 * cross_view_cosine(predictions, targets)
