"""Crops, resizes and blurs of batches as two matrix products, each image with its own pair of matrices.

A resize is linear along each axis, so crop + flip + antialiased resize is  rows @ image @ columns^T  with rows (h, H)
and columns (w, W): batched, unlike calls image by image, and antialiased, unlike `grid_sample`.
"""

import torch
from torch import Tensor

from runtime.memory import send

TRIES = 10
CROP_DRAWS = 2 * TRIES + 2
SHARES = {"own": (0.5, 0.5), "full_height": (0.0, 1.0)}  # powers of the share of the area that height and width keep


def draw_boxes(
    numbers: Tensor, sizes: Tensor, scale: tuple[float, float], *, ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """torchvision's RandomResizedCrop.get_params for a batch: (top, left) and (height, width), each (B, 2), whole.

    numbers (B, CROP_DRAWS) uniform in [0, 1), sizes (B, 2) heights and widths of the images in pixels. The area is
    uniform in `scale` of the image's and the logarithm of width / height uniform in that of `ratio`; the first of 10
    tries that fits is placed uniformly. If none fits it is the largest central box with an aspect in `ratio`.
    """
    numbers, sizes = numbers.double(), sizes.double()
    height, width = sizes.split(1, dim=1)  # each (B, 1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :TRIES])  # (B, TRIES)
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** numbers[:, TRIES : 2 * TRIES]
    tries = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=2).round()  # (B, TRIES, 2)

    fits = ((tries >= 1) & (tries <= sizes[:, None])).all(2)  # (B, TRIES)
    box = tries[torch.arange(len(tries)), fits.int().argmax(1)]  # (B, 2)
    place = numbers[:, 2 * TRIES :]  # (B, 2)

    central = torch.cat([(width / ratio[0]).round().minimum(height), (height * ratio[1]).round().minimum(width)], dim=1)
    none_fits = ~fits.any(1, keepdim=True)
    box = torch.where(none_fits, central, box)
    return torch.where(none_fits, ((sizes - box) / 2).floor(), (place * (sizes - box + 1)).floor()), box


def draw_shares(numbers: Tensor, sizes: Tensor, scale: tuple[float, float], *, ratio: str) -> tuple[Tensor, Tensor]:
    """Boxes as of `draw_boxes` whose proportions follow the image's: (top, left) and (height, width), each (B, 2).

    A share of the area, uniform in `scale`, is kept by both sides alike (ratio "own") or by the width alone
    ("full_height"); the sides are rounded to whole pixels, at least one, and the box is placed uniformly.
    """
    sizes = sizes.double()
    share = scale[0] + (scale[1] - scale[0]) * numbers[:, :1].double()  # (B, 1)
    box = (sizes * share ** torch.tensor(SHARES[ratio], dtype=torch.float64)).round().clamp(min=1)  # (B, 2)
    return (numbers[:, 2 * TRIES :] * (sizes - box + 1)).floor(), box


def triangle(x: Tensor) -> Tensor:
    """Bilinear interpolation's kernel, of support 1."""
    return (1 - x.abs()).clamp_(min=0)


def keys_cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution (IEEE ASSP 1981), a = -1/2 as in PIL and torchvision's antialiased bicubic; support 2."""
    x = x.abs()
    near, far = x.clamp(max=1), x.clamp(1, 2)  # both polynomials are 0 at 1, and the far one at 2: no branch
    return ((1.5 * near - 2.5) * near * near + 1) + (((-0.5 * far + 2.5) * far - 4) * far + 2)


KERNELS = {"bilinear": triangle, "bicubic": keys_cubic}


def resampling_matrix(edges: Tensor, stored: int, size: int, *, interpolation: str) -> Tensor:
    """Weights that resample the stretch `edges` of an axis of `stored` pixels to `size`: -> (B, size, stored).

    edges (B, 2), in pixels and not necessarily whole, are where output pixel 0 begins and the last one ends; a stretch
    from high to low mirrors. When it shrinks, the kernel widens with it (antialias, as in PIL). Only pixels that touch
    the stretch count, as if it had been cut out first, and each row sums to 1.
    """
    begin, end = edges[:, :1], edges[:, 1:]  # (B, 1)
    step = (end - begin) / size
    center = begin + step * (torch.arange(size, device=edges.device) + 0.5)  # (B, size)
    pixel = torch.arange(stored, device=edges.device) + 0.5  # (stored,)
    offset = (pixel - center[..., None]) / step.abs().clamp(min=1)[..., None]  # (B, size, stored)
    low, high = torch.minimum(begin, end), torch.maximum(begin, end)
    inside = (pixel + 0.5 > low) & (pixel - 0.5 < high)  # (B, stored)
    weights = KERNELS[interpolation](offset).mul_(inside[:, None])
    return weights.div_(weights.sum(2, keepdim=True))


def blur_matrix(sigma: Tensor, size: int, *, kernel: int) -> Tensor:
    """Gaussian blur along an axis of `size` pixels with reflected borders: sigma (B,) in pixels -> (B, size, size).

    torchvision's kernel: `kernel` (odd) taps exp(-d^2 / 2 sigma^2), normalized. Pixel j takes the tap at distance
    |i - j| of output i and, as its mirror image, those at i + j and 2 (size - 1) - i - j.
    """
    radius = kernel // 2
    if radius >= size:
        raise ValueError(f"a blur of {kernel} taps needs more than {radius} pixels, got {size}")
    distance = torch.arange(radius + 1, device=sigma.device)
    taps = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (B, radius + 1)
    taps = taps / (2 * taps.sum(1, keepdim=True) - 1)  # the tap at distance 0 is 1 and occurs once

    i, j = torch.arange(size, device=sigma.device).unsqueeze(1), torch.arange(size, device=sigma.device)
    distance = distance[:, None, None]
    lands = (distance == (i - j).abs()).float()  # (radius + 1, size, size): how often the tap leads from i to j
    lands += (distance == i + j) & (j > 0)
    lands += (distance == 2 * (size - 1) - i - j) & (j < size - 1)
    return (taps @ lands.flatten(1)).unflatten(1, (size, size))


def product(rows: Tensor, images: Tensor, columns: Tensor, *, clamp: bool) -> Tensor:
    """rows (B, h, H) @ images (B, C, H, W) @ columns^T (B, W, w), cut to [0, 1] after each axis if `clamp`."""
    narrow = images @ columns.unsqueeze(1).mT  # (B, C, H, w): columns first, as PIL
    if clamp:
        narrow.clamp_(0, 1)
    small = rows.unsqueeze(1) @ narrow  # (B, C, h, w)
    return small.clamp_(0, 1) if clamp else small


def resized_crops(images: Tensor, edges: Tensor, size: tuple[int, int], *, interpolation: str) -> Tensor:
    """K crops of each image, mirrored and resized: images (B, C, H, W), edges (K, B, 4) -> (K, B, C, *size).

    Edges are top, bottom, left and right in pixels, on the CPU; top > bottom or left > right mirrors. Whole edges give
    torchvision's resized_crop with antialias=True of a uint8 image, not rounded: columns first, and what the cubic
    kernel overshoots is cut off after each axis.
    """
    shape, (height, width) = edges.shape[:2], images.shape[2:]
    edges = send(edges.float(), images.device).flatten(0, 1)  # (K B, 4)
    rows = resampling_matrix(edges[:, :2], height, size[0], interpolation=interpolation).unflatten(0, shape)
    columns = resampling_matrix(edges[:, 2:], width, size[1], interpolation=interpolation).unflatten(0, shape)
    overshoots = interpolation == "bicubic"
    return torch.stack([product(row, images, column, clamp=overshoots) for row, column in zip(rows, columns)])


def gaussian_blur(images: Tensor, sigma: Tensor, *, kernel: int) -> Tensor:
    """torchvision's gaussian_blur with `kernel` taps: images (B, C, H, W), sigma (B,) in pixels, on the CPU."""
    sigma = send(sigma.float(), images.device)
    rows, columns = (blur_matrix(sigma, size, kernel=kernel) for size in images.shape[2:])
    return product(rows, images, columns, clamp=False)
