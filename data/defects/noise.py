"""CDO's noise patches (Cao et al., Collaborative Discrepancy Optimization, TII 2023; github.com/caoyunkang/CDO)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.random_numbers import KINDS, stream, uniform, whole
from data.defects.blend import draw, large_enough
from data.defects.medians import majority
from runtime.memory import send
from runtime.values import Few

TRIES = 200  # rectangles that are drawn to find one off the background


@dataclass(frozen=True, kw_only=True)
class NoisePatches:
    """Rectangles of uniform noise (`rectangles`), 0 .. `most` of them, on an image `enlarged` times as high and wide.

    Every channel of every pixel is uniform in 0 .. 254 (0 is twice as likely, for bytes are 256). The enlarged image
    is shrunk again (bilinear, antialiased), so that at 4 the noise is weaker and its edges soft. The mask is the
    rectangles and what the shrinking mixes with them, empty in one image of `most` + 1. A pixel of noise may happen
    to be the one that was there.

    The authors' first version is `enlarged=1`, for some categories with `skip_background`: no centre lies where the
    image is dark or bright (`background`). The second draws on 1024 x 1024 pixels and is `enlarged=4` for 256.
    """

    most: Few = 4  # rectangles, at most
    enlarged: Few = 1  # times, the image that the noise is drawn on; 4 makes it weaker and its edges soft
    skip_background: bool = False  # no centre lies where the image is dark or bright

    @torch.no_grad()
    def __call__(
        self, images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        key = seed, epoch, view, sample_ids
        numbers = draw(images, (*key, *KINDS["noise"]), 1 + 4 * self.most)
        height, width = size = tuple(self.enlarged * side for side in images.shape[2:])
        large_enough(self, images, min(size) >= 20, "a tenth of a side must be at least 2 pixels")
        counts = whole(numbers[:, :1], 0, self.most)  # (B, 1)
        shown = torch.arange(self.most) < counts  # (B, most)
        half, place = numbers[:, 1:].unflatten(1, (2, self.most, 2)).unbind(1)  # each (B, most, 2)
        if self.skip_background:
            ends, free = self.off_background(images, key, size)
            shown = shown & free
        else:
            ends = rectangles(half, place, size)  # (B, most, 2 axes, 2 ends)
        ends = ends * shown[..., None, None]  # those that are not there are empty
        mask = covered(send(ends, images.device), size)  # (B, h, w)
        # one number of 24 bits makes a pixel's three bytes
        bits = stream((*key, *KINDS["noise_pixels"]), height * width, images.device).unflatten(1, size)  # (B, h, w)
        noise = torch.stack([((bits >> shift & 255) * 255) >> 8 for shift in (16, 8, 0)], dim=1).to(torch.uint8)
        if self.enlarged == 1:
            return torch.where(mask[:, None], noise, images), mask
        made, changed = images.clone(), torch.empty(images[:, 0].shape, dtype=torch.bool, device=images.device)
        for i in range(len(images)):  # one by one, for an enlarged image takes much memory
            planes = torch.cat([noise[i] * mask[i], mask[i, None]]).float()[None]  # (1, 4, h, w)
            *color, share = F.interpolate(planes, images.shape[2:], mode="bilinear", antialias=True)[0]  # each (H, W)
            made[i] = (images[i] * (1 - share) + torch.stack(color)).round_().to(torch.uint8)
            changed[i] = share > 0
        return made, changed

    def off_background(self, images: Tensor, key: tuple, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of TRIES rectangles for each patch the first whose centre is not on the background: ends (B, most, 2, 2) as
        of `rectangles`, and whether there is one, bool (B, most). The host waits for a GPU here, once per batch."""
        numbers = uniform((*key, *KINDS["noise_places"]), 4 * self.most * TRIES)
        ends = rectangles(*numbers.unflatten(1, (2, self.most, TRIES, 2)).unbind(1), size)  # (B, most, TRIES, 2, 2)
        y, x = (ends.sum(4) // (2 * self.enlarged)).long().unbind(3)  # (B, most, TRIES) in the image
        away = background(images).cpu()
        free = ~away.flatten(1).gather(1, (y * images.shape[3] + x).flatten(1)).view_as(y)
        first = free.to(torch.uint8).argmax(2)[..., None, None, None].expand(-1, -1, 1, 2, 2)
        return ends.gather(2, first)[:, :, 0], free.any(2)


def rectangles(half: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
    """CDO's patches in an image with sides S, as both official versions draw them: half of each side is uniform from
    S // 40 to S // 10 - 1 pixels (here at least 1), the center uniform where the patch fits.

    half, place: uniform numbers in [0, 1), (..., 2) for the two axes. Returns first and past-last row and column,
    int32 (..., 2 axes, 2 ends).
    """
    sides = torch.tensor(size, device=half.device)
    half = whole(half, (sides // 40).clamp(min=1), (sides // 10 - 1).clamp(min=1))
    first = whole(place, 0, sides - 2 * half - 1)
    return torch.stack([first, first + 2 * half], dim=-1).int()


def covered(ends: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels inside any of each image's n rectangles: ends (B, n, 2 axes, 2 ends) -> bool (B, H, W)."""
    first, last = ends[..., None].unbind(3)  # each (B, n, 2, 1)
    y, x = (torch.arange(side, device=ends.device) for side in size)
    rows = (y >= first[:, :, 0]) & (y < last[:, :, 0])  # (B, n, H)
    columns = (x >= first[:, :, 1]) & (x < last[:, :, 1])  # (B, n, W)
    mask = torch.zeros(len(ends), *size, dtype=torch.bool, device=ends.device)
    for row, column in zip(rows.unbind(1), columns.unbind(1)):
        mask |= row[:, :, None] & column[:, None]
    return mask


def background(images: Tensor) -> Tensor:
    """Where an image is dark (gray below 30) or bright (above 220), as official v1: specks taken out by the median of
    7 x 7, the rest grown by 9 pixels; uint8 (B, 3, H, W) -> bool (B, H, W)."""
    summed = images.float().sum(1)  # (B, H, W), three times gray
    found = majority((summed < 3 * 30) | (summed > 3 * 220), 7)
    return F.max_pool2d(found.float()[:, None], 19, stride=1, padding=9)[:, 0] > 0  # (B, H, W)
