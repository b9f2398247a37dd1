"""How an image of any size and depth becomes an input, and how maps and points find back to the original's pixels.

    geometry = Geometry(224, 224, fit="crop", resize=256)
    small = geometry.apply(image)
    heat = geometry.to_original(map, (image.height, image.width))  # (h, w)

Letters: H and W the input's height and width, h and w those of an original image, N images. Coordinates are in
pixels, y before x, and pixel i reaches from i to i + 1, so its centre is i + 0.5.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.augment import resample
from data.depth import WHITE
from data.normalize import MEAN
from runtime.errors import UserError

Fit = Literal["squash", "crop", "pad"]
Resample = Literal["bilinear", "bicubic", "lanczos"]
# A resized image of more pixels, and of far more than the crop, is not made whole: of 2 x 40000 pixels that took 6 GB.
# Pillow rounds a part's edges to 24 bits, so levels may differ by rounding; all others are torchvision's bit for bit.
LONG = 2**22
# Normalized it is about 0, with which convolutions pad: 0.01 at most with ImageNet's numbers, -0.2 to 0 with others'
FILL = tuple(round(255 * channel) for channel in MEAN)
GRAY = Image.new("RGB", (1, 1), FILL).convert("L").getpixel((0, 0))


@dataclass(frozen=True)
class Geometry:
    """An input of `height` x `width` pixels, and how images of other sizes and proportions are made to fit it.

    `squash`: both axes are stretched, whatever the proportions. `crop`: the short side becomes `resize` pixels, the
    proportions stay, and the centre is cut out (torchvision's Resize and CenterCrop): what lies outside is not seen.
    `pad`: as large as fits with its proportions kept, centred, and the rest filled with ImageNet's mean color.

    `resample` is Pillow's filter, antialiased. `black` and `white` are the values that become 0 and 255 in files of
    more than 8 bits (`data/depth.py`). With `gray` the three channels are equal, so that one of them can be kept.

    Raises:
        UserError: a size below 1, `crop` without a `resize` that covers the input, `resize` with another fit, a
            white that is not above black.
    """

    height: int
    width: int
    fit: Fit = "squash"
    resize: int | None = None  # short side before the center crop, in pixels
    resample: Resample = "bilinear"
    white: float = WHITE
    black: float = 0
    gray: bool = False

    def __post_init__(self):
        size = f"{self.height},{self.width}"
        if self.height < 1 or self.width < 1:
            raise UserError(f"data.size={size} must be at least 1 pixel high and wide")
        if self.fit not in ("squash", "crop", "pad"):
            raise UserError(f"data.fit={self.fit!r} is not known: choose squash, crop or pad")
        if self.fit == "crop" and (self.resize is None or self.resize < max(self.height, self.width)):
            raise UserError(
                f"data.fit=crop with data.size={size} needs the short side before the crop, at least "
                f"{max(self.height, self.width)}, not data.resize={self.resize}; 256 is usual for 224"
            )
        if self.fit != "crop" and self.resize is not None:
            raise UserError(
                f"data.resize={self.resize} is for data.fit=crop, and data.fit is {self.fit}: set data.resize=none"
            )
        if not self.black < self.white:
            raise UserError(f"data.white={self.white:.10g} must be above data.black={self.black:.10g}")

    def apply(self, image: Image.Image, resample: Image.Resampling | None = None) -> Image.Image:
        """An 8-bit Pillow image (L or RGB) in the input's size, by the geometry's filter unless another is given.

        NEAREST is for masks of mode L: their padding is 0, that of images the mean color, which makes them RGB
        unless the geometry is `gray`.
        """
        resample = Image.Resampling[self.resample.upper()] if resample is None else resample
        if self.fit == "squash":
            return image.resize((self.width, self.height), resample)
        top, left, height, width = self._place(image.height, image.width)
        if self._is_long(height, width):
            x, y = image.width / width, image.height / height  # pixels of the original per pixel of the resized one
            sides = -left * x, (self.width - left) * x
            image = image.resize((self.width, image.height), resample, (sides[0], 0, sides[1], image.height))
            ends = -top * y, (self.height - top) * y
            return image.resize((self.width, self.height), resample, (0, ends[0], self.width, ends[1]))
        image = image.resize((width, height), resample)
        if self.fit == "crop":
            return image.crop((-left, -top, self.width - left, self.height - top))
        is_mask = resample == Image.Resampling.NEAREST
        mode, fill = ("L", 0) if is_mask else ("L", GRAY) if self.gray else ("RGB", FILL)
        canvas = Image.new(mode, (self.width, self.height), fill)
        canvas.paste(image, (left, top))
        return canvas

    def whole(self, size: tuple[int, int]) -> "Geometry":
        """The same of an image's values, at its own size (h, w)."""
        return replace(self, height=size[0], width=size[1], fit="squash", resize=None)

    def regions(self, sizes: Tensor) -> Tensor:
        """Where the input shows an image and no padding, by the originals' `sizes` (N, 2) h, w, int64.

        Returns top, left, height and width in the input: int64 (N, 4); all of it for `squash` and `crop`.
        """
        begin, extent = self._placements(sizes)
        low = begin.clamp(min=0)
        high = torch.minimum(begin + extent, self._input(sizes))
        return torch.cat([low, high - low], dim=1)

    def valid(self, regions: Tensor) -> Tensor:
        """True inside each of the `regions` (B, 4): bool (B, H, W) on their device."""
        top, left, height, width = (edge[:, None] for edge in regions.unbind(1))  # each (B, 1)
        y, x = (torch.arange(length, device=regions.device) for length in (self.height, self.width))
        rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)  # (B, H), (B, W)
        return rows[:, :, None] & columns[:, None]

    def inside(self, sizes: Tensor, device: torch.device | str) -> Tensor | None:
        """Where the inputs show images of these original `sizes` (B, 2) h, w, and no padding: bool (B, H, W) on
        `device`; None without padding."""
        return self.valid(self.regions(sizes).to(device)) if self.fit == "pad" else None

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Top, left, height and width of what the input shows of an original (h, w), in its pixels, seldom whole."""
        sizes = torch.tensor([size])
        top_left, extent = self.regions(sizes).double().split(2, dim=1)
        low, high = (self.to_original_point(p, sizes)[0] for p in (top_left, top_left + extent))
        return (*low.tolist(), *(high - low).tolist())

    def to_original_point(self, points: Tensor, sizes: Tensor) -> Tensor:
        """Points (N, 2) y, x of the inputs, float, in the originals of `sizes` (N, 2) h, w: (N, 2).

        A point in the padding comes to lie outside the original.
        """
        begin, extent = (part.to(points) for part in self._placements(sizes))
        return (points - begin) * (sizes.to(points) / extent)

    def to_original(
        self, maps: Tensor, size: tuple[int, int], *, mode: Literal["bilinear", "nearest"] = "bilinear"
    ) -> Tensor:
        """A map (H, W), float, on the pixels of its original: (h, w); 0 where `crop` left the original out.

        `bilinear` as torch's interpolate with align_corners=False and, when it shrinks, antialias; what lies in padding
        has no influence. `nearest` takes the value under each original pixel's centre: for masks made of maps.
        """
        top, left, height, width = self._place(*size)
        if self._is_long(height, width):
            return self._long_to_original(maps, size, mode)
        # the map of the whole image: padding cut off, or the crop's border values repeated beyond it
        below, right = height + top - self.height, width + left - self.width
        whole = maps[max(top, 0) : self.height + min(below, 0), max(left, 0) : self.width + min(right, 0)]
        beyond = [max(-left, 0), max(right, 0), max(-top, 0), max(below, 0)]
        whole = F.pad(whole[None, None], beyond, mode="replicate")  # (1, 1, height, width)
        if mode == "nearest":
            result = F.interpolate(whole, size, mode="nearest-exact")
        else:
            result = F.interpolate(whole, size, mode="bilinear", antialias=True, align_corners=False)
        result = result[0, 0]  # (h, w)
        if self.fit == "crop":
            top, left, height, width = self.window(size)
            y, x = (torch.arange(length, device=maps.device) + 0.5 for length in size)
            seen = ((y > top) & (y < top + height))[:, None] & ((x > left) & (x < left + width))
            result = result * seen
        return result

    def _is_long(self, height: int, width: int) -> bool:
        return self.fit == "crop" and height * width > max(LONG, 16 * self.height * self.width)

    def _long_to_original(self, maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
        """`to_original` of a crop without a map of the whole image: pixels at the crop's edge may differ a little."""
        top, left, height, width = self._place(*size)
        whole, parts, matrices = torch.zeros(size, device=maps.device), [], []
        for begin, extent, shown, length in ((top, height, self.height, size[0]), (left, width, self.width, size[1])):
            step = extent / length  # map pixels per original pixel
            centers = (torch.arange(length, dtype=torch.float64) + 0.5) * step + begin
            seen = ((centers > 0) & (centers < shown)).nonzero()[:, 0]
            low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
            parts.append(slice(low, high))
            if mode == "nearest":
                matrix = F.one_hot(centers[low:high].long(), shown).to(maps)
            else:
                edges = torch.tensor([[low * step + begin, high * step + begin]])
                matrix = resample.resampling_matrix(edges, shown, max(high - low, 1), interpolation="bilinear")[0]
                matrix = matrix[: high - low].to(maps)
            matrices.append(matrix)
        whole[tuple(parts)] = matrices[0] @ maps @ matrices[1].T
        return whole

    def _place(self, height: int, width: int) -> list[int]:
        begin, extent = self._placements(torch.tensor([[height, width]]))
        return torch.cat([begin, extent], dim=1)[0].tolist()

    def _placements(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(top, left) and (height, width) of each whole image in input pixels, both int64 (N, 2).

        An image that is cropped begins above and to the left of the input, below 0.
        """
        room = self._input(sizes)
        if self.fit == "squash":
            extent = room.expand_as(sizes)
        elif self.fit == "crop":
            extent = self.resize * sizes // sizes.min(dim=1, keepdim=True).values  # torchvision rounds down
        else:
            tall = self.height * sizes[:, 1:] <= self.width * sizes[:, :1]  # (N, 1): the height is what limits it
            limit, side = torch.where(tall, room[0], room[1]), torch.where(tall, sizes[:, :1], sizes[:, 1:])
            extent = ((2 * limit * sizes + side) // (2 * side)).clamp(min=1)  # to the nearest pixel
        return ((room - extent).double() / 2).round().long(), extent  # halves to even, as torchvision's CenterCrop

    def _input(self, sizes: Tensor) -> Tensor:
        return torch.tensor([self.height, self.width], device=sizes.device)  # (2,)


def as_geometry(size: int | Geometry) -> Geometry:
    """`size` itself, or the square of `size` x `size` pixels into which images are squashed."""
    return size if isinstance(size, Geometry) else Geometry(size, size)
