"""A backbone's features of every patch of an image, for what compares patches: correspondence and segmentation.

A convolution sees zeros beyond the border, and deep features are first of all about that: border patches are alike in
all images. So a CNN gets its images with a margin, mirrored at the border, that is cut off the maps again.

Letters: B images of H x W pixels, h x w patches of them, C channels.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.normalize import normalization_of
from models.backbones.vit import ViT
from runtime.values import Range

Stage = Annotated[int, Range(least=1, most=4)]
STAGES = (2, 3)  # of a CNN, at strides 8 and 16: finer ones see texture, the coarsest one loses the place
MARGIN = 32  # pixels, the stride of the coarsest stage; none around images that have no more to mirror


class DenseFeatures(nn.Module):
    """A frozen backbone whose output are the patches' features: (B, 3, H, W) -> float32 (B, C, h, w).

    The chosen stages, each brought to the grid of the finest (bilinear) and to the same length at every patch, stand
    beside each other, so that the cosine of two patches is the mean of the stages' cosines; values have a root mean
    square of 1, as after a LayerNorm.

    Args:
        stages: of `forward_stages`; empty: of a ViT the patches' tokens after its last LayerNorm, as in STEGO, of other
            backbones `STAGES`.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...] = ()):
        super().__init__()
        self.backbone: Any = backbone
        self.normalization = normalization_of(backbone)
        self.tokens = isinstance(backbone, ViT) and not stages
        self.stages = tuple(sorted({*(stages or STAGES)}))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            patch = self.backbone.patch
            tokens = self.backbone.forward_tokens(x)[1].transpose(1, 2)  # (B, C, h w)
            maps = [tokens.unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))]
        else:
            margin = 0 if isinstance(self.backbone, ViT) or min(x.shape[2:]) <= MARGIN else MARGIN
            wide = F.pad(x, [margin] * 4, mode="reflect")
            found = self.backbone.forward_stages(wide, last=self.stages[-1])
            maps = [without_margin(found[stage - 1], margin, wide.shape[2:]) for stage in self.stages]
        units = [F.normalize(some.float(), dim=1) for some in maps]
        size, channels = maps[0].shape[2:], sum(some.shape[1] for some in maps)
        placed = [
            some if some.shape[2:] == size else F.normalize(F.interpolate(some, size, mode="bilinear"), dim=1)
            for some in units
        ]
        return torch.cat(placed, 1) * (channels / len(placed)) ** 0.5  # (B, C, h, w)


def without_margin(maps: Tensor, margin: int, size: torch.Size) -> Tensor:
    """Maps (B, C, h, w) of images that are `size` (H, W) pixels with a margin around them, without it."""
    top, left = (round(margin * cells / pixels) for cells, pixels in zip(maps.shape[2:], size))
    return maps[:, :, top : maps.shape[2] - top, left : maps.shape[3] - left]


class Flattened(nn.Module):
    """Maps of such a network as rows, for `evaluation.features.extract`: (B, 3, H, W) -> (B, C h w).

    Attributes:
        shape: (C, h, w), once it has seen a batch.
    """

    def __init__(self, dense: nn.Module):
        super().__init__()
        self.dense, self.normalization = dense, normalization_of(dense)
        self.shape = torch.Size()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.dense(x)
        self.shape = maps.shape[1:]
        return maps.flatten(1)
