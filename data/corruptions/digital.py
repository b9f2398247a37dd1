"""What happens to an image after it was taken: elastic warps and coarse pixels. (JPEG: jpeg.py.)

Both take pixels (B, 3, H, W) in [0, 1] and give float (B, 3, H, W).
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.random_numbers import between, uniform
from data.corruptions.fields import Key, smooth, uniform_field
from runtime.memory import send


def pixelate(pixels: Tensor, key: Key, share: float) -> Tensor:  # noqa: ARG001
    """Box-filtered to that share of its size and back, in whole levels after each axis: Pillow's, level for level."""
    height, width = pixels.shape[2:]
    levels = (pixels * 255).round_().double()
    for rows, columns in ((max(1, int(height * share)), max(1, int(width * share))), (height, width)):
        across, down = (
            send(box_matrix(stored, size), pixels.device)
            for stored, size in ((levels.shape[3], columns), (levels.shape[2], rows))
        )
        levels = (levels @ across.T + 0.5).floor_()  # columns first
        levels = (down @ levels + 0.5).floor_()
    return (levels / 255).float()


@cache
def box_matrix(stored: int, size: int) -> Tensor:
    """Pillow's BOX filter, which makes `size` pixels of `stored`: float64 (size, stored), in parts of 2^22.

    A pixel on the edge of two boxes is in one of them or in both as the rounding of float64 has it, so the sums are in
    the order of Pillow's Resample.c.
    """
    scale = stored / size
    wide = max(scale, 1.0)
    center = (torch.arange(size, dtype=torch.float64) + 0.5)[:, None] * scale  # (size, 1)
    first, end = (center - 0.5 * wide + 0.5).trunc(), (center + 0.5 * wide + 0.5).trunc()
    pixel = torch.arange(stored, dtype=torch.float64)  # (stored,)
    place = (pixel - center + 0.5) * (1 / wide)  # (size, stored)
    inside = ((place > -0.5) & (place <= 0.5) & (pixel >= first) & (pixel < end)).double()
    return (inside / inside.sum(1, keepdim=True) * 2**22 + 0.5).floor_() / 2**22


def elastic_transform(pixels: Tensor, key: Key, alpha: float, sigma: float, shift: float) -> Tensor:
    """A random affine map, then displacements by smoothed noise.

    Three points, a third of the short side from the middle, move by up to `shift` pixels; then each pixel is displaced
    by `alpha` x uniform noise in [-1, 1), smoothed by `sigma`. Bilinear both times; OpenCV rounds the first's places to
    1/32 of a pixel, this does not.
    """
    size, device = pixels.shape[2:], pixels.device
    rows, columns = (torch.arange(side, device=device, dtype=torch.float64) for side in size)
    steps = send(affine_maps(uniform((*key, 0), 6), size, shift), device)[..., None, None]  # (B, 2, 3, 1, 1)
    x, y = (row[:, 0] * columns + row[:, 1] * rows[:, None] + row[:, 2] for row in steps.unbind(1))  # (B, H, W) each
    pixels = sampled(pixels, x, y, "mirror")
    noise = uniform_field((*key, 1), (2, *size), device).double() * 2 - 1  # (B, 2, H, W)
    right, down = (smooth(noise, sigma, border="reflect", truncate=3.0) * alpha).unbind(1)
    return sampled(pixels, columns + right, rows[:, None] + down, "reflect")


def affine_maps(numbers: Tensor, size: tuple[int, int], shift: float) -> Tensor:
    """Uniform numbers (B, 6) -> where the pixels of the result come from: float64 (B, 2, 3), x and y of (x, y, 1)."""
    (height, width), side = size, min(size) // 3
    middle = torch.tensor([width // 2, height // 2], dtype=torch.float64)
    points = middle + torch.tensor(
        [[side, side], [side, -side], [-side, -side]], dtype=torch.float64
    )  # (3, 2), x and y
    moved = points + between(numbers.unflatten(1, (3, 2)), (-shift, shift))  # (B, 3, 2)
    moved = torch.cat([moved, torch.ones_like(moved[..., :1])], dim=2)  # (B, 3, 3)
    return torch.linalg.solve(moved, points.expand(len(moved), -1, -1)).mT  # (B, 2, 3)


def sampled(images: Tensor, x: Tensor, y: Tensor, border: Literal["mirror", "reflect"]) -> Tensor:
    """Bilinear values of (B, C, H, W) at columns and rows (B, H, W) in pixels; beyond the border it is mirrored."""
    corners = border == "mirror"  # grid_sample's word for mirroring about the middle of the last pixel
    height, width = images.shape[2:]
    grid = [
        2 * place / max(side - 1, 1) - 1 if corners else (2 * place + 1) / side - 1
        for place, side in ((x, width), (y, height))
    ]
    grid = torch.stack(grid, 3).to(images)  # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=corners)
