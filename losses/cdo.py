"""CDO's loss: an apprentice follows its expert where an image is normal and departs from it where it is not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.distributed import all_reduce_sum, world_size
from runtime.precision import at_least_float32

LEAST = 1e-6  # smaller discrepancies count as this much in the weights, which would be infinite at 0


@at_least_float32
def discrepancy(expert: list[Tensor], apprentice: list[Tensor], *, unit_levels: bool = False) -> Tensor:
    """d = sum over channels of (e / |e| - a / |a|)^2 at every position of the first level, 0 to 4: (L, B, H, W).

    All levels are brought to the first one's H x W first: bilinear, corners aligned. Computed in at least float32
    with autocast off.

    Args:
        expert, apprentice: L maps each, pairwise (B, C_l, H_l, W_l).
        unit_levels: also scale every vector to length 1 before its level is enlarged, so that the four vectors that a
            position is interpolated from count equally: v2's forward pass (model/cdo.py). v1 has no such step.
    Raises:
        ValueError: the two lists differ in length or a pair in shape.
    """
    shapes = [[tuple(feature.shape) for feature in features] for features in (expert, apprentice)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expert's maps {shapes[0]} and apprentice's maps {shapes[1]} differ")
    size = expert[0].shape[-2:]
    pairs = [[_unit(feature, size, unit_levels) for feature in pair] for pair in zip(expert, apprentice)]
    levels = [(e - a).square().sum(1) for e, a in pairs]  # (B, H, W) each
    return torch.stack(levels)


@at_least_float32
def collaborative_discrepancy(
    expert: list[Tensor],
    apprentice: list[Tensor],
    abnormal: Tensor,
    gamma: float = 2.0,
    *,
    unit_levels: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Small discrepancies on normal positions, large ones on synthetic defects, the hard ones weighing most.

        L = sum over levels of B (sum_n w_n d_n - sum_s w_s d_s) / (sum_n w_n + sum_s w_s)
        w_n = (d_n / mean d_n)^gamma,  w_s = (mean d_s / d_s)^gamma,  both without gradient

    with n the normal and s the abnormal positions of the whole batch, all processes together, and d from
    `discrepancy`. Cao et al. 2023, "Collaborative discrepancy optimization for reliable image anomaly localization",
    as in the official losses (models/CDO.py of v1, loss/cdo_loss.py of v2): the factor B, the number of images, is
    theirs and makes the learning rate depend on the batch size. Unlike there, d is at least 1e-6 in the weights.

    The losses of W processes with equally many images average to that of one with all, and so do the gradients.

    Args:
        expert, apprentice: as for `discrepancy`; gradients flow into both, so detach the expert's.
        abnormal: bool (B, h, w) at any resolution, True on synthetic defects; each position takes the value of the
            nearest pixel. gamma: at 0 all positions weigh the same. unit_levels: see `discrepancy`; v2's.
    Returns:
        The scalar loss, and `normal` and `abnormal`: mean d of this process's positions, 0 where there are none.
    """
    d = discrepancy(expert, apprentice, unit_levels=unit_levels)  # (L, B, H, W)
    nearest = F.interpolate(abnormal[:, None].to(d.dtype), d.shape[-2:], mode="nearest")[:, 0] > 0  # (B, H, W)
    groups = torch.stack([~nearest, nearest]).flatten(1).to(d.dtype)  # (2, B H W)
    held = d.detach().clamp(min=LEAST).flatten(1)  # (L, B H W)
    sums = torch.stack([(held * group).sum(1) for group in groups], 1)  # (L, 2); no product, which TF32 would round
    sums = torch.cat([sums, groups.sum(1)[None]])  # (L + 1, 2), the last row counts positions
    whole = all_reduce_sum(sums)
    normal, odd = (whole[:-1] / whole[-1].clamp(min=1)).clamp(min=LEAST).T[..., None]  # (L, 1) each, mean d
    weights = torch.where(nearest.flatten(), odd / held, held / normal) ** gamma  # (L, B H W)
    total = all_reduce_sum(weights.sum(1))  # (L,)
    signed = torch.where(nearest.flatten(), -weights, weights).view_as(d)  # (L, B, H, W)
    seen = (sums[:-1] / sums[-1].clamp(min=1)).mean(0)  # (2,)
    each = (signed * d).sum((1, 2, 3)) / total  # (L,)
    batch = world_size() * d.shape[1]
    return world_size() * batch * each.sum(), {"normal": seen[0], "abnormal": seen[1]}


def _unit(feature: Tensor, size: torch.Size, unit_first: bool) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), every position's vector of length 1."""
    feature = F.normalize(feature, dim=1) if unit_first else feature
    return F.normalize(F.interpolate(feature, size, mode="bilinear", align_corners=True), dim=1)
