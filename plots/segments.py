"""Segments of an image as colors over it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from plots.heatmaps import outline
from plots.style import category

SIDE = 150  # pixels of the longer side of an image


def segments_over(image: Tensor, labels: Tensor | None, bare: int | None, mask: Tensor | None) -> Tensor:
    """Labels int64 (H, W) as colors over an image uint8 (3, H, W), which goes grey, and the mask bool (H, W) outlined:
    uint8 (3, h, w), of which the longer side has `SIDE` pixels.

    Args:
        labels: None: the image as it is.
        bare: this label has no color.
    """
    scale = SIDE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    drawn = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]
    if labels is not None:
        small = F.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0].long()  # (h, w)
        grey = drawn.mean(0).expand(3, -1, -1)
        palette = torch.tensor([category(n) for n in range(int(labels.max()) + 1)]).float()  # (K, 3)
        colors = palette[small].permute(2, 0, 1)  # (3, h, w)
        share = 0.55 * (small != (-1 if bare is None else bare))
        drawn = torch.lerp(grey, colors, share.float())
    drawn = drawn.round().clamp(0, 255).byte()
    if mask is not None and mask.any():
        drawn = outline(drawn, F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] > 0)
    return drawn
