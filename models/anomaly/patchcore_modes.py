"""What differs between the published forms of PatchCore: embedding, projection, start, distance, weight, map.

paper: Roth et al. 2022. amazon: github.com/amazon-science/patchcore-inspection (the authors' code, whose numbers are
quoted everywhere). anomalib: github.com/open-edge-platform/anomalib 2.x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from models.anomaly.maps import Border


def concatenate(features: list[Tensor], side: int, width: int | None) -> Tensor:
    """Paper and anomalib: local means of each stage [(B, C_i, H_i, W_i)], bilinearly at the finest one's resolution,
    side by side; more than `width` channels are averaged over to that many -> (B, H, W, D)."""
    size = max(feature.shape[-2:] for feature in features)
    pooled = [F.avg_pool2d(feature, side, stride=1, padding=side // 2) for feature in features]
    aligned = [F.interpolate(feature, size, mode="bilinear", align_corners=False) for feature in pooled]
    patches = torch.cat(aligned, dim=1).permute(0, 2, 3, 1)  # (B, H, W, sum of C_i)
    if width and patches.shape[-1] > width:
        patches = F.adaptive_avg_pool1d(patches.flatten(1, 2), width).unflatten(1, size)  # (B, H, W, D)
    return patches


def average_twice(features: list[Tensor], side: int, width: int | None) -> Tensor:
    """amazon: every stage's unfolded (C, side, side) patch averaged to `width` numbers, then all stages' together.

    Their order is unfold, upsample, average; averaging first is the same, since both are linear, and 9 times cheaper.
    Stages of 512 and 1024 channels (ResNet-50, Wide-ResNet-50-2) under a 3 x 3 patch and width 1024 have a closed form:
    512 x 9 -> 1024 takes windows of 5 of 9 offsets that share the centre, 1024 x 9 -> 1024 is the local mean, and
    2048 -> 1024 averages neighbours. So nothing is unfolded: (9 mean(F2) + F2) / 10 and the mean of channel pairs of
    mean(F3).
    """
    size = max(feature.shape[-2:] for feature in features)
    if side == 3 and width == 1024 and [feature.shape[1] for feature in features] == [512, 1024]:
        fine, coarse = (F.avg_pool2d(feature, 3, stride=1, padding=1) for feature in features)
        coarse = coarse.unflatten(1, (512, 2)).mean(2)  # (B, 512, H_3, W_3)
        coarse = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        return torch.cat([(9 * fine + features[0]) / 10, coarse], dim=1).permute(0, 2, 3, 1)  # (B, H, W, 1024)
    stages = []
    for feature in features:
        patches = F.unfold(feature, side, padding=side // 2).transpose(1, 2)  # (B, H_i W_i, C_i side^2)
        means = F.adaptive_avg_pool1d(patches, width).transpose(1, 2)  # (B, width, H_i W_i)
        stages.append(F.interpolate(means.unflatten(2, feature.shape[-2:]), size, mode="bilinear", align_corners=False))
    stacked = torch.cat(stages, dim=1).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, stages x width)
    return F.adaptive_avg_pool1d(stacked, width).unflatten(1, size)  # (B, H, W, width)


def gaussian(channels: int, width: int, generator: Generator) -> Tensor:
    """paper: independent normal directions of variance 1 / width (Johnson-Lindenstrauss): (channels, width)."""
    return torch.randn(channels, width, generator=generator) / width**0.5


def linear_layer(channels: int, width: int, generator: Generator) -> Tensor:
    """amazon: the initial weight of nn.Linear(channels, width, bias=False), uniform within 1 / sqrt(channels)."""
    return (2 * torch.rand(channels, width, generator=generator) - 1) / channels**0.5


def sparse(channels: int, width: int, generator: Generator) -> Tensor:
    """anomalib: scikit-learn's SparseRandomProjection (Li et al. 2006), density 1 / sqrt(channels)."""
    density = channels**-0.5
    draw = torch.rand(channels, width, generator=generator)
    signs = (draw < density / 2).float() - (draw > 1 - density / 2).float()
    return signs / (density * width) ** 0.5


def paper_width(n_patches: int) -> int:  # noqa: ARG001
    return 128


def anomalib_width(n_patches: int) -> int:
    """scikit-learn's johnson_lindenstrauss_min_dim for eps = 0.9."""
    return max(1, int(4 * math.log(n_patches) / (0.9**2 / 2 - 0.9**3 / 3)))


@dataclass(frozen=True)
class Mode:
    """One published form."""

    embed: Callable[[list[Tensor], int, int | None], Tensor]
    embed_dim: int | None  # None: as many as the stages have together
    project: Callable[[int, int, Generator], Tensor]
    width: Callable[[int], int]  # of the projection, for a number of patches
    starts: int  # 1: the greedy search begins with one random patch; n: with the mean distance to n patches, none kept
    squared: bool  # patch scores are squared distances (faiss)
    neighbors: int  # b of the paper's eq. 7; 1: no weighting
    nearest: bool  # the map is enlarged by repeating pixels, not bilinearly
    border: Border  # of the blur


MODES = {
    "paper": Mode(concatenate, 1024, gaussian, paper_width, 1, False, 9, False, "repeat"),
    "amazon": Mode(average_twice, 1024, linear_layer, paper_width, 10, True, 1, False, "repeat"),
    "anomalib": Mode(concatenate, None, sparse, anomalib_width, 1, False, 9, True, "mirror"),
}
