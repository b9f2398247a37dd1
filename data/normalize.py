"""Pixels as networks take them, by each network's own mean and standard deviation, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.memory import send

Colors = tuple[float, float, float]  # a number for red, green and blue


class Normalization(NamedTuple):
    """What a network was trained on: pixels in [0, 1], less `mean`, divided by `std`."""

    mean: Colors
    std: Colors


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
IMAGENET = Normalization(MEAN, STD)
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels in [-1, 1], as in much of TensorFlow's code


def normalization_of(network: Any) -> Normalization:
    """That of a backbone, of a detector on it or of a backbone's class; ImageNet's unless it says otherwise."""
    return getattr(network, "normalization", IMAGENET)


def normalize(images: Tensor, normalization: Normalization = IMAGENET) -> Tensor:
    """uint8 (B, 3, H, W) -> a new float32 tensor as the network takes it: `normalize(images, normalization_of(net))`.

    Raises:
        ValueError: another dtype. Floats may be normalized already, or in [0, 1], and would be changed in place.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"normalize takes uint8 images, got {images.dtype} {tuple(images.shape)}")
    return standardize_(images.float().div_(255), *normalization)


def standardize_(pixels: Tensor, mean: Colors, std: Colors) -> Tensor:
    """Subtract the mean of each channel of (B, 3, H, W) and divide by its standard deviation, in place."""
    mean, std = send(torch.tensor([mean, std]), pixels.device)[..., None, None]  # each (3, 1, 1)
    return pixels.sub_(mean).div_(std)


def unnormalize(images: Tensor, normalization: Normalization = IMAGENET) -> Tensor:
    """The inverse of `normalize`: float (B, 3, H, W) in [0, 1], for looking at views."""
    mean, std = send(torch.tensor(normalization), images.device)[..., None, None]  # each (3, 1, 1)
    return (images * std + mean).clamp(0, 1)
