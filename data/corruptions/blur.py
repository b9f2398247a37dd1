"""Blur: Gaussian, defocus, motion, zoom and frosted glass.

All take pixels (B, 3, H, W) in [0, 1] and give float (B, 3, H, W) to be cut off at 0 and 1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from data.augment.random_numbers import between, stream, uniform
from data.corruptions.fields import Key, correlated, gaussian_taps, smooth, smoothing_matrix, zoomed
from runtime.memory import send

DOUBLINGS = 7  # of the steps that a glass pixel is followed: 128 of them, of which each has a chance of at most 1/2


def gaussian_blur(pixels: Tensor, key: Key, sigma: float) -> Tensor:  # noqa: ARG001
    return smooth(pixels, sigma)


def defocus_blur(pixels: Tensor, key: Key, radius: float, softness: float) -> Tensor:  # noqa: ARG001
    """The mean over a disk with soft borders; the image's are mirrored, as in OpenCV."""
    return correlated(pixels, send(disk(radius, softness).float(), pixels.device)[None], "mirror")


def disk(radius: float, softness: float) -> Tensor:
    """A disk of sum 1, smoothed by 3 x 3 (large ones 5 x 5) Gaussian taps of deviation `softness`: float64 (K, K)."""
    half, taps = (8, gaussian_taps(softness, 1)) if radius <= 8 else (math.ceil(radius), gaussian_taps(softness, 2))
    place = torch.arange(-half, half + 1, dtype=torch.float64)
    sharp = (place[:, None] ** 2 + place**2 <= radius**2).double()
    smoothing = smoothing_matrix(taps, len(place), "mirror")
    return smoothing @ (sharp / sharp.sum()) @ smoothing.T


def motion_blur(pixels: Tensor, key: Key, radius: int, sigma: float) -> Tensor:
    """ImageMagick's, of an angle between -45 and 45 degrees, in whole levels."""
    angles = between(uniform(key, 1)[:, 0], (-45, 45))
    kernels = send(trails(angles, radius, sigma).float(), pixels.device)
    return correlated(pixels, kernels, "edge").mul_(255).round_().div_(255)


def trails(angles: Tensor, radius: int, sigma: float) -> Tensor:
    """ImageMagick's motion blur as kernels: angles (B,) in degrees -> float64 (B, 4 radius + 1, 4 radius + 1).

    One half of a Gaussian, from each pixel in the direction of the angle, clockwise from the right; a tap's place is
    rounded to whole pixels.
    """
    step = torch.arange(2 * radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (step / sigma) ** 2)
    radians = torch.deg2rad(angles.double())[:, None]  # (B, 1)
    rows, columns = ((step * direction - 0.5).ceil().long() for direction in (radians.sin(), radians.cos()))
    side, middle = 4 * radius + 1, 2 * radius
    place = (rows + middle) * side + columns + middle  # (B, 2 radius + 1)
    kernels = torch.zeros(len(angles), side * side, dtype=torch.float64)
    kernels.scatter_add_(1, place, (taps / taps.sum()).expand(len(angles), -1))
    return kernels.view(-1, side, side)


def zoom_blur(pixels: Tensor, key: Key, end: float, step: float) -> Tensor:  # noqa: ARG001
    """The mean of the image and its zooms by 1, 1 + step, ..., as many as numpy's `arange` has."""
    factors = np.arange(1, end, step).tolist()
    return (pixels + sum(zoomed(pixels, factor) for factor in factors)) / (len(factors) + 1)


def glass_blur(pixels: Tensor, key: Key, sigma: float, shift: int, rounds: int) -> Tensor:
    """Smoothed, pixels displaced by up to `shift`, smoothed again.

    The official code means to swap pixels from the bottom right to the top left, each with one of its neighbors. As it
    swaps two views of one array, the pixel takes the neighbor's value and the neighbor keeps it. So a pixel has the
    value of its target: the new one, if the target comes earlier in that order, or else the old one.
    """
    height, width = pixels.shape[2:]
    levels = (smooth(pixels, sigma) * 255 + 1 / 512).floor_().flatten(2)  # (B, 3, H W), cut off as in the official code
    row, column = (torch.arange(size, device=pixels.device) for size in (height, width))
    moves = ((row > shift) & (row <= height - shift))[:, None] & ((column > shift) & (column <= width - shift))
    place = torch.arange(height * width, device=pixels.device)  # (H W,)
    for number in range(rounds):
        drawn = stream((*key, number), 2 * height * width, pixels.device) * (2 * shift) >> 24
        across, down = (drawn - shift).unflatten(1, (2, -1)).unbind(1)  # (B, H W) each, -shift to shift - 1
        target = torch.where(moves.flatten(), place + down * width + across, place)  # (B, H W)
        earlier = (target > place) & moves.flatten()[target]
        following = torch.where(earlier, target, place)  # itself where the target's old value is taken
        for _ in range(DOUBLINGS):
            following = following.gather(1, following)
        levels = levels.gather(2, target.gather(1, following)[:, None].expand_as(levels))
    return smooth(levels.unflatten(2, (height, width)) / 255, sigma)
