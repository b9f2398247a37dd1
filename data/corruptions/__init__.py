"""The corruptions of ImageNet-C and CIFAR-10-C, and two exposures, batched on the device: uint8 in, uint8 out.

    images = corrupt(images, ids, "fog", 3, seed=0)  # (B, 3, H, W)

Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations"; the
constants are those of their make_cifar_c.py and make_imagenet_c.py, in pixels, whatever the image's size. What is drawn
is a function of (seed, severity, corruption, sample id) alone. Deviations: `frost` is drawn and not a photograph,
`elastic_transform` does not round places to 1/32 of a pixel, and images are not saved as JPEG of quality 85 at the end,
as those of ImageNet-C were.

Letters: B images, H and W their height and width.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.augment.random_numbers import KINDS
from data.augment.views import CPU_PIXELS
from data.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from data.corruptions.digital import elastic_transform, pixelate
from data.corruptions.jpeg import jpeg_compression
from data.corruptions.sensor_noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from data.corruptions.tone import brightness, contrast, exposure, saturate
from data.corruptions.weather import fog, frost, snow, spatter

Constants = Literal[32, 224]  # pixels of the images that they were made for
SEVERITIES = 5
SMALL = 64  # short side in pixels up to which an image is taken for one of CIFAR's size
TOLERANCE = 1 / 512  # of a level: what float32 lacks of a whole number is not cut off


class Corruption(NamedTuple):
    make: Callable[..., Tensor]  # pixels (B, 3, H, W) in [0, 1], key, *constants -> likewise, to be cut off
    at_32: tuple[tuple, ...]  # the constants of severities 1 to 5
    at_224: tuple[tuple, ...]


def each(*numbers: float) -> tuple[tuple[float], ...]:
    return tuple((number,) for number in numbers)


def times(size: int, *rows: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(size * number for number in row) for row in rows)


STOPS = (0.25, 0.5, 1.0, 1.5, 2.0)
BENCHMARK: dict[str, Corruption] = {  # the 15 that the mCE is the mean of
    "gaussian_noise": Corruption(gaussian_noise, each(0.04, 0.06, 0.08, 0.09, 0.1), each(0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(shot_noise, each(500, 250, 100, 75, 50), each(60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(impulse_noise, each(0.01, 0.02, 0.03, 0.05, 0.07), each(0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption(  # radius, softness
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(  # sigma, largest shift, rounds
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(  # radius, sigma
        motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(  # end, step
        zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(  # mean, deviation, zoom, least, radius, sigma, own share
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(  # weights of the image and of frost
        frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(  # strength, decay
        fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(brightness, each(0.05, 0.1, 0.15, 0.2, 0.3), each(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(contrast, each(0.75, 0.5, 0.4, 0.3, 0.15), each(0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(  # alpha, sigma, shift
        elastic_transform,
        times(32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        # 244 is a slip of the official code
        times(244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": Corruption(pixelate, each(0.95, 0.9, 0.85, 0.75, 0.65), each(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(jpeg_compression, each(80, 65, 58, 50, 40), each(25, 18, 15, 10, 7)),
}
FURTHER: dict[str, Corruption] = {  # of the official code, to choose settings on
    "speckle_noise": Corruption(speckle_noise, each(0.06, 0.1, 0.12, 0.16, 0.2), each(0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": Corruption(gaussian_blur, each(0.4, 0.6, 0.7, 0.8, 1), each(1, 2, 3, 4, 6)),
    "spatter": Corruption(  # mean, deviation, sigma, least, weight, mud
        spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    ),
    "saturate": Corruption(  # factor, more
        saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}
EXPOSURES: dict[str, Corruption] = {  # of our own: a lamp or a shutter that is not as it was, in stops
    "overexposure": Corruption(exposure, each(*STOPS), each(*STOPS)),
    "underexposure": Corruption(exposure, *[each(*(-stop for stop in STOPS))] * 2),
}
CORRUPTIONS = BENCHMARK | FURTHER | EXPOSURES
NUMBERS = {name: number for number, name in enumerate(CORRUPTIONS)}  # what is drawn depends on it: add at the end only


def constants_for(height: int, width: int) -> Constants:
    """Those of CIFAR for small images, of ImageNet for others."""
    return 32 if min(height, width) <= SMALL else 224


@torch.no_grad()
def corrupt(
    images: Tensor, ids: Tensor, name: str, severity: int, *, seed: int, constants: Constants | None = None
) -> Tensor:
    """Images uint8 (B, 3, H, W) under the corruption `name`: likewise.

    Args:
        ids: (B,) int64 on the CPU, the images' numbers in their data set.
        severity: 1 to 5.
        constants: for images of 32 or of 224 pixels; None: as `constants_for` their size.

    Raises:
        ValueError: other shapes or types.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if ids.shape != images.shape[:1] or ids.device.type != "cpu":
        raise ValueError(f"ids must be ({len(images)},) on the CPU, got {tuple(ids.shape)}")
    if not 1 <= severity <= SEVERITIES:
        raise ValueError(f"severity must be from 1 to {SEVERITIES}, got {severity}")
    if not len(images):
        return images
    make, at_32, at_224 = CORRUPTIONS[name]
    constants = constants or constants_for(*images.shape[2:])
    values = (at_32 if constants == 32 else at_224)[severity - 1]
    rows = max(1, CPU_PIXELS // images.shape[2:].numel()) if images.device.type == "cpu" else len(images)
    parts = []
    with torch.autocast(images.device.type, enabled=False):  # in bfloat16 levels would be lost
        for part, numbers in zip(images.split(rows), ids.split(rows)):
            key = (seed, severity, NUMBERS[name], numbers, *KINDS["corruption"])
            made = make(part.float().div_(255), key, *values)
            # cut off and not rounded, as in the official code
            parts.append(made.clamp(0, 1).mul_(255).add_(TOLERANCE).floor_().byte())
    return torch.cat(parts)
