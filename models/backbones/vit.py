"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) in DINO's sizes, with DINOv2's additions.

Parameter names are timm's, which are official DINO's. Shapes: B batch, D width, N patches, T = 1 + registers + N
tokens, h x w patches of an image of H x W pixels.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.drop_path import DropPath, drop_rates
from runtime.errors import UserError
from runtime.values import BelowOne, FewOrZero, NonNegativeFloat, Pixels, PositiveInt, WidthOrZero

DEPTH = 12
STAGE_ENDS = (3, 6, 9, 12)  # blocks after which `forward_stages` returns a map


class Attention(nn.Module):
    """Self-attention of several heads: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D) -> queries, keys and values, each (B, heads, T, D / heads)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # from (3, B, heads, T, D / heads)

    def maps(self, x: Tensor) -> Tensor:
        """How much each token attends to each other one: (B, heads, T, T), rows sum to one."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))  # (B, T, D)


class LayerScale(nn.Module):
    """A factor for each channel (arXiv 2103.17239): (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, value: float):
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a shortcut: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, drop_path: float, layer_scale: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def resample(positions: Tensor, h: int, w: int, how: str) -> Tensor:
    """A position embedding of a class token and a square of patches, (1, 1 + side^2, D), for h x w patches:
    (1, 1 + h w, D). `how` is ViT's argument `interpolation`."""
    side = math.isqrt(positions.shape[1] - 1)
    if (h, w) == (side, side):
        return positions
    first, rest = positions.split([1, side * side], dim=1)
    grid = rest.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    if how == "dino":  # the 0.1 keeps rounding from losing a patch, and moves all a little
        factors = ((h + 0.1) / side, (w + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")  # (1, D, h, w)
    else:
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


class ViT(nn.Module):
    """The family; a member names its `width` and `heads`. All have 12 blocks.

    Args:
        num_classes: 0 gives the class token, more adds a classifier.
        in_channels: of the images.
        patch: side of a patch; 16 or 8 for the published weights, 14 for DINOv2's, 4 or less for small images.
        size: side of the images that the position embedding is made for, 224 in the official code (518 in DINOv2).
        interpolation: how the position embedding is resized. `dino`: bicubic, by the factor (patches + 0.1) / side, as
            official DINO (and DINOv2 without registers). `timm`: bicubic with antialiasing, to the number of patches.
        drop_path: stochastic depth of the last block, linear from 0 at the first.
        layer_scale: initial factor of each branch; 0 for none, 1e-5 in DINOv2.
        registers: tokens that belong to no patch (arXiv 2309.16588); 4 in DINOv2's models of that name.

    Attributes:
        num_features: D. stage_channels: D four times.
    """

    width: int
    heads: int

    def __init__(
        self,
        *,
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        patch: Pixels = 16,
        size: Pixels = 224,
        interpolation: Literal["dino", "timm"] = "dino",
        drop_path: BelowOne = 0.0,
        layer_scale: NonNegativeFloat = 0.0,
        registers: FewOrZero = 0,
    ):
        super().__init__()
        if size % patch:
            raise UserError(f"backbone.size={size} must be a multiple of backbone.patch={patch}")
        self.patch, self.interpolation = patch, interpolation
        self.num_features, self.stage_channels = self.width, [self.width] * len(STAGE_ENDS)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        # the class token's comes first
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, self.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, self.width)) if registers else None
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_channels, self.width, patch, stride=patch)})
        rates = drop_rates(drop_path, DEPTH)
        self.blocks = nn.ModuleList(Block(self.width, self.heads, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()
        self.start()

    def start(self) -> None:
        """Initial weights of the layers: official DINO's; the patches' convolution keeps torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)  # DINOv2's

    def positions(self, h: int, w: int) -> Tensor:
        """The position embedding for h x w patches: (1, 1 + h w, D)."""
        return resample(self.pos_embed, h, w, self.interpolation)

    def tokens(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> what enters the first block: (B, T, D)."""
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            fitting = sorted({max(side // self.patch + up, 1) * self.patch for side in x.shape[2:] for up in (0, 1)})
            raise UserError(
                f"{type(self).__name__} cuts images into patches of {self.patch} x {self.patch} pixels, but "
                f"{x.shape[2]} x {x.shape[3]} is not a multiple: change the size (to {', '.join(map(str, fitting))}), "
                "or backbone.patch"
            )
        x = self.patch_embed["proj"](x)  # (B, D, h, w)
        positions = self.positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + positions
        if self.register_tokens is None:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)

    def forward_stages(
        self, x: Tensor, last: int = 4, after: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Images (B, in_channels, H, W) -> the patches' tokens after blocks 3, 6, 9 and 12, before the final LayerNorm,
        as maps: [(B, D, H / patch, W / patch)]. What comes after stage `last` is not computed. `after(n, x)` is what
        stage n's map becomes, also for the next stage.

        Raises:
            UserError: the patch does not divide H or W.
        """
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        x, maps = self.tokens(x), []
        for number, block in enumerate(self.blocks[: STAGE_ENDS[last - 1]], 1):
            x = block(x)
            if number in STAGE_ENDS:
                first, rest = x[:, : -h * w], x[:, -h * w :]
                grid = rest.transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
                if after is not None:
                    grid = after(len(maps) + 1, grid)
                    x = torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)  # (B, T, D)
                maps.append(grid)
        return maps

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, in_channels, H, W) -> the class token (B, D) and the patches' (B, N, D), after the LayerNorm."""
        patches = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, -patches:]

    def class_tokens(self, x: Tensor, blocks: int) -> Tensor:
        """Images (B, in_channels, H, W) -> the class tokens of the last `blocks` blocks, in their order, each after the
        LayerNorm: (B, blocks D), official DINO's features for a linear classifier (get_intermediate_layers)."""
        x, tokens = self.tokens(x), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= len(self.blocks) - blocks:
                tokens.append(self.norm(x[:, 0]))  # (B, D)
        return torch.cat(tokens, dim=1)

    def attention_maps(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> the last block's attention (B, heads, T, T), as official DINO's
        get_last_selfattention; row 0 is the class token's, its last N columns are the patches."""
        x = self.tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.maps(self.blocks[-1].norm1(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> the class token (B, D), or logits (B, num_classes)."""
        return self.head(self.forward_tokens(x)[0])


class ViTTiny(ViT):
    width, heads = 192, 3


class ViTSmall(ViT):
    width, heads = 384, 6


class ViTBase(ViT):
    width, heads = 768, 12
