"""Views with a synthetic defect, negatives of what is the same but for the defect.

    augment = DefectiveView(augment, DEFECTS["smooth_blend"]())
    *views, negative = augment(images, sample_ids, epoch)  # each (B, 3, h, w)

`data/defects/__init__.py` has the defects.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data.augment.views import Augment, View
from data.normalize import normalize, unnormalize
from runtime.errors import UserError


class DefectiveView:
    """An `Augment` whose views are followed by one more, the negative: the last of them with a defect.

    The defect is made after the augmentation, so that no crop loses it, and the last view is rounded to the bytes that
    the defect is made in: the two differ in the defect's mask and nowhere else. What is left to tell them apart by is
    the defect, and that includes the edge of a pasted one: "smooth_blend" and "nsa" have no sharp ones. Where the
    defect's mask is empty the negative is the view itself: "noise" leaves one image in five alone, "nsa" most of 32
    pixels. The other views are those of `augment`, bit for bit; like them, the negative is a function of (seed, epoch,
    sample id).

    Raises: UserError for an `augment` that has no plain views, and what the defect has to say.
    """

    def __init__(self, augment: Callable[..., list[Tensor]], defect: Callable[..., tuple[Tensor, Tensor]]):
        self.augment, self.defect = require_views(augment), defect

    @property
    def views(self) -> list[View]:
        return [*self.augment.views, self.augment.views[-1]]

    @torch.no_grad()
    def __call__(self, images: Tensor, sample_ids: Tensor, epoch: int) -> list[Tensor]:
        """images (B, 3, H, W) uint8, sample_ids (B,) int64 on the CPU -> [(B, 3, h, w) float32 for each view]."""
        *views, last = self.augment(images, sample_ids, epoch)
        normalization = self.augment.normalization
        last = unnormalize(last, normalization).mul_(255).round_().to(torch.uint8)  # (B, 3, h, w), as defects take them
        defective, _ = self.defect(last, sample_ids, epoch, seed=self.augment.seed)
        return [*views, normalize(last, normalization), normalize(defective, normalization)]


def require_views(augment: Callable[..., list[Tensor]]) -> Augment:
    """The augmentation, unless it is not an `Augment`: the patches of a grid, or views that have a defect already."""
    if not isinstance(augment, Augment):
        raise UserError("defect and spd each need plain views: set one of the two, and another recipe than patches")
    return augment
