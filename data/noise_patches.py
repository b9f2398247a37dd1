"""CDO's noise patches (Cao et al., Collaborative Discrepancy Optimization, TII 2023; github.com/caoyunkang/CDO)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.pasting import draw, large_enough, require, whole
from data.random_numbers import send, stream


@dataclass(frozen=True, kw_only=True)
class NoisePatches:
    """Rectangles of uniform noise, 0 .. `most` of them, in a picture with sides S: half of each side is uniform from
    S // 40 to S // 10 - 1 pixels (at least 1), the center uniform in the picture; what sticks out is cut off.

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
        sides = torch.tensor([height, width])
        half, center = numbers[:, 1:].unflatten(1, (2, self.most, 2)).unbind(1)  # each (B, most, 2)
        half = whole(half, (sides // 40).clamp(min=1), (sides // 10 - 1).clamp(min=1))
        center = whole(center, 0, sides - 1)
        ends = torch.stack([center - half, center + half], dim=3).int()  # (B, most, 2 axes, 2 ends)
        ends[torch.arange(self.most) >= counts] = 0  # those that are not there are empty
        mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=images.device)
        y, x = (torch.arange(side, device=images.device) for side in (height, width))
        for patch in send(ends, images.device).unbind(1):
            top, bottom, left, right = patch.flatten(1)[..., None].unbind(1)  # each (B, 1)
            rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)  # (B, H), (B, W)
            mask |= rows[:, :, None] & columns[:, None]
        # one number of 24 bits makes a pixel's three bytes
        bits = stream((*key, 0), height * width, images.device).unflatten(1, (height, width))  # (B, H, W)
        noise = torch.stack([((bits >> shift & 255) * 255) >> 8 for shift in (16, 8, 0)], dim=1).to(torch.uint8)
        return torch.where(mask[:, None], noise, images), mask
