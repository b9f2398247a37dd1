"""Heads that pretraining puts on a backbone and discards afterwards. Shapes: B batch, F features, K prototypes."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn


def head_widths(features: int, head: Literal["linear", "mlp"], hidden: int, out: int, *, layers: int = 2) -> list[int]:
    """Widths for `mlp` of a projection head: one layer for `linear`, `layers` for `mlp`; hidden 0 is `features`."""
    return [features, *[hidden or features] * (layers - 1 if head == "mlp" else 0), out]


def mlp(
    widths: list[int],
    *,
    batch_norm: bool = True,
    bias: bool = False,
    last_bias: bool = False,
    last_norm: bool = False,
) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them: (B, widths[0]) -> (B, widths[-1]).

    Args:
        batch_norm: before each ReLU. bias, last_bias: of the hidden layers and of the last one.
        last_norm: a BatchNorm without parameters after the last layer.

    The published heads, as in their official code; two layers unless stated otherwise:

        SimCLR           bias, last_bias (in TensorFlow each layer has a BatchNorm in the place of its bias)
        SupCon, MoCo v2  bias, last_bias, no batch_norm
        MoCo v3          last_norm, for a ViT three layers; predictor: last_norm for a ViT only
        PsCo             last_norm; predictor without
        BYOL             bias; projector and predictor
        SimSiam          three layers, last_norm (the last layer's frozen bias, which it undoes, is left out);
                         predictor: last_bias
        Barlow Twins     three layers
        VICReg           three layers, bias
    """
    layers = []
    for number, (width_in, width_out) in enumerate(pairwise(widths), 1):
        if number < len(widths) - 1:
            layers.append(nn.Linear(width_in, width_out, bias=bias))
            layers += [nn.BatchNorm1d(width_out)] if batch_norm else []
            layers.append(nn.ReLU(inplace=True))
        else:
            layers.append(nn.Linear(width_in, width_out, bias=last_bias))
            layers += [nn.BatchNorm1d(width_out, affine=False)] if last_norm else []
    return nn.Sequential(*layers)


def normed_mlp(in_features: int, widths: list[int]) -> nn.Sequential:
    """pytorch-cutpaste's head (model.py), BatchNorm and ReLU after every layer: (B, in_features) -> (B, widths[-1])."""
    layers = []
    for width_in, width_out in zip([in_features, *widths], widths):
        layers += [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class WeightNormLinear(nn.Module):
    """Linear without bias whose row k is weight_g[k] * weight_v[k] / |weight_v[k]| (arXiv 1602.07868, equation 2):
    (B, F) -> (B, K).

    torch's old `weight_norm` with its parameter names, which official DINO checkpoints use, but not its warnings; and
    unlike a module under torch's, this one can be deep-copied.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        direction = nn.Linear(in_features, out_features, bias=False).weight
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(direction.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))  # (K, F)
        return nn.functional.linear(x, rows)


class DINOHead(nn.Module):
    """DINO's head, as in the official vision_transformer.py: (B, in_features) -> logits (B, prototypes).

    MLP with GELU, L2 normalization, then the cosine with each prototype times its length `weight_g`.

    Args:
        in_features, prototypes: F and K.
        layers, hidden, bottleneck: of the MLP, its width, and that of the vector that is normalized.
        use_bn: BatchNorm before each GELU.
        norm_last_layer: the prototypes' lengths stay at 1. False trains them, and weight decay applies (they are 2-D).
    """

    def __init__(
        self,
        in_features: int,
        prototypes: int,
        *,
        layers: int = 3,
        hidden: int = 2048,
        bottleneck: int = 256,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        widths, modules = [in_features, *[hidden] * (layers - 1)], []
        for width_in, width_out in pairwise(widths):
            modules += [nn.Linear(width_in, width_out), *([nn.BatchNorm1d(width_out)] if use_bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*modules, nn.Linear(widths[-1], bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # keeps Linear's own initialization, as in the official code
        self.last_layer = WeightNormLinear(bottleneck, prototypes)
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(self.mlp(x), dim=-1)  # (B, bottleneck)
        return self.last_layer(x)
