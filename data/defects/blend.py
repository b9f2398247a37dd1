"""What synthetic defects share: their random numbers, patches moved within an image, color jitter of patches only.

Letters: B images of H x W pixels. Places are (y, x) in pixels, pixel i from i to i + 1; extents are (height, width).
"""

from typing import Any

import torch
from torch import Tensor

from data.augment import color
from data.augment.random_numbers import between, uniform
from runtime.errors import UserError, cut
from runtime.memory import send

JITTER_DRAWS = 8
MIDDLE = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # factors and turn that change nothing


def large_enough(defect: Any, images: Tensor, enough: bool, needs: str) -> None:
    """Refuse images in which the defect finds no room."""
    if not enough:
        size = " x ".join(map(str, images.shape[2:]))
        larger = "use a larger data.size, or for spd and defect a larger augment.size"
        raise UserError(f"images of {size} pixels are too small for {cut(str(defect))}: {needs}; {larger}")


def draw(images: Tensor, key: tuple[int | Tensor, ...], draws: int) -> Tensor:
    """Uniform numbers (B, draws) of each image, on the CPU, after a check of the images and sample ids.

    key = (seed, epoch, view, sample ids (B,) on the CPU, and one of `KINDS`).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if key[3].shape != images.shape[:1] or key[3].device.type != "cpu":
        raise ValueError(f"sample_ids must be ({len(images)},) on the CPU, got {tuple(key[3].shape)}")
    return uniform(key, draws)


def draw_extents(
    numbers: Tensor, shape: tuple[int, int], area: tuple[float, float], aspect: tuple[float, float]
) -> Tensor:
    """Whole heights and widths (B, 2) of patches: numbers (B, 2) -> a uniform share of the image's area, and a
    log-uniform width / height; at least one pixel, at most the image."""
    pixels = between(numbers[:, 0], area) * shape[0] * shape[1]
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** numbers[:, 1]
    extents = torch.stack([(pixels / ratio).sqrt(), (pixels * ratio).sqrt()], dim=1).round()  # (B, 2)
    return extents.clamp(min=1).minimum(torch.tensor(shape))


def moved(
    images: Tensor, begin: Tensor, extents: Tensor, center: Tensor, turns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each image's patch at another place: uint8 (B, 3, H, W), meaningful where the bool (B, H, W) is true.

    begin (B, 2): top left corner of the patch; extents (B, 2); center (B, 2): of the patch where it is moved to; all
    whole or half pixels on the CPU. turns (B,): radians by which it is turned there, clockwise on the screen; every
    pixel is then its nearest one in the patch, as in PIL's `rotate`.
    """
    height, width = images.shape[2:]
    angle = torch.zeros(len(images)) if turns is None else turns
    rows = [begin[:, 0], begin[:, 1], *extents.unbind(1), *center.unbind(1), angle.cos(), angle.sin()]
    rows = send(torch.stack([row.float() for row in rows]), images.device)  # (8, B)
    top, left, h, w, cy, cx, cos, sin = rows[..., None, None]  # each (B, 1, 1)
    y = torch.arange(height, device=images.device)[:, None] + 0.5 - cy  # (B, H, 1)
    x = torch.arange(width, device=images.device) + 0.5 - cx  # (B, 1, W)
    # from the center to the corner of the patch, which was turned
    v, u = y * cos - x * sin + h / 2, y * sin + x * cos + w / 2  # (B, H, W)
    inside = (v >= 0) & (v < h) & (u >= 0) & (u < w)
    row = (v.floor() + top).long().clamp(0, height - 1)
    column = (u.floor() + left).long().clamp(0, width - 1)
    index = (row * width + column).flatten(1)[:, None].expand(-1, 3, -1)  # (B, 3, H W)
    return images.flatten(2).gather(2, index).unflatten(2, (height, width)), inside


def resized(images: Tensor, boxes: Tensor, canvas: list[int]) -> Tensor:
    """Each one's box, cut out and resized, in the top left corner of a canvas: (B, C, H, W) -> (B, C, *canvas).

    As cv2.resize: bilinear, between centers of pixels, without antialias. Beyond the box its border is repeated.
    """
    begin, before, after = boxes[:, :3].unbind(1)  # each (B, 2)
    for axis in (0, 1):
        position = torch.arange(canvas[axis], device=images.device) + 0.5
        position = position * (before.double() / after)[:, axis, None] - 0.5  # (B, canvas)
        position = position.clamp(min=0).minimum(before[:, axis, None] - 1) + begin[:, axis, None]
        left = position.floor().long()
        right = (left + 1).clamp(max=images.shape[2 + axis] - 1)  # beyond the box its share is 0
        share = position - left
        share = share[:, None, :, None] if axis == 0 else share[:, None, None]
        images = torch.lerp(take(images, left, axis), take(images, right, axis), share)
    return images


def take(images: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows (axis 0) or columns (1) of images (B, C, H, W), each image's own: index (B, K) -> K in place of H or W."""
    shape = list(images.shape)
    shape[2 + axis] = index.shape[1]
    index = index[:, None, :, None] if axis == 0 else index[:, None, None]
    return images.gather(2 + axis, index.expand(shape))


def jittered(patches: Tensor, inside: Tensor, strength: float, numbers: Tensor) -> Tensor:
    """torchvision's ColorJitter(strength x 4) of the part of each image that is `inside` (B, H, W), as if it had been
    cut out: uint8 (B, 3, H, W) -> float32 in [0, 255]. numbers (B, 8): four factors, then the order of the four.

    Deviation: rounded to bytes once by the caller, not after each of the four.
    """
    pixels = patches.float()
    if strength == 0:
        return pixels
    factors = MIDDLE + strength * (2 * numbers[:, :4] - 1)
    orders = numbers[:, 4:].argsort(dim=1, stable=True)
    everything = torch.ones(len(pixels), dtype=torch.bool)
    return color.jitter(pixels.div_(255), everything, factors, orders, inside[:, None].float()).mul_(255)


def blend(images: Tensor, patches: Tensor, alpha: Tensor) -> Tensor:
    """images (B, 3, H, W) uint8 under patches float (B, 3, H, W) in [0, 255], alpha (B, H, W) -> uint8, rounded."""
    alpha = alpha.to(patches.dtype)[:, None]
    return torch.lerp(images.to(patches.dtype), patches, alpha).round_().clamp_(0, 255).to(torch.uint8)
