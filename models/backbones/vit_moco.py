"""MoCo v3's vision transformers (Chen, Xie & He 2021, arXiv 2104.02057; official vits.py): patches embedded by a random
convolution that is never trained (section 4.2), fixed sine positions, and an initialization of their own."""

import math

import torch
from torch import Tensor, nn

from models.backbones.vit import ViT


def sine_positions(side: int, width: int) -> Tensor:
    """Positions of a class token (zeros) and of side x side patches: (1, 1 + side^2, width). A quarter of the channels
    each is sin and cos of the row, then of the column, over wavelengths from 2 pi to nearly 10000 x 2 pi
    patches."""
    rates = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    row, column = (torch.outer(n.flatten(), rates) for n in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    grid = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)  # (side^2, width)
    return torch.cat([torch.zeros(1, width), grid])[None]  # (1, 1 + side^2, width)


class ViTMoCo(ViT):
    """The family. Its parameters have ViT's names and shapes, but ViT-S has 12 heads, twice DINO's: weights of one
    load into the other but mean nothing there, so models/weights/load.py looks at the positions."""

    def start(self) -> None:
        """Initial weights: Xavier's uniform ones, zero biases; and the positions."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                parts = 3 if name.endswith("qkv") else 1  # queries, keys and values each by themselves
                _uniform(module, module.in_features + module.out_features // parts)
        with torch.no_grad():
            self.pos_embed.copy_(sine_positions(math.isqrt(self.pos_embed.shape[1] - 1), self.width))
        nn.init.normal_(self.cls_token, std=1e-6)
        proj = self.patch_embed["proj"]
        _uniform(proj, proj.in_channels * self.patch**2 + self.width)
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> nn.Module:
        """As for any module, except for what is never trained."""
        super().requires_grad_(requires_grad)
        for frozen in (self.pos_embed, *self.patch_embed.parameters()):
            frozen.requires_grad_(False)
        return self


class ViTMoCoSmall(ViTMoCo):
    width, heads = 384, 12


class ViTMoCoBase(ViTMoCo):
    width, heads = 768, 12


def _uniform(layer: nn.Linear | nn.Conv2d, fans: int) -> None:
    """Xavier's start for a layer whose fan in and fan out add up to `fans`."""
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
