"""CDO's noise patches (Cao et al., Collaborative Discrepancy Optimization, TII 2023; github.com/caoyunkang/CDO)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.pasting import draw, large_enough, require, whole
from data.random_numbers import send, stream


@dataclass(frozen=True, kw_only=True)
class NoisePatches:
    """Rectangles of uniform noise (`rectangles`), 0 .. `most` of them.

    Every channel of every pixel is uniform in 0 .. 254 (0 is twice as likely, for bytes are 256). The mask is the
    rectangles, empty in one picture of `most` + 1. A pixel of noise may happen to be the one that was there.

    Deviation: no test whether a center lies on the background (the first version's, for some categories).
    """

    most: int = 4
    kind = 5

    def __post_init__(self):
        require(self, {"most must be at least 1": self.most >= 1})

    @torch.no_grad()
    def __call__(
        self, images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        key = seed, epoch, view, sample_ids, self.kind
        numbers = draw(images, key, 1 + 4 * self.most)
        height, width = images.shape[2:]
        large_enough(self, images, min(height, width) >= 20, "a tenth of a side must be at least 2 pixels")
        counts = whole(numbers[:, :1], 0, self.most)  # (B, 1)
        half, place = numbers[:, 1:].unflatten(1, (2, self.most, 2)).unbind(1)  # each (B, most, 2)
        ends = rectangles(half, place, (height, width))  # (B, most, 2 axes, 2 ends)
        ends[torch.arange(self.most) >= counts] = 0  # those that are not there are empty
        mask = covered(send(ends, images.device), (height, width))  # (B, H, W)
        # one number of 24 bits makes a pixel's three bytes
        bits = stream((*key, 0), height * width, images.device).unflatten(1, (height, width))  # (B, H, W)
        noise = torch.stack([((bits >> shift & 255) * 255) >> 8 for shift in (16, 8, 0)], dim=1).to(torch.uint8)
        return torch.where(mask[:, None], noise, images), mask


def rectangles(half: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
    """CDO's patches in a picture with sides S, as both official versions draw them: half of each side is uniform from
    S // 40 to S // 10 - 1 pixels (here at least 1), the center uniform where the patch fits.

    half, place: uniform numbers in [0, 1), (..., 2) for the two axes. Returns first and past-last row and column,
    int32 (..., 2 axes, 2 ends).
    """
    sides = torch.tensor(size, device=half.device)
    half = whole(half, (sides // 40).clamp(min=1), (sides // 10 - 1).clamp(min=1))
    first = whole(place, 0, sides - 2 * half - 1)
    return torch.stack([first, first + 2 * half], dim=-1).int()


def covered(ends: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels inside any of each picture's n rectangles: ends (B, n, 2 axes, 2 ends) -> bool (B, H, W)."""
    first, last = ends[..., None].unbind(3)  # each (B, n, 2, 1)
    y, x = (torch.arange(side, device=ends.device) for side in size)
    rows = (y >= first[:, :, 0]) & (y < last[:, :, 0])  # (B, n, H)
    columns = (x >= first[:, :, 1]) & (x < last[:, :, 1])  # (B, n, W)
    mask = torch.zeros(len(ends), *size, dtype=torch.bool, device=ends.device)
    for row, column in zip(rows.unbind(1), columns.unbind(1)):
        mask |= row[:, :, None] & column[:, None]
    return mask
