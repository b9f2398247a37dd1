"""Noise of sensors: Gaussian, shot, impulse and speckle noise, each channel by itself.

All take pixels (B, 3, H, W) in [0, 1] and give float (B, 3, H, W) to be cut off at 0 and 1.
"""

import math
from functools import cache

import torch
from scipy.special import pdtr
from torch import Tensor

from data.augment.random_numbers import stream
from data.corruptions.fields import Key, normal_field, uniform_field
from runtime.memory import send


def gaussian_noise(pixels: Tensor, key: Key, std: float) -> Tensor:
    return pixels + std * normal_field(key, pixels.shape[1:], pixels.device)


def shot_noise(pixels: Tensor, key: Key, rate: float) -> Tensor:
    """Poisson numbers of mean `rate` x pixel, over `rate`.

    By inversion in whole numbers, so equal on all devices: the count of a level's cumulative probabilities, in parts of
    2^24, that are at most the uniform number; those of level l are raised by l x 2^24, to search them all at once.
    """
    table = send(poisson_table(rate), pixels.device)  # (256, K)
    levels = (pixels * 255).round_().long()  # (B, 3, H, W)
    drawn = stream(key, pixels[0].numel(), pixels.device).view_as(levels) + (levels << 24)
    counts = torch.searchsorted(table.flatten(), drawn, right=True) - levels * table.shape[1]
    return counts.float() / rate


@cache
def poisson_table(rate: float) -> Tensor:
    """int64 (256, K): of each level l / 255 the probability of at most k = 0 to K - 1, in parts of 2^24, + l 2^24."""
    level = torch.arange(256, dtype=torch.int64)[:, None]
    mean = rate * level.double() / 255
    count = torch.arange(math.ceil(rate + 8 * rate**0.5 + 12), dtype=torch.float64)
    probability = torch.from_numpy(pdtr(count.numpy(), mean.numpy()))  # (256, K)
    return (probability * 2**24).round().long() + (level << 24)


def impulse_noise(pixels: Tensor, key: Key, share: float) -> Tensor:
    """That share of the values becomes 1 or 0, either as often."""
    drawn = uniform_field(key, pixels.shape[1:], pixels.device)
    return torch.where(drawn < share / 2, 1.0, torch.where(drawn < share, 0.0, pixels))


def speckle_noise(pixels: Tensor, key: Key, std: float) -> Tensor:
    return pixels + pixels * (std * normal_field(key, pixels.shape[1:], pixels.device))
