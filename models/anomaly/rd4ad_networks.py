"""RD4AD's trained networks, one-class bottleneck and decoder, with the official code's layers and parameter names."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resize = Literal["downsample", "upsample", ""]  # also the official name of a resizing block's shortcut


def _conv3(inputs: int, outputs: int, resize: Resize = "") -> nn.Module:
    """3x3 convolution, of stride 2 to downsample; to upsample, a 2x2 transposed one of stride 2."""
    if resize == "upsample":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if resize else 1, padding=1, bias=False)


def _shortcut(inputs: int, outputs: int, resize: Resize) -> nn.Sequential:
    """1x1 convolution of stride 2 to downsample; to upsample, a 2x2 transposed one of stride 2; then BatchNorm."""
    if resize == "upsample":
        return nn.Sequential(_conv3(inputs, outputs, resize), nn.BatchNorm2d(outputs))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """ResNet-18/34's block, halving or doubling the resolution in `conv1` and the shortcut when `resize` says so."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, resize: Resize, *, width: int):
        super().__init__()
        if width != 64:
            raise ValueError(f"a BasicBlock has base width 64, not {width}")
        self.resize = resize
        self.conv1, self.bn1 = _conv3(inputs, planes, resize), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv3(planes, planes), nn.BatchNorm2d(planes)
        if resize:
            self.add_module(resize, _shortcut(inputs, planes, resize))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = getattr(self, self.resize)(x) if self.resize else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """ResNet-50's block, halving or doubling the resolution in `conv2` and the shortcut when `resize` says so.

    Args:
        width: base width, 64 or, for Wide-ResNet-50-2, 128; the inner width is planes * width / 64.
    """

    expansion = 4

    def __init__(self, inputs: int, planes: int, resize: Resize, *, width: int):
        super().__init__()
        inner, outputs = planes * width // 64, 4 * planes
        self.resize = resize
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv3(inner, inner, resize), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        if resize:
            self.add_module(resize, _shortcut(inputs, outputs, resize))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = getattr(self, self.resize)(x) if self.resize else x
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


Block = type[BasicBlock] | type[Bottleneck]


def _layer(block: Block, inputs: int, planes: int, depth: int, resize: Resize, *, width: int) -> nn.Sequential:
    rest = [block(planes * block.expansion, planes, "", width=width) for _ in range(depth - 1)]
    return nn.Sequential(block(inputs, planes, resize, width=width), *rest)


def _init(network: nn.Module) -> None:
    """He initialisation, fan out, of the convolutions; transposed ones keep PyTorch's default, as in the official."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class OneClassBottleneck(nn.Module):
    """Multi-scale fusion and one-class embedding: the teacher's stages 1-3 to one map at half of stage 3's resolution.

    The official BN_layer. Its conv4 and bn4 are in every official checkpoint but never used; here they take no
    gradient either, so that DistributedDataParallel does not wait for theirs.

    Args:
        block, width: the teacher's.
        depth: number of blocks of the embedding, 2 for ResNet-18, 3 for the others.
    """

    def __init__(self, block: Block, depth: int, *, width: int):
        super().__init__()
        fine, mid, coarse = (planes * block.expansion for planes in (64, 128, 256))
        self.bn_layer = _layer(block, 3 * coarse, 512, depth, "downsample", width=width)
        self.conv1, self.bn1 = _conv3(fine, mid, "downsample"), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _conv3(mid, coarse, "downsample"), nn.BatchNorm2d(coarse)
        self.conv3, self.bn3 = _conv3(mid, coarse, "downsample"), nn.BatchNorm2d(coarse)
        self.conv4, self.bn4 = nn.Conv2d(4 * coarse, 2 * coarse, 1, bias=False), nn.BatchNorm2d(2 * coarse)
        self.conv4.requires_grad_(False)
        self.bn4.requires_grad_(False)
        _init(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """[(B, 64e, H, H), (B, 128e, H/2, H/2), (B, 256e, H/4, H/4)] -> (B, 512e, H/8, H/8), e the expansion."""
        fine = F.relu(self.bn1(self.conv1(features[0])))
        fine = F.relu(self.bn2(self.conv2(fine)))
        mid = F.relu(self.bn3(self.conv3(features[1])))
        return self.bn_layer(torch.cat([fine, mid, features[2]], dim=1))


class Decoder(nn.Module):
    """The official de_resnet: a ResNet's first three layers backwards, each doubling the resolution.

    Args:
        block, width: the teacher's.
        depths: blocks of layer1 (the coarsest here), layer2 and layer3, in the order of the teacher's layers 1-3: the
            official decoder mirrors the channels but not the depths.
    """

    def __init__(self, block: Block, depths: tuple[int, int, int], *, width: int):
        super().__init__()
        e = block.expansion
        self.layer1 = _layer(block, 512 * e, 256, depths[0], "upsample", width=width)
        self.layer2 = _layer(block, 256 * e, 128, depths[1], "upsample", width=width)
        self.layer3 = _layer(block, 128 * e, 64, depths[2], "upsample", width=width)
        _init(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 512e, H, H) -> the teacher's stages 1-3: [(B, 64e, 8H, 8H), (B, 128e, 4H, 4H), (B, 256e, 2H, 2H)]."""
        coarse = self.layer1(x)
        mid = self.layer2(coarse)
        return [self.layer3(mid), mid, coarse]
