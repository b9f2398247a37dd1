"""What several corruptions are made of: random fields, smoothing with each library's borders, small filters, zooms.

Letters: B images, C channels, H and W their height and width.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.random_numbers import stream

Key = tuple[int | Tensor, ...]  # of `random_numbers.uniform`, B rows
Border = Literal["edge", "reflect", "mirror"]  # aa|abcd|dd, ba|abcd|dc, cb|abcd|cb


def uniform_field(key: Key, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1): float32 (B, *shape), made on the device."""
    return stream(key, math.prod(shape), device).float().mul_(2.0**-24).unflatten(1, shape)


def normal_field(key: Key, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers, at most 5.8 in size: float32 (B, *shape), made on the device by Box and Muller's way."""
    count = math.prod(shape)
    radius, angle = stream(key, 2 * -(-count // 2), device).float().mul_(2.0**-24).chunk(2, dim=1)  # (B, count / 2)
    radius = (radius + 2.0**-24).log_().mul_(-2).sqrt_()  # of numbers in (0, 1]
    angle = angle * (2 * math.pi)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return both[:, :count].unflatten(1, shape)


def fold(index: Tensor, size: int, border: Border) -> Tensor:
    """Indices of any size -> those in [0, size) whose pixel stands there."""
    if border == "edge" or size == 1:
        return index.clamp(0, size - 1)
    period, back = (2 * size, 1) if border == "reflect" else (2 * size - 2, 0)
    index = index.remainder(period)
    return torch.where(index < size, index, period - back - index)


def extended(images: Tensor, rows: int, columns: int, border: Border) -> Tensor:
    """So many more pixels on each of the four sides, however many: (..., H + 2 rows, W + 2 columns)."""
    for dim, more in ((-2, rows), (-1, columns)):
        size = images.shape[dim]
        index = fold(torch.arange(-more, size + more, device=images.device), size, border)
        images = images.index_select(dim, index)
    return images


def gaussian_taps(sigma: float, radius: int) -> Tensor:
    """exp(-d^2 / 2 sigma^2), d = -radius to radius, of sum 1: float64 (2 radius + 1,)."""
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (distance / sigma) ** 2)
    return taps / taps.sum()


def smoothing_matrix(taps: Tensor, size: int, border: Border) -> Tensor:
    """What filters an axis of `size` pixels by the taps (2 r + 1,): float64 (size, size), for matrix @ pixels."""
    radius = len(taps) // 2
    index = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)  # (size, 2 r + 1)
    return taps.new_zeros(size, size).scatter_add_(1, fold(index, size, border), taps.expand(size, -1))


def smooth(images: Tensor, sigma: float, *, border: Border = "edge", truncate: float = 4.0) -> Tensor:
    """scipy's gaussian_filter of each channel of (..., H, W), as scikit-image's `gaussian` calls it."""
    if sigma <= 0:
        return images
    taps = gaussian_taps(sigma, int(truncate * sigma + 0.5))
    rows, columns = (smoothing_matrix(taps, size, border).to(images) for size in images.shape[-2:])
    return rows @ (images @ columns.T)


def mean_of_nine(images: Tensor) -> Tensor:
    """OpenCV's 3 x 3 box filter of (B, H, W), borders mirrored."""
    return F.avg_pool2d(extended(images, 1, 1, "mirror")[:, None], 3, stride=1)[:, 0]


def correlated(images: Tensor, kernels: Tensor, border: Border) -> Tensor:
    """Sum of the pixels around each one, times a kernel: (B, C, H, W), kernels (B or 1, h, w), odd -> (B, C, H, W).

    By FFT, for kernels are large and each image may have its own.
    """
    rows, columns = (side // 2 for side in kernels.shape[1:])
    padded = extended(images, rows, columns, border)
    shape = padded.shape[2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels, s=shape).conj_physical()[:, None]
    return torch.fft.irfft2(spectrum, s=shape)[..., : images.shape[2], : images.shape[3]]


def zoomed(images: Tensor, factor: float) -> Tensor:
    """The middle of (B, C, H, W), `factor` times as large, linearly: scipy's `zoom` of order 1, cut to H x W."""
    crops, sizes, begins = [], [], []
    for side in images.shape[2:]:
        kept = math.ceil(side / factor)
        size = round(kept * factor)
        crops.append(slice((side - kept) // 2, (side - kept) // 2 + kept))
        sizes.append(size)
        begins.append((size - side) // 2)
    large = F.interpolate(images[:, :, crops[0], crops[1]], sizes, mode="bilinear", align_corners=True)
    height, width = images.shape[2:]
    return large[:, :, begins[0] : begins[0] + height, begins[1] : begins[1] + width]
