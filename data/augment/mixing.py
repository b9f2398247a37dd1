"""Mixup and CutMix on the device: each image with its neighbor in the batch, by numbers of its own.

    mix = Mix(MixConfig(mixup=0.2), seed=0)
    images, targets = mix(images, targets, sample_ids, epoch)

Letters: B images, h and w their height and width, C classes.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from scipy.special import betaincinv
from torch import Tensor

from data.augment.random_numbers import KINDS, uniform
from runtime.errors import UserError
from runtime.memory import send
from runtime.values import Range, UnitInterval

Alpha = Annotated[float, Range(least=0, most=100)]


@dataclass(kw_only=True)
class MixConfig:
    """`mix.*`: images and targets of two training images in one. With both kinds each takes half of the images."""

    mixup: Alpha = 0.0  # the share of the image itself is Beta(mixup, mixup); 0: no mixup
    cutmix: Alpha = 0.0  # likewise, by area, around a box from the other image; 0: no CutMix
    p: UnitInterval = 1.0  # probability that an image is mixed

    def __post_init__(self):
        if not (self.mixup or self.cutmix):
            raise UserError("mix needs mix.mixup or mix.cutmix above 0; mix=none mixes nothing")


class Mix:
    """mixup (Zhang et al. 2018): l x + (1 - l) x'; CutMix (Yun et al. 2019): a box of x' in x, its centre uniform, its
    sides sqrt(1 - l) of the image's, cut at the edges, and l what is left. Targets: l t + (1 - l) t' in both.

    Draws are functions of (seed, epoch, sample id), so each image has its own l, box and kind, as in timm's `elem`
    mode; the papers draw one l for the batch. The other image of rows 2k and 2k + 1 is the row beside: as a shuffled
    epoch's order is random and every process has a contiguous part of a batch, the pairs do not depend on the number
    of processes, if each has an even number of images.
    """

    def __init__(self, config: MixConfig, seed: int):
        self.config, self.seed = config, seed

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor, sample_ids: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """images (B, 3, h, w) and targets (B, C), float, on one device; sample_ids (B,) int64 on the CPU. B is even."""
        height, width = images.shape[2:]
        own, top, bottom, left, right = send(self.draw(sample_ids, epoch, height, width), images.device).unbind(1)
        y, x = (torch.arange(side, device=images.device) for side in (height, width))
        rows = (y >= top[:, None]) & (y < bottom[:, None])  # (B, h)
        columns = (x >= left[:, None]) & (x < right[:, None])  # (B, w)
        outside = ~(rows[:, None, :, None] & columns[:, None, None, :])  # (B, 1, h, w)
        share = torch.where((bottom > top)[:, None, None, None], outside.float(), own[:, None, None, None])
        return torch.lerp(beside(images), images, share), torch.lerp(beside(targets), targets, own[:, None])

    def draw(self, sample_ids: Tensor, epoch: int, height: int, width: int) -> Tensor:
        """The image's own share, and top, bottom, left and right of its box, empty without CutMix: float32 (B, 5)."""
        if len(sample_ids) % 2:
            raise ValueError(f"images are mixed in pairs, and there are {len(sample_ids)}")
        numbers = uniform((self.seed, epoch, 0, sample_ids, *KINDS["mix"]), 5)
        mixed, kind, quantile, *centre = numbers.unbind(1)  # (B,) each
        both = self.config.mixup > 0 and self.config.cutmix > 0
        cut = (kind < 0.5) if both else torch.full_like(kind, self.config.cutmix > 0, dtype=torch.bool)
        alpha = torch.where(cut, self.config.cutmix, self.config.mixup).double()
        own = torch.from_numpy(betaincinv(alpha.numpy(), alpha.numpy(), quantile.numpy()))
        own = torch.where(mixed < self.config.p, own, 1.0)
        edges = []
        for middle, side in zip(centre, (height, width)):
            half = side * (1 - own).sqrt() / 2
            edges += [((middle * side + sign * half).round().clamp(0, side)) * cut for sign in (-1, 1)]
        top, bottom, left, right = edges
        area = (bottom - top) * (right - left)
        bottom = torch.where(area > 0, bottom, top)
        own = torch.where(cut, 1 - area / (height * width), own)
        return torch.stack([own, top, bottom, left, right], dim=1).float()


def beside(rows: Tensor) -> Tensor:
    """Row 1, 0, 3, 2, ... of (B, ...)."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # (B / 2, 2, ...) -> (B, ...)
