"""CutPaste (Li et al., CVPR 2021, section 2.1), its scar, and SmoothBlend (Zou et al., SPot-the-Difference, ECCV 2022):
a patch of an image, in slightly other colors, put on another place of the same image.

The calls are those of `data/defects/__init__.py`.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from data.augment.random_numbers import KINDS, between, whole
from data.defects.blend import JITTER_DRAWS, blend, draw, draw_extents, jittered, large_enough, moved
from runtime.memory import send
from runtime.values import Pixels, PositiveFloat, Range, Rising, RisingFactors, RisingShares

Extents = Annotated[tuple[Pixels, Pixels], Rising()]
Jitter = Annotated[float, Range(least=0, most=0.5)]


@dataclass(frozen=True, kw_only=True)
class CutPasteDefect:
    """A rectangle pasted at a uniform place. The mask is the rectangle: nothing changes outside.

    The paper draws the aspect uniformly from (0.3, 1) or (1, 3.3); here its logarithm is uniform in (0.3, 3.3), as in
    Runinho's pytorch-cutpaste, whose results are the ones that can be checked.
    """

    area: RisingShares = (0.02, 0.15)  # share of the image's
    aspect: RisingFactors = (0.3, 3.3)  # width / height
    jitter: Jitter = 0.1  # of brightness, contrast, saturation and hue, as in ColorJitter

    def __call__(
        self, images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        numbers = draw(images, (seed, epoch, view, sample_ids, *KINDS["cutpaste"]), 6 + JITTER_DRAWS)
        patches, inside, *_ = rectangles(self, images, numbers)
        return blend(images, patches, inside), inside


@dataclass(frozen=True, kw_only=True)
class SmoothBlend:
    """A small rectangle whose opacity falls off towards its edges like a box under a Gaussian blur.

    alpha is the product over both axes of Phi(d / s - 2) Phi(e / s - 2), where d and e are the distances to the
    rectangle's two edges, s = `softness` times its shorter side and Phi the Gaussian's cumulative distribution: 2 % at
    the edge, 0 beyond. The mask is the rectangle, so a superset of what changes.

    The authors' code has no SmoothBlend. The paper (by others' notes of it) jitters a patch, puts it somewhere on black
    and blends by its mask after a Gaussian blur, which reaches beyond the patch and darkens there; ours ends at the
    edge. Area and softness are ours, too.
    """

    area: RisingShares = (0.005, 0.05)  # share of the image's
    aspect: RisingFactors = (0.3, 3.3)  # width / height
    jitter: Jitter = 0.1  # of brightness, contrast, saturation and hue, as in ColorJitter
    softness: PositiveFloat = 0.125  # of the edges, as a share of the rectangle's shorter side

    def __call__(
        self, images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        numbers = draw(images, (seed, epoch, view, sample_ids, *KINDS["smooth_blend"]), 6 + JITTER_DRAWS)
        patches, inside, extents, center = rectangles(self, images, numbers)
        low = center - extents / 2
        scale = self.softness * extents.amin(1)
        top, left, bottom, right, scale = send(
            torch.stack([*low.unbind(1), *(low + extents).unbind(1), scale]).float(), images.device
        )[..., None]  # each (B, 1)
        profiles = []
        for size, begin, end in ((images.shape[2], top, bottom), (images.shape[3], left, right)):
            at = torch.arange(size, device=images.device) + 0.5  # (size,)
            depths = (at - begin) / scale - 2, (end - at) / scale - 2  # each (B, size)
            profiles.append(torch.special.ndtr(depths[0]) * torch.special.ndtr(depths[1]))
        alpha = profiles[0][:, :, None] * profiles[1][:, None] * inside  # (B, H, W)
        return blend(images, patches, alpha), inside


def rectangles(defect, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rectangles of area and aspect moved and jittered: patches, inside as of `moved`; extents, centers (B, 2) there.

    numbers (B, 6 + JITTER_DRAWS): area, aspect, top and left from where, top and left to where, jitter.
    """
    shape = tuple(images.shape[2:])
    pixels = defect.area[0] * shape[0] * shape[1]
    large_enough(defect, images, pixels >= 1, "the smallest patch is less than one pixel")
    extents = draw_extents(numbers[:, :2], shape, defect.area, defect.aspect)
    room = torch.tensor(shape) - extents
    begin, end = whole(numbers[:, 2:4], 0, room), whole(numbers[:, 4:6], 0, room)
    center = end + extents / 2
    patches, inside = moved(images, begin, extents, center)
    return jittered(patches, inside, defect.jitter, numbers[:, 6:]), inside, extents, center


@dataclass(frozen=True, kw_only=True)
class Scar:
    """A thin rectangle, turned, pasted where all of it fits. The mask is the turned rectangle: the rest stays.

    Sizes are the paper's, for images of 256 x 256, and are not scaled with the image.
    """

    width: Extents = (2, 16)  # pixels, both ends included
    length: Extents = (10, 25)  # pixels: the height, before it is turned
    rotation: Annotated[float, Range(least=0, most=90)] = 45.0  # degrees at most, either way
    jitter: Jitter = 0.1  # of brightness, contrast, saturation and hue, as in ColorJitter

    def __call__(
        self, images: Tensor, sample_ids: Tensor, epoch: int, *, seed: int, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        diagonal = math.ceil(math.hypot(self.width[1], self.length[1]))
        large_enough(self, images, min(images.shape[2:]) >= diagonal, f"the longest scar needs {diagonal} pixels")
        numbers = draw(images, (seed, epoch, view, sample_ids, *KINDS["scar"]), 7 + JITTER_DRAWS)
        extents = torch.stack([whole(numbers[:, 0], *self.length), whole(numbers[:, 1], *self.width)], dim=1)
        turns = between(numbers[:, 2], (-self.rotation, self.rotation)).deg2rad()
        shape = torch.tensor(images.shape[2:])
        begin = whole(numbers[:, 3:5], 0, shape - extents)
        cos, sin = turns.cos()[:, None], turns.sin().abs()[:, None]  # each (B, 1)
        spread = extents * cos + extents.flip(1) * sin  # (B, 2): height and width of the turned rectangle
        center = spread / 2 + numbers[:, 5:7] * (shape - spread)
        patches, inside = moved(images, begin, extents, center, turns)
        return blend(images, jittered(patches, inside, self.jitter, numbers[:, 7:]), inside), inside
