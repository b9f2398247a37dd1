"""Patches of a 3 x 3 grid for learning their relative position (Doersch, Gupta & Efros, ICCV 2015, section 3).

    grid = PatchGrid(seed=0, size=32, gap=16, jitter=3)
    patches = grid(images, sample_ids, epoch)  # 9 x (B, 3, p, p), row by row: number 4 is the centre

Letters: B images, H and W their stored height and width, p a patch's, N = 9 B patches.
"""

from dataclasses import KW_ONLY, dataclass
from functools import cache, partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from data.augment import resample
from data.augment.random_numbers import KINDS, stream, uniform, whole
from data.augment.views import View, in_pieces, on_rows
from data.normalize import IMAGENET, Normalization, standardize_
from runtime.errors import UserError
from runtime.memory import send
from runtime.values import PixelsOrZero, Range, UnitInterval

CELLS = 9
DRAWS = 5  # random numbers of a patch: two of its jitter, two of its shrinking, one of its color
LEAST = 10  # pixels of the side to which a patch is shrunk at most: 100 in all
GAUSSIAN = torch.special.ndtri((torch.arange(4096) + 0.5) / 4096)  # what 12 random bits stand for


@dataclass(frozen=True)
class PatchGrid:
    """Nine patches of each image, with the paper's guards against learning anything but what is to be seen in them.

    The grid lies at a uniform place of the stored image, `gap` pixels between its cells, and each patch is moved by
    up to `jitter` pixels either way, so that no line runs on from one to the next. `downsample_p` of the patches are
    shrunk to a uniform number of pixels from 100 to p^2 and enlarged again (bilinear, antialiased), against pixelation
    as a clue. Against chromatic aberration `color` is

    - "drop": all but one random channel of a patch become Gaussian noise, with 1/100 of its standard deviation;
    - "project": v - a (a . v) / (a . a) of every color v, with a = (-1, 2, -1), from green to magenta;
    - "none".

    At last each channel's mean over the patch is subtracted, and it is divided by the standard deviation of
    `normalization`. All draws are functions of (seed, epoch, cell, sample id).

    The author's later code (cdoersch/deepcontext, train.py), from which the share and sizes of the shrunk patches are,
    drops with uniform noise and scales each patch to one variance; this is the paper's.

    Raises:
        UserError: options that make no sense; images that are too small for the grid.
    """

    seed: int
    normalization: Normalization = IMAGENET
    _: KW_ONLY
    size: Annotated[int, Range(above=LEAST, most=2**16)] = 96  # side of a patch in pixels
    gap: PixelsOrZero | None = None  # pixels between the cells; none: size // 2, as in the paper
    jitter: PixelsOrZero = 7  # pixels that a patch is moved at most, either way
    color: Literal["drop", "project", "none"] = "drop"  # what is done against chromatic aberration
    downsample_p: UnitInterval = 0.33  # share of the patches that are shrunk and enlarged again

    @property
    def views(self) -> list[View]:
        """Nine views of `size`, as `Augment` has them."""
        return [View(self.size)] * CELLS

    @torch.no_grad()
    def __call__(self, images: Tensor, sample_ids: Tensor, epoch: int) -> list[Tensor]:
        """images (B, 3, H, W) uint8, sample_ids (B,) int64 on the CPU -> 9 x (B, 3, p, p) float32."""
        return in_pieces(partial(self._patches, epoch=epoch), images, sample_ids)

    def _patches(self, images: Tensor, sample_ids: Tensor, epoch: int) -> list[Tensor]:
        cells, device = torch.arange(CELLS).repeat_interleave(len(images)), images.device  # (N,)
        key = self.seed, epoch, cells, sample_ids.repeat(CELLS)
        numbers = uniform(key, DRAWS)  # (N, 5)
        corner = self._place(images, uniform((self.seed, epoch, CELLS, sample_ids), 2)).repeat(CELLS, 1)  # (N, 2)
        corner += self._stride * torch.stack([cells // 3, cells % 3], dim=1) + whole(numbers[:, :2], 0, 2 * self.jitter)
        corner = send(corner.long(), device)[..., None]  # (N, 2, 1)
        y, x = (corner + torch.arange(self.size, device=device)).unbind(1)  # each (N, p)
        image = torch.arange(len(images), device=device).repeat(CELLS)[:, None, None, None]  # (N, 1, 1, 1)
        channel = torch.arange(3, device=device)[:, None, None]
        patches = images[image, channel, y[:, None, :, None], x[:, None, None]].float().div_(255)  # (N, 3, p, p)

        pixels = LEAST**2 + (self.size**2 - LEAST**2) * numbers[:, 3]
        patches = on_rows(pixelated, patches, numbers[:, 2] < self.downsample_p, pixels.sqrt().long())
        if self.color == "drop":
            patches = drop_colors(patches, send(whole(numbers[:, 4], 0, 2).long(), device), key)
        elif self.color == "project":
            patches = without_green_magenta(patches)
        patches -= mean(patches)
        return list(standardize_(patches, (0.0, 0.0, 0.0), self.normalization.std).unflatten(0, (CELLS, len(images))))

    @property
    def _stride(self) -> int:
        """Pixels from one cell of the grid to the next."""
        return self.size + (self.size // 2 if self.gap is None else self.gap)

    def _place(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Uniform numbers (B, 2) -> the grid's top and left with all of the jitter inside the image, whole (B, 2)."""
        extent = 2 * self._stride + self.size + 2 * self.jitter
        height, width = images.shape[2:]
        if min(height, width) < extent:
            raise UserError(
                f"images of {height} x {width} pixels are too small for {self}: "
                f"set data.size={extent} or more, or a lower augment.size"
            )
        return whole(numbers, 0, torch.tensor([height, width]) - extent)


@cache
def round_trips(size: int, device: torch.device) -> Tensor:
    """Matrices (p - LEAST, p, p) that shrink p = `size` pixels to LEAST, LEAST + 1 ... p - 1 and enlarge them again."""
    made = []
    for side in range(LEAST, size):
        down, up = (
            resample.resampling_matrix(torch.tensor([[0.0, float(stored)]]), stored, to, interpolation="bilinear")
            for stored, to in ((size, side), (side, size))
        )
        made.append(up @ down)
    return send(torch.cat(made), device)


def pixelated(patches: Tensor, sides: Tensor) -> Tensor:
    """Patches (N, 3, p, p) shrunk to squares of `sides` (N,) pixels, whole and on the CPU, and enlarged again."""
    matrices = round_trips(patches.shape[3], patches.device)[send(sides - LEAST, patches.device)]  # (N, p, p)
    return resample.product(matrices, patches, matrices, clamp=False)


def drop_colors(patches: Tensor, kept: Tensor, key: tuple) -> Tensor:
    """Noise in place of all channels of patches (N, 3, p, p) but those `kept` (N,), both on one device.

    One number of 24 bits, of the stream that follows `key`, makes the noise of both channels of a pixel.
    """
    device, size = patches.device, patches.shape[2:]
    number = torch.arange(len(patches), device=device)
    channel = patches[number, kept][:, None]  # (N, 1, p, p)
    spread = mean((channel - mean(channel)).square_()).sqrt_()  # (N, 1, 1, 1)
    bits = stream((*key, *KINDS["patches_noise"]), size.numel(), device).unflatten(1, size)  # (N, p, p)
    noise = send(GAUSSIAN, device)[torch.stack([bits >> 12, bits & 4095], dim=1)]  # (N, 2, p, p)
    turned = (torch.arange(3, device=device) - kept[:, None]) % 3  # (N, 3): 0 where the channel is kept
    return torch.cat([channel, noise.mul_(spread / 100)], dim=1)[number[:, None], turned]


def without_green_magenta(patches: Tensor) -> Tensor:
    """Colors (N, 3, p, p) projected onto the plane at right angles to (-1, 2, -1)."""
    red, green, blue = patches.unbind(1)
    along = (2 * green - red - blue) / 6
    return torch.stack([red + along, green - 2 * along, blue + along], dim=1)


def mean(patches: Tensor) -> Tensor:
    """Of each channel: (N, C, p, p) -> (N, C, 1, 1). Rows first: torch may split one long sum between threads."""
    return patches.mean(3, keepdim=True).mean(2, keepdim=True)
