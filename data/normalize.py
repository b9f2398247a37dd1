"""Pixels as networks take them: ImageNet's mean and standard deviation, and back."""

import torch
from torch import Tensor

from runtime.memory import send

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> a new float32 tensor with ImageNet's mean 0 and standard deviation 1 per channel.

    Raises:
        ValueError: another dtype. Floats may be normalized already, or in [0, 1], and would be changed in place.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 images, got {images.dtype} {tuple(images.shape)}")
    return standardize_(images.float().div_(255), MEAN, STD)


def standardize_(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Subtract the mean of each channel of (B, 3, H, W) and divide by its standard deviation, in place."""
    mean, std = send(torch.tensor([mean, std]), pixels.device)[..., None, None]  # each (3, 1, 1)
    return pixels.sub_(mean).div_(std)


def unnormalize(images: Tensor) -> Tensor:
    """The inverse of `normalize` with ImageNet's numbers: float (B, 3, H, W) in [0, 1], for looking at views."""
    mean, std = send(torch.tensor([MEAN, STD]), images.device)[..., None, None]  # each (3, 1, 1)
    return (images * std + mean).clamp(0, 1)
