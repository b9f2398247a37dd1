"""The views of SPot-the-Difference (Zou et al., ECCV 2022, section 3.2): an image as it is, the same under a weak
global augmentation, and that with a local defect.

    augment = SpotTheDifference(augment, DEFECTS["smooth_blend"]())
    *views, anchor, positive, negative = augment(images, sample_ids, epoch)  # each (B, 3, h, w)
"""

from collections.abc import Callable

from torch import Tensor

from data.augment.negatives import DefectiveView, require_views
from data.augment.views import Augment, View


def weak(like: View) -> View:
    """Crop, flip, color jitter and blur as the paper lists them, all slight; how slight is ours, not the paper's.

    It flips as often as the recipe does, which may have to tell left from right.
    """
    return View(
        like.size,
        scale=(0.8, 1.0),
        interpolation=like.interpolation,
        flip_p=like.flip_p,
        jitter_p=0.8,
        jitter=(0.1, 0.1, 0.1, 0.02),
        blur_p=0.5,
        blur_kernel=min(like.shape) // 10 // 2 * 2 + 1,
        blur_sigma=(0.1, 1.0),
    )


class SpotTheDifference(DefectiveView):
    """An `Augment` whose views are followed by three more, as large as its first one: anchor, positive, negative.

    The anchor is only resized. The negative is the positive with a defect, made after the augmentation as in the paper:
    the two differ in the defect's mask and nowhere else, so that no global change can tell them apart, and no crop can
    lose the defect. (Whether the paper draws two weak augmentations or, as here, one, is not known here.) The other
    views are those of `augment`, bit for bit; like them, the three are functions of (seed, epoch, sample id).
    """

    def __init__(self, augment: Callable[..., list[Tensor]], defect: Callable[..., tuple[Tensor, Tensor]]):
        augment = require_views(augment)
        first = augment.views[0]
        more = [View(first.size, interpolation=first.interpolation), weak(first)]
        own = {"sizes": augment.sizes, "normalization": augment.normalization}
        super().__init__(Augment([*augment.views, *more], augment.seed, **own), defect)
