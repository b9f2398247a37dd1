"""Light and color: brightness, contrast, saturation, and the exposure of the camera.

All take pixels (B, 3, H, W) in [0, 1] and give float (B, 3, H, W) to be cut off at 0 and 1.
"""

import torch
from torch import Tensor

from data.corruptions.fields import Key

GAMMA = 2.2  # of the light that a pixel stands for: pixel ^ GAMMA


def brightness(pixels: Tensor, key: Key, more: float) -> Tensor:  # noqa: ARG001
    """HSV's V, the largest channel, plus `more`, at most 1; the others keep their share of it, black becomes gray."""
    value = pixels.amax(1, keepdim=True)  # (B, 1, H, W)
    brighter = (value + more).clamp(max=1)
    return torch.where(value > 0, pixels * (brighter / value.clamp(min=1e-12)), brighter)


def contrast(pixels: Tensor, key: Key, factor: float) -> Tensor:  # noqa: ARG001
    mean = pixels.mean(3, keepdim=True).mean(2, keepdim=True)  # (B, 3, 1, 1)
    return (pixels - mean) * factor + mean


def saturate(pixels: Tensor, key: Key, factor: float, more: float) -> Tensor:  # noqa: ARG001
    """HSV's S times `factor` plus `more`, in [0, 1]. Gray has the hue of red, as in scikit-image."""
    value, least = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)  # (B, 1, H, W)
    chroma = value - least
    saturation = (chroma / value.clamp(min=1e-12) * factor + more).clamp(0, 1)
    of_gray = pixels.new_tensor([0.0, 1.0, 1.0])[:, None, None]
    lack = torch.where(chroma > 0, (value - pixels) / chroma.clamp(min=1e-12), of_gray)  # 0 to 1 of what S takes
    return value * (1 - saturation * lack)


def exposure(pixels: Tensor, key: Key, stops: float) -> Tensor:  # noqa: ARG001
    """2^stops times the light; highlights are lost."""
    return pixels * 2 ** (stops / GAMMA)
