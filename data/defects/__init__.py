"""Synthetic defects by name: batched, on the images' device, with masks, a function of (seed, epoch, view, sample).

    defect = DEFECTS["cutpaste"](area=(0.02, 0.15))
    defective, masks = defect(images, sample_ids, epoch, seed=0)

images (B, 3, H, W) uint8; sample_ids (B,) int64 on the CPU -> defective images (B, 3, H, W) uint8, since that is what
`Augment` and `normalize` take, and masks (B, H, W) bool; outside its mask an image is as it was. `view` tells apart
several defects of one kind on one image. Nothing of it depends on the other images of the batch.

Raises: UserError for images in which the defect finds no room, or options that make no sense.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from data.defects.cutpaste import CutPasteDefect, Scar, SmoothBlend
from data.defects.noise import NoisePatches
from data.defects.nsa import NSADefect
from runtime.schema import choice

DEFECTS: dict[str, Callable[..., Callable[..., tuple[Tensor, Tensor]]]] = {
    "cutpaste": CutPasteDefect,
    "scar": Scar,
    "smooth_blend": SmoothBlend,
    "nsa": NSADefect,
    "noise": NoisePatches,
}


@dataclass(kw_only=True)
class DefectConfig:
    """`defect.*`: the name of a kind of synthetic defects and its keyword-only arguments."""

    name: str = choice(DEFECTS)
    options: dict = field(default_factory=dict)
