"""Which images are unlike the others? Two scores of every image, by features of a backbone and without any labels.

The leave-one-out distance asks how far the nearest other images are as a whole; within a class it finds what is filed
wrongly. MuSc's mutual scoring asks of every patch whether most other images have one like it; it needs one kind of
object or surface, and finds small things too.

Letters: N images, B of a batch, R that others are compared with; P patches, D and C channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.loading import Loader
from data.normalize import normalization_of, normalize
from evaluation.features import extract
from runtime.distributed import gather_rows, is_main
from search.bounds import full_precision
from search.nearest import nearest

NEIGHBORS = 10  # so that a few outliers of one kind do not vouch for each other
FENCE = 3  # `excess` above which an image is an outlier: Tukey's outer fence, 1 in 850,000 of a normal distribution
STAGES = (3, 4)  # of the backbone: finer ones cost 16 times as much, and see texture
WINDOWS = (1, 3, 5)  # MuSc's aggregation degrees, in patches
SHARE = 0.3  # of the other images, those most like it, that a patch's score is the mean of
PAIRS_AT_ONCE = 2**24  # of patches: 64 MiB of float32


def leave_one_out(features: Tensor, groups: Tensor, k: int = NEIGHBORS) -> Tensor:
    """Distance of each image to the k-th nearest other one of its group, float64 (N,) on the CPU (Ramaswamy et al.
    2000); of L2-normalized features (N, D), so 0 for k copies, sqrt(2) for orthogonal ones.

    Of groups (N,) with k or fewer images the farthest one counts; an image alone in its group has NaN.
    """
    unit = F.normalize(features.double(), dim=1).float()
    distances = torch.full((len(unit),), torch.nan, dtype=torch.float64)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        some, numbers = unit[members.to(unit.device)], torch.arange(len(members), device=unit.device)
        if len(some) > 1:
            found, _ = nearest(some, some, min(k, len(some) - 1), exclude=(numbers, numbers))
            distances[members.cpu()] = found[:, -1].double().cpu()
    return distances


def excess(scores: Tensor, groups: Tensor) -> Tensor:
    """How many interquartile ranges each score lies above the upper quartile of its group; float64 (N,).

    So groups that are dense and groups that are not can stand in one list. Where the range is 0, what is above the
    quartile has inf. NaN in groups of fewer than four scores that are numbers, which have no quartiles to speak of.
    """
    values, out = scores.double().cpu(), torch.full((len(scores),), torch.nan, dtype=torch.float64)
    for group in groups.unique():
        members = ((groups == group).cpu() & ~values.isnan()).nonzero()[:, 0]
        if len(members) >= 4:
            some = values[members].numpy()
            lower, upper = np.percentile(some, (25, 75))
            with np.errstate(divide="ignore", invalid="ignore"):
                above = (some - upper) / (upper - lower)
            out[members] = torch.from_numpy(np.nan_to_num(above, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return out


@torch.no_grad()
def mutual_scoring(
    backbone: nn.Module, load: Callable[[Tensor], Loader], images: Tensor, *, references: int, seed: int = 0
) -> Tensor:
    """MuSc's score of each image (Li et al. 2024, "MuSc: zero-shot industrial anomaly classification and segmentation
    with mutual scoring of the unlabeled images"), float64 (N,) on the CPU, equal on all ranks.

    The score is the maximum over positions of the mean over `STAGES` and `WINDOWS` of `patch_scores`, as in the
    official code. Deviations: each image is compared with at most `references` others drawn at random, the same for
    all, so that time grows with N and not with N^2, and memory not at all (the official code cuts the set into pieces
    for that; with N or more references this is the paper's); the stages of a CNN are of several sizes, and the scores
    of the coarser one are interpolated; no smoothing over similar images (RsCIN), which blames or excuses an image for
    what its neighbors show.

    Args:
        backbone: in eval mode, on the loaders' device, with `forward_stages`.
        load: positions in a data set, ascending -> a Loader of these images, not shuffled.
        images: positions of the N images.
    """
    if len(images) < 2:
        return torch.full((len(images),), torch.nan, dtype=torch.float64)
    drawn = np.random.default_rng(seed).permutation(len(images))[:references]
    chosen = images[torch.from_numpy(np.sort(drawn))]
    network, loader = Maps(backbone), load(images)
    flat, _ = extract(network, load(chosen), progress="references")  # (R, sum of C h w)
    others = network.split(flat, loader.dataset[int(chosen[0])][0][None].to(loader.device))
    # The empty ones are for a rank without images.
    scores = [torch.empty(0, dtype=torch.float64, device=loader.device)]
    indices = [torch.empty(0, dtype=torch.int64, device=loader.device)]
    bar = {"desc": "mutual scoring", "unit": "batch", "leave": False, "disable": not is_main()}
    for batch, *_, index in tqdm(loader.epoch(0), total=len(loader), **bar):
        scores.append(image_scores(network.stages(batch), others, index[:, None] == chosen))
        indices.append(index.to(loader.device))
    order = gather_rows(torch.cat(indices)).argsort()
    return gather_rows(torch.cat(scores))[order].cpu()


class Maps(nn.Module):
    """A backbone's `STAGES`, as features of its images."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone: Any = backbone
        self.normalization = normalization_of(backbone)

    def stages(self, images: Tensor) -> list[Tensor]:
        """uint8 (B, 3, H, W) -> float32 [(B, C, h, w)]."""
        return self._chosen(normalize(images, self.normalization))

    def forward(self, x: Tensor) -> Tensor:
        """Normalized (B, 3, H, W) -> (B, sum of C h w)."""
        return torch.cat([maps.flatten(1) for maps in self._chosen(x)], 1)

    def split(self, flat: Tensor, example: Tensor) -> list[Tensor]:
        """(R, sum of C h w), of images like the example, uint8 (1, 3, H, W) -> [(R, C, h, w)]."""
        shapes = [maps.shape[1:] for maps in self.stages(example)]
        parts = flat.split([shape.numel() for shape in shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]

    def _chosen(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone.forward_stages(x, last=max(STAGES))
        return [maps[stage - 1].float() for stage in STAGES]


def image_scores(batch: list[Tensor], references: list[Tensor], excluded: Tensor) -> Tensor:
    """Maps of each stage (B, C, h, w), those of the references (R, C, h, w) -> scores float64 (B,); `excluded` as in
    `patch_scores`."""
    size = max((maps.shape[2:] for maps in batch), key=lambda shape: shape[0] * shape[1])
    total = torch.zeros(len(batch[0]), *size, dtype=torch.float64, device=batch[0].device)
    for maps, others in zip(batch, references):
        for window in WINDOWS:
            found = patch_scores(window_means(maps, window), window_means(others, window), excluded)  # (B, P)
            grid = found.double().unflatten(1, maps.shape[2:])[:, None]  # (B, 1, h, w)
            total += F.interpolate(grid, size, mode="bilinear", align_corners=True)[:, 0]
    return total.flatten(1).amax(1) / (len(batch) * len(WINDOWS))


def window_means(maps: Tensor, window: int) -> Tensor:
    """MuSc's patches ("LNAMD"): maps (B, C, h, w) -> L2-normalized (B, h w, C).

    The whole map is normalized to mean 0 and variance 1, then averaged over window x window patches; whether
    zeros beyond the border count makes no difference, since only directions are kept.
    """
    means = F.avg_pool2d(F.layer_norm(maps, maps.shape[1:]), window, stride=1, padding=window // 2)
    return F.normalize(means.flatten(2).transpose(1, 2), dim=2)  # (B, h w, C)


def patch_scores(queries: Tensor, references: Tensor, excluded: Tensor, share: float = SHARE) -> Tensor:
    """Mutual scoring (equations 4 and 5): of each patch the mean of the lowest `share` of its distances to the R
    images, a distance to an image being that to its nearest patch.

    Args:
        queries: (B, P, C) L2-normalized. references: (R, P, C) likewise.
        excluded: bool (B, R), where query and reference are the same image. The share is of the others, rounded down,
            but at least one.

    Returns:
        (B, P) float32; NaN for an image without any other.
    """
    n_images, n_patches, _ = queries.shape
    flat = queries.flatten(0, 1)  # (B P, C)
    at_once = max(1, PAIRS_AT_ONCE // max(1, len(flat) * references.shape[1]))
    with full_precision(queries.device):
        cosines = [
            (flat @ some.flatten(0, 1).T).unflatten(1, some.shape[:2]).amax(2)  # (B P, r P) -> (B P, r)
            for some in references.split(at_once)
        ]
    distances = (2 - 2 * torch.cat(cosines, 1)).clamp(min=0).sqrt().unflatten(0, (n_images, n_patches))  # (B, P, R)
    ordered = distances.masked_fill(excluded[:, None].to(distances.device), torch.inf).sort(2).values
    others = (~excluded).sum(1).to(distances.device)  # (B,)
    counted = (others.double() * share).long().clamp(min=1)  # (B,)
    ranks = torch.arange(len(references), device=distances.device)
    lowest = ordered.masked_fill(ranks >= counted[:, None, None], 0)
    mean = lowest.sum(2) / counted[:, None]  # (B, P)
    return mean.masked_fill((others == 0)[:, None], torch.nan)
