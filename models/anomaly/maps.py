"""Anomaly maps: from a grid of patch scores to a smooth map at the input's resolution, with padding left out."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# d c b a | a b c d | d c b a (scipy's "reflect") or d c b | a b c d | c b a (torch's)
Border = Literal["repeat", "mirror"]

ImageScore = Literal["max", "top1", "mean"]  # of an image, from its map


def upsample(grid: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Bilinear, (B, h, w) -> (B, *size). RD4AD aligns the corners, PatchCore and PaDiM do not."""
    return F.interpolate(grid[:, None], size=tuple(size), mode="bilinear", align_corners=align_corners)[:, 0]


def smooth(maps: Tensor, sigma: float = 4.0, *, border: Border = "repeat") -> Tensor:
    """Gaussian blur of (B, H, W) maps, equal to scipy.ndimage.gaussian_filter on each: separable, cut off at 4 sigma,
    edge pixel repeated at the border, also beyond a small map's width. `mirror` is anomalib's border.

    Each axis is one product with a banded matrix, ten times faster on a CPU than conv2d. It computes in float64, which
    neither autocast nor TF32 touches, and returns the maps' own dtype.
    """
    rows, columns = (_blur_matrix(n, sigma, border, maps.device) for n in maps.shape[1:])
    return (rows @ maps.double() @ columns.T).to(maps.dtype)


def render(
    grid: Tensor,
    size: tuple[int, int],
    valid: Tensor | None = None,
    *,
    nearest: bool = False,
    border: Border = "repeat",
) -> Tensor:
    """Patch scores (B, h, w) -> smooth maps (B, *size): upsampled, sigma 4.

    `valid` bool (B, h, w), False for patches in padding: pixels are means over the valid patches alone, with the
    weights that upsampling and blur give them (normalized convolution, Knutsson and Westin 1993); 0 out of their reach.
    """

    def spread(x: Tensor) -> Tensor:
        if nearest:
            return smooth(F.interpolate(x[:, None], size=tuple(size), mode="nearest")[:, 0], border=border)
        return smooth(upsample(x, size, align_corners=False), border=border)

    if valid is None:
        return spread(grid)
    weight = spread(valid.to(grid.dtype))
    return torch.where(weight > 0, spread(grid * valid) / weight, 0)


def smooth_inside(maps: Tensor, valid: Tensor | None) -> Tensor:
    """`smooth`, but padding gives nothing to the pixels of the image: their means are over valid pixels alone."""
    if valid is None:
        return smooth(maps)
    return smooth(blank(maps, valid)) / smooth(valid.to(maps.dtype)).clamp(min=1e-6)


def grid_valid(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """bool (B, H, W) -> (B, h, w): patches of which at least half is image, or those with most of it."""
    share = F.adaptive_avg_pool2d(valid[:, None].float(), tuple(size))[:, 0]
    return (share >= share.amax((1, 2), keepdim=True).clamp(max=0.5)) & (share > 0)


def pool(stage: Tensor, valid: Tensor | None) -> Tensor:
    """(B, C, h, w) -> (B, C): the mean over the patches that `valid` (B, H, W) leaves, all of them when it is None."""
    if valid is None:
        return stage.mean((2, 3))
    weights = grid_valid(valid, stage.shape[-2:])[:, None].to(stage.dtype)  # (B, 1, h, w)
    return (stage * weights).sum((2, 3)) / weights.sum((2, 3))


def peak(maps: Tensor, valid: Tensor | None = None) -> Tensor:
    """The centre y, x of the largest pixel of each map (B, H, W) outside padding: (B, 2)."""
    at = blank(maps, valid).flatten(1).argmax(1)  # (B,)
    return torch.stack([at // maps.shape[2], at % maps.shape[2]], 1) + 0.5  # (B, 2)


def image_score(maps: Tensor, valid: Tensor | None, how: ImageScore) -> Tensor:
    """One number per image from its map (B, H, W), of its n pixels outside padding: (B,).

    max: the largest pixel. top1: mean of the largest 1 %, n // 100 pixels but at least one (as official CDO's and most
    others' int(0.01 n)). mean: of all. An image that is all padding has 0.

    Raises:
        ValueError: `how` is none of these.
    """
    if how not in get_args(ImageScore):
        raise ValueError(f"image score {how!r}: it is max, top1 or mean")
    pixels = maps.flatten(1)  # (B, H W)
    inside = torch.ones_like(pixels, dtype=torch.bool) if valid is None else valid.flatten(1)  # (B, H W)
    count = inside.sum(1)  # (B,)
    if how == "mean":
        return pixels.where(inside, 0).sum(1) / count.clamp(min=1)
    share = torch.ones_like(count) if how == "max" else (count // 100).clamp(min=1)  # (B,) pixels that count
    most = 1 if how == "max" else max(1, pixels.shape[1] // 100)  # no image has more: nothing waits for the device
    largest = pixels.masked_fill(~inside, -torch.inf).topk(most, dim=1).values  # (B, most)
    counted = torch.arange(most, device=maps.device) < torch.minimum(share, count)[:, None]  # (B, most)
    return largest.where(counted, 0).sum(1) / share


def blank(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Maps (B, H, W) with 0 in padding."""
    return maps if valid is None else maps.masked_fill(~valid, 0)


def _blur_matrix(n: int, sigma: float, border: Border, device: torch.device) -> Tensor:
    """(n, n) float64: row i holds the weights of all n pixels in the blurred pixel i, mirrored ones added up."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=device)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    period = 2 * n if border == "repeat" else max(2 * n - 2, 1)
    sources = (torch.arange(n, device=device)[:, None] + offsets) % period  # (n, 2 radius + 1)
    sources = torch.where(sources < n, sources, (2 * n - 1 if border == "repeat" else 2 * n - 2) - sources)
    weights = (kernel / kernel.sum()).expand(n, -1)
    return torch.zeros(n, n, dtype=torch.float64, device=device).scatter_add_(1, sources, weights)
