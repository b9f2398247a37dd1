"""CBAM-ResNet (Woo et al. 2018, arXiv 1807.06521): a gate on channels, then one on positions, in every block.

As in the official repository, Jongchan/attention-module (MODELS/cbam.py), whose names `ChannelGate.mlp.1` and the like
`models/weights/load.py` maps to these. Shapes: B batch, C channels, H x W of the map.
"""

import torch
from torch import Tensor, nn

from models.backbones.resnet import BasicBlock, Bottleneck, ResNet

REDUCTION = 16


class ChannelGate(nn.Module):
    """A factor for each channel from the means and maxima of all: (B, C, H, W) -> (B, C, H, W) (equation 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // REDUCTION)
        self.fc2 = nn.Linear(channels // REDUCTION, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])  # (2, B, C)
        gate = self.fc2(self.fc1(pooled).relu()).sum(dim=0).sigmoid()  # (B, C)
        return x * gate[:, :, None, None]


class SpatialGate(nn.Module):
    """A factor for each position from the channels' maximum and mean there: (B, C, H, W) -> (B, C, H, W) (equation 3).

    The BatchNorm, which the paper does not mention, starts at zero as in the official code: all factors are 1/2."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)  # (B, 2, H, W)
        return x * self.bn(self.conv(pooled)).sigmoid()


class CBAM(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__()
        self.channel = ChannelGate(channels)
        self.spatial = SpatialGate()


class CBAMBasicBlock(BasicBlock):
    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float = 0.0):
        super().__init__(in_channels, channels, stride, drop_path)
        self.cbam = CBAM(channels)

    def branch(self, x: Tensor) -> Tensor:
        return self.cbam(super().branch(x))


class CBAMBottleneck(Bottleneck):
    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float = 0.0):
        super().__init__(in_channels, channels, stride, drop_path)
        self.cbam = CBAM(self.expansion * channels)

    def branch(self, x: Tensor) -> Tensor:
        return self.cbam(super().branch(x))


class CBAMResNet(ResNet):
    """ResNet's arguments and attributes."""

    def _initialize(self, zero_init_residual: bool) -> None:
        super()._initialize(zero_init_residual)
        for module in self.modules():
            if isinstance(module, SpatialGate):
                nn.init.zeros_(module.bn.weight)
            elif isinstance(module, ChannelGate):
                nn.init.zeros_(module.fc1.bias)
                nn.init.zeros_(module.fc2.bias)


class CBAMResNet18(CBAMResNet):
    block, depths = CBAMBasicBlock, (2, 2, 2, 2)


class CBAMResNet34(CBAMResNet):
    block, depths = CBAMBasicBlock, (3, 4, 6, 3)


class CBAMResNet50(CBAMResNet):
    block, depths = CBAMBottleneck, (3, 4, 6, 3)
