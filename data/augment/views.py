"""Batched augmentation on the device: uint8 images in, normalized float views out, each image with its own draws.

    augment = Augment(RECIPES["simclr"](size=32, strength=0.5, blur_p=0.0), seed=0, sizes=dataset.sizes)
    views = augment(images, sample_ids, epoch)  # V x (B, 3, h, w)

Letters: B images, (H, W) their stored height and width, V views, (h, w) a view's height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from data.augment import color, resample, strong
from data.augment.random_numbers import KINDS, uniform
from data.normalize import IMAGENET, Normalization, standardize_
from runtime.errors import UserError, cut
from runtime.memory import send

DRAWS = (resample.CROP_DRAWS, 1, 9, 1, 2, 1)  # random numbers of crop, flip, jitter, gray, blur, solarize

# stored pixels that a CPU works on at a time: about what its caches hold (1.6 times as fast as 2^19)
CPU_PIXELS = 2**17


@dataclass(frozen=True)
class View:
    """What one view may do to an image, in this order. `View(size)` alone only resizes; a `_p` is a probability."""

    size: int | tuple[int, int]  # pixels of a square, or height and width
    scale: tuple[float, float] | None = None  # share of the area that a random-resized-crop keeps; None: no crop
    # width / height of the crop in the original image; "own": as the image's; "full_height": only the width is cut
    ratio: tuple[float, float] | Literal["own", "full_height"] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # with antialias
    flip_p: float = 0.0  # left to right
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_kernel: int = 1  # taps, odd
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_p: float = 0.0
    operations: int = 0  # of RandAugment
    cutout: float = 0.0  # largest side of a gray square, as a share of the width

    def __post_init__(self):
        scale, probabilities = (
            self.scale or (1, 1),
            [getattr(self, f.name) for f in fields(self) if f.name[-2:] == "_p"],
        )
        rules = {
            "size must be at least 1 pixel": min(self.shape) >= 1,
            "scale must lie in (0, 1], low first": 0 < scale[0] <= scale[1] <= 1,
            "ratio must be positive, low first, or own or full_height": self.ratio in resample.SHARES
            or (not isinstance(self.ratio, str) and 0 < self.ratio[0] <= self.ratio[1]),
            f"interpolation must be one of {', '.join(resample.KERNELS)}": self.interpolation in resample.KERNELS,
            "jitter must not be negative, nor its hue above 0.5": min(self.jitter) >= 0 and self.jitter[3] <= 0.5,
            "blur_kernel must be odd": self.blur_kernel % 2 == 1,
            "blur_kernel must be below twice the size": 0 < self.blur_kernel < 2 * min(self.shape),
            "blur_sigma must be positive, low first": 0 < self.blur_sigma[0] <= self.blur_sigma[1],
            "probabilities and cutout must lie in [0, 1]": all(0 <= p <= 1 for p in [*probabilities, self.cutout]),
            "operations must not be negative": self.operations >= 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"augmentation: {rule}, but the view is {cut(str(self), 180)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def boxes(self, numbers: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(top, left) and (height, width), each (B, 2), of the crops that uniform numbers (B, CROP_DRAWS) draw in
        originals of `sizes` (B, 2), float64, in their pixels."""
        if self.scale is None:
            return torch.zeros_like(sizes), sizes
        draw = resample.draw_shares if isinstance(self.ratio, str) else resample.draw_boxes
        return draw(numbers, sizes, self.scale, ratio=self.ratio)

    def jitter_factors(self, numbers: Tensor) -> Tensor:
        """Uniform numbers (B, 4) -> factors of brightness, contrast and saturation around 1, turns of hue around 0."""
        spread = torch.tensor(self.jitter, dtype=torch.float64)
        middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        low = torch.maximum(middle - spread, torch.tensor([0.0, 0.0, 0.0, -0.5], dtype=torch.float64))
        return low + (middle + spread - low) * numbers


class Augment:
    """Turns a batch of uint8 images into one normalized float32 batch per view.

    sizes (N, 2) int64: heights and widths of the original images, by sample id. Crops are drawn in the original's
    geometry, though the stored image is squashed to H x W; None takes the stored size for the original's.
    `normalization` is that of the backbone which gets the views. `first` is the number of the first view, where a run
    makes views of an image in two places.

    All draws are functions of (seed, epoch, view, sample id), so an image's views do not depend on its batch: bit for
    bit on the CPU for views of 12 pixels or more. MKL rounds products of smaller matrices by their address, and CUDA
    may round by the batch size; there they agree to about 1e-6.
    """

    def __init__(
        self,
        views: list[View],
        seed: int,
        sizes: Tensor | None = None,
        *,
        normalization: Normalization = IMAGENET,
        first: int = 0,
    ):
        self.views, self.seed, self.sizes, self.normalization = views, seed, sizes, normalization
        self.first = first

    @torch.no_grad()
    def __call__(self, images: Tensor, sample_ids: Tensor, epoch: int) -> list[Tensor]:
        """images (B, 3, H, W) uint8, sample_ids (B,) int64 on the CPU -> [(B, 3, h, w) float32 for each view]."""
        return in_pieces(partial(self._views, epoch=epoch), images, sample_ids)

    def _views(self, images: Tensor, sample_ids: Tensor, epoch: int) -> list[Tensor]:
        pixels, made = images.float().div_(255), {}
        for view in dict.fromkeys(self.views):  # equal views are made together: fewer, larger kernels
            numbers = torch.tensor([number for number, other in enumerate(self.views) if other == view])
            made.update(zip(numbers.tolist(), self._make(view, numbers, pixels, sample_ids, epoch)))
        return [made[number] for number in range(len(self.views))]

    def _make(self, view: View, numbers: Tensor, pixels: Tensor, sample_ids: Tensor, epoch: int) -> Tensor:
        """The views `numbers` (K,), which are all like `view`, of pixels (B, 3, H, W) in [0, 1] -> (K, B, 3, h, w)."""
        shape = len(numbers), len(pixels)
        ids = sample_ids.repeat(shape[0])  # (K B,)
        key = self.seed, epoch, (numbers + self.first).repeat_interleave(shape[1]), ids
        crop, flip, jitter, gray, blur, solarize = uniform(key, sum(DRAWS)).split(DRAWS, dim=1)  # each (K B, draws)

        edges = self._edges(view, crop, flip, ids, pixels).unflatten(0, shape)  # (K, B, 4)
        crops = resample.resized_crops(pixels, edges, view.shape, interpolation=view.interpolation)
        batch = crops.flatten(0, 1)  # (K B, 3, h, w)

        factors, orders = view.jitter_factors(jitter[:, 1:5]), jitter[:, 5:].argsort(dim=1, stable=True)
        batch = color.jitter(batch, jitter[:, 0] < view.jitter_p, factors, orders)
        batch = on_rows(color.to_gray, batch, gray[:, 0] < view.gray_p)
        sigma = view.blur_sigma[0] + (view.blur_sigma[1] - view.blur_sigma[0]) * blur[:, 1]
        gaussian_blur = partial(resample.gaussian_blur, kernel=view.blur_kernel)
        batch = on_rows(gaussian_blur, batch, blur[:, 0] < view.blur_p, sigma)
        batch = on_rows(color.solarize, batch, solarize[:, 0] < view.solarize_p)
        if view.operations or view.cutout:
            about = {"operations": view.operations, "cutout": view.cutout}
            batch = strong.rand_augment(batch, (*key, *KINDS["rand_augment"]), **about)
        return standardize_(batch, *self.normalization).unflatten(0, shape)

    def _edges(self, view: View, crop: Tensor, flip: Tensor, ids: Tensor, pixels: Tensor) -> Tensor:
        """Top, bottom, left and right of the crops in stored pixels (K B, 4); a flipped one goes from right to left."""
        stored = torch.tensor(pixels.shape[2:], dtype=torch.float64)  # (2,)
        sizes = stored.expand(len(ids), 2) if self.sizes is None else self.sizes[ids].double()  # (K B, 2)
        begin, extent = view.boxes(crop, sizes)
        edges = torch.stack([begin, begin + extent], dim=2) * (stored / sizes)[..., None]  # (K B, 2 axes, 2 ends)
        (top, bottom), (left, right) = (axis.unbind(1) for axis in edges.unbind(1))
        flipped = flip[:, 0] < view.flip_p
        left, right = torch.where(flipped, right, left), torch.where(flipped, left, right)
        return torch.stack([top, bottom, left, right], dim=1)


def in_pieces(make: Callable[[Tensor, Tensor], list[Tensor]], images: Tensor, sample_ids: Tensor) -> list[Tensor]:
    """The views that `make` gives of a batch, which is checked first: images (B, 3, H, W) uint8, sample_ids (B,)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if sample_ids.shape != images.shape[:1] or sample_ids.device.type != "cpu":
        raise ValueError(f"sample_ids must be ({len(images)},) on the CPU, got {tuple(sample_ids.shape)}")
    on_cpu = images.device.type == "cpu"
    rows = max(1, CPU_PIXELS // images.shape[2:].numel() if on_cpu else len(images))
    with torch.autocast(images.device.type, enabled=False):  # in bfloat16 the products would lose the low bits
        parts = [make(*part) for part in zip(images.split(rows), sample_ids.split(rows))]
    return parts[0] if len(parts) == 1 else [torch.cat(view) for view in zip(*parts)]


def on_rows(op: Callable[..., Tensor], batch: Tensor, chosen: Tensor, *parameters: Tensor) -> Tensor:
    """Replace the rows `chosen` (B,) of the batch by `op` of them and their `parameters` (B, ...), both on the CPU."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return batch
    there = send(rows, batch.device)
    return batch.index_copy_(0, there, op(batch.index_select(0, there), *(p[rows] for p in parameters)))
