"""Poisson's equation on rectangles with fixed borders, solved exactly by sine transforms, many rectangles at once.

Pérez, Gangnet & Blake, Poisson Image Editing (SIGGRAPH 2003). The sines sin(pi j k / (n + 1)), j, k = 1 .. n, are the
eigenvectors of the second difference with zeros at both ends (the discrete sine transform DST-I). So the Laplacian of a
rectangle is diagonal after one matrix product along each axis. For patches of up to 256 pixels dense matrices are
quicker than an FFT of the odd extension, and rectangles of different sizes share a batch: their matrices are padded
with zeros.

Letters: B rectangles, C channels, N x M the canvas whose top left corner they fill.
"""

import math

import torch
from torch import Tensor

from runtime.precision import at_least_float32


def sines(inner: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """DST-I of `inner` (B,) pixels that lie at 1 .. inner of an axis of `size`: matrices (B, size, size), eigenvalues
    (B, size) of the negative second difference. Elsewhere the matrices are 0 and the eigenvalues 1.

    A matrix is scaled so that it is its own inverse on the inner pixels.
    """
    at = torch.arange(size, device=inner.device)
    period = (inner + 1)[:, None, None]
    phase = (at[:, None] * at).remainder(2 * period)  # (B, size, size): in whole numbers, so that sines are exact
    exists = (at > 0) & (at <= inner[:, None])  # (B, size)
    period, phase = period.to(dtype), phase.to(dtype)
    matrix = (phase * math.pi / period).sin() * (2 / period).sqrt()
    values = 2 - 2 * (at.to(dtype) * math.pi / period[:, 0]).cos()  # (B, size)
    return matrix * (exists[:, None] & exists[..., None]), values.where(exists, 1)


def laplacian(images: Tensor) -> Tensor:
    """Sum of the four neighbors less 4 times the pixel: (B, C, N, M); 0 on the canvas's border."""
    result = torch.zeros_like(images)
    middle = images[..., 1:-1, 1:-1]
    across = images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    result[..., 1:-1, 1:-1] = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + across - 4 * middle
    return result


def mixed_divergence(source: Tensor, target: Tensor) -> Tensor:
    """Divergence of the stronger of two gradients, edge by edge: both (B, C, N, M); 0 on the canvas's border.

    Pérez et al., equation 13: between neighbors p and q the difference of the source if it is the larger in magnitude,
    else the target's. (OpenCV's MIXED_CLONE compares |d/dx - d/dy| instead, which misses diagonal edges.)
    """
    result = torch.zeros_like(target)
    for axis in (-2, -1):
        ours, theirs = source.diff(dim=axis), target.diff(dim=axis)
        flow = torch.where(ours.abs() > theirs.abs(), ours, theirs)
        length = target.shape[axis]
        result.narrow(axis, 1, length - 2).add_(flow.diff(dim=axis))
    for end in (0, -1):
        result[..., end, :] = 0
        result[..., end] = 0
    return result


@at_least_float32
def solve(target: Tensor, divergence: Tensor, extents: Tensor | None = None) -> Tensor:
    """u with laplacian(u) = divergence inside each rectangle and u = target on its border and beyond.

    Args:
        target: (B, C, N, M) float32 or float64; what it is inside does not matter.
        divergence: (B, C, N, M) of the guiding gradients; only what is inside matters.
        extents: int64 (B, 2) heights and widths of the rectangles, borders included, on the device of the target; None:
            all fill the canvas. One below 3 has no inside.

    In float32 the error is about 1e-5 of the values; in float64 1e-12.
    """
    size = target.shape[2:]
    if extents is None:
        extents = torch.tensor([list(size)], device=target.device)  # one pair of matrices for all
    inner = (extents - 2).clamp(min=0)  # (B, 2)
    (rows, of_rows), (columns, of_columns) = (sines(inner[:, k], size[k], target.dtype) for k in range(2))
    # u = target + e, and e is 0 on the border
    rest = laplacian(target) - divergence  # of -e
    rows, columns = rows[:, None], columns[:, None]  # (B, 1, N, N), (B, 1, M, M); symmetric
    spectrum = (rows @ rest @ columns) / (of_rows[:, :, None] + of_columns[:, None])[:, None]  # (B, C, N, M)
    return target + rows @ spectrum @ columns
