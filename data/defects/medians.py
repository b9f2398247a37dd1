"""Medians of images with two values or of few pixels, without sorting all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.memory import send


def majority(where: Tensor, size: int) -> Tensor:
    """Median of size x size pixels, borders repeated: bool (B, H, W) -> bool (B, H, W)."""
    around = _padded(where.float(), size // 2)
    return F.avg_pool2d(around, size, stride=1, divisor_override=1)[:, 0] > size * size / 2


def disk_median(values: Tensor, where: Tensor, radius: int = 5) -> Tensor:
    """Median over the pixels within `radius`, borders repeated, as skimage's median(disk): (H, W) -> (H, W).

    A CPU computes it only `where` bool (H, W) is true and leaves 0 elsewhere; other devices need not wait for a count.
    """
    size, wide = values.shape, values.shape[1] + 2 * radius
    at = torch.arange(-radius, radius + 1)
    rows, columns = (at[:, None] ** 2 + at**2 <= radius**2).nonzero().unbind(1)
    disk = send(rows * wide + columns, values.device)  # (81,): places in a padded image
    everything = torch.arange(values.numel(), device=values.device)
    pixels = everything[where.flatten()] if values.device.type == "cpu" else everything
    first = pixels // size[1] * wide + pixels % size[1]
    around = _padded(values[None], radius).flatten()[first[:, None] + disk]  # (pixels, 81)
    return torch.zeros_like(values).flatten().index_copy_(0, pixels, around.median(1).values).view(size)


def _padded(values: Tensor, width: int) -> Tensor:
    return F.pad(values[:, None], [width] * 4, mode="replicate")  # (B, 1, H + 2 width, W + 2 width)
