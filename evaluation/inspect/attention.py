"""What a vision transformer's class token attends to: the last block's heads, the patches that hold most of it, and
attention rollout."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.backbones.vit import ViT
from runtime.errors import UserError

MASS = 0.6  # of a head's attention to patches, held by those that DINO outlines (its paper, figures 3 and 4)


class Attention(NamedTuple):
    """Of B images in h x w patches. What the class token gives to itself and to registers is missing in the sums."""

    heads: Tensor  # (B, heads, h, w), the last block's attention of the class token to the patches
    rollout: Tensor  # (B, h, w), the same over all blocks


@torch.no_grad()
def attention(vit: nn.Module, images: Tensor) -> Attention:
    """Of normalized images (B, 3, H, W), of any size that the patch divides.

    heads: official DINO's visualize_attention. rollout: Abnar and Zuidema 2020, "Quantifying attention flow in
    transformers", section 3.2: the class token's row of A_L ... A_1, where A_l is half the block's attention, averaged
    over its heads, and half the identity, which stands for the shortcut. It is multiplied from the left, a row at a
    time, which needs no product of two matrices.

    Raises:
        UserError: the backbone is no vision transformer, or the patch does not divide H or W.
    """
    if not isinstance(vit, ViT):
        raise UserError(f"attention is a vision transformer's, and {type(vit).__name__} has none: use task=gradcam")
    grid = images.shape[2] // vit.patch, images.shape[3] // vit.patch
    patches, means = grid[0] * grid[1], []
    x = vit.tokens(images)
    for block in vit.blocks:
        weights = block.attn.maps(block.norm1(x))  # (B, heads, T, T)
        means.append(weights.mean(1))  # (B, T, T)
        x = block(x)
    row = torch.zeros_like(means[0][:, :1])  # (B, 1, T)
    row[:, :, 0] = 1
    for mean in reversed(means):
        row = (row + row @ mean) / 2  # (B, 1, T)
    return Attention(weights[:, :, 0, -patches:].unflatten(2, grid), row[:, 0, -patches:].unflatten(1, grid))


def mass_mask(maps: Tensor, mass: float = MASS) -> Tensor:
    """The fewest patches that hold at least this share of each map (..., h, w): bool (..., h, w).

    As in official DINO's visualize_attention: sorted ascending, those whose cumulative share is above 1 - mass. Of
    equal patches the last ones are taken.
    """
    flat = maps.flatten(-2).double()  # (..., h w)
    values, order = flat.sort(dim=-1, stable=True)
    kept = values.cumsum(-1) > (1 - mass) * values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(maps.shape)  # (..., h, w)
