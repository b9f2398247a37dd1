"""What pretraining puts behind the backbone and throws away afterwards. Shapes: B batch, F features, K prototypes."""

import torch
from torch import Tensor, nn


def projection_head(in_features: int, hidden: int, out_features: int, *, batch_norm: bool = True) -> nn.Sequential:
    """SimCLR's head (arXiv 2002.05709, section 2.1): (B, in_features) -> (B, out_features).

    Deviation from the official TensorFlow code, which has a BatchNorm in the place of the last layer's bias. SupCon's
    has no `batch_norm` (official networks/resnet_big.py).
    """
    return nn.Sequential(
        nn.Linear(in_features, hidden),
        *([nn.BatchNorm1d(hidden)] if batch_norm else []),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out_features),
    )


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

    MLP of three layers with GELU, L2 normalisation, then the cosine with each prototype times its length `weight_g`.

    Args:
        in_features, prototypes: F and K.
        hidden, bottleneck: width of the MLP and of the vector that is normalised.
        use_bn: BatchNorm before each GELU.
        norm_last_layer: the prototypes' lengths stay at 1. False trains them, and weight decay applies (they are 2-D).
    """

    def __init__(
        self,
        in_features: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ):
        super().__init__()
        layers = []
        for width_in, width_out in ((in_features, hidden), (hidden, hidden)):
            layers += [nn.Linear(width_in, width_out), *([nn.BatchNorm1d(width_out)] if use_bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck, prototypes)  # keeps Linear's own initialisation, as officially
        self.last_layer.weight_g.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.normalize(self.mlp(x), dim=-1)  # (B, bottleneck)
        return self.last_layer(x)
