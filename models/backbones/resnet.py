"""ResNet (He et al. 2016, arXiv 1512.03385) and Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

Parameter names, initialization and outputs are torchvision's, so its weights load strictly. Like torchvision and unlike
the paper, a bottleneck strides on its 3x3 convolution ("v1.5"). Shapes: B batch, C channels, H x W the input's size.
"""

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor, nn

from models.backbones.drop_path import DropPath, drop_rates
from runtime.values import BelowOne, PositiveInt, WidthOrZero


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut of a block that changes the shape; None stands for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) -> (B, channels, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: BelowOne = 0.0):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = projection(in_channels, channels, stride)
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(self.branch(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut: (B, in, H, W) -> (B, 4 * channels, H / stride, W / stride)."""

    expansion = 4
    widening = 1  # factor on the channels of the 3x3 convolution alone

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: BelowOne = 0.0):
        super().__init__()
        inner, out_channels = self.widening * channels, self.expansion * channels
        self.conv1 = conv1x1(in_channels, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, out_channels, stride)
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(self.branch(x)) + shortcut)


class WideBottleneck(Bottleneck):
    widening = 2


class ResNet(nn.Module):
    """The family; a member names its `block` and its `depths`, the number of blocks in each of the four stages.

    Args:
        stem: "imagenet" is a 7x7 convolution of stride 2 and a max pool; "cifar" a 3x3 convolution of stride 1 and no
            pool, for 32x32 images (SimCLR, appendix B.9). It makes the stages' strides 1, 2, 4, 8. "cifar_solo" is
            solo-learn's, whose convolution is padded by 2, not 1: maps of H + 2, (H + 2) / 2, ... for its checkpoints.
        num_classes: 0 gives the pooled features, more adds a classifier.
        in_channels: of the images.
        drop_path: stochastic depth of the last block, linear from 0 at the first.
        zero_init_residual: start each block as its shortcut, by a zero weight in its last BatchNorm (arXiv 1706.02677).

    Attributes:
        num_features: channels of the pooled features.
        stage_channels: channels of the four maps of `forward_stages`.
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]

    def __init__(
        self,
        *,
        stem: Literal["imagenet", "cifar", "cifar_solo"] = "imagenet",
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        drop_path: BelowOne = 0.0,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1 if stem == "cifar" else 2, bias=False)
            self.maxpool = nn.Identity()
        self.stem = stem
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.stage_channels = [channels * self.block.expansion for channels in (64, 128, 256, 512)]
        self.num_features = self.stage_channels[-1]
        rates = iter(drop_rates(drop_path, sum(self.depths)))
        self.layer1 = self._stage(64, 64, self.depths[0], rates, stride=1)
        self.layer2 = self._stage(self.stage_channels[0], 128, self.depths[1], rates, stride=2)
        self.layer3 = self._stage(self.stage_channels[1], 256, self.depths[2], rates, stride=2)
        self.layer4 = self._stage(self.stage_channels[2], 512, self.depths[3], rates, stride=2)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self._initialize(zero_init_residual)

    def _stage(
        self, in_channels: int, channels: int, depth: int, rates: Iterator[float], *, stride: int
    ) -> nn.Sequential:
        first = self.block(in_channels, channels, stride, next(rates))
        rest = [self.block(channels * self.block.expansion, channels, 1, next(rates)) for _ in range(depth - 1)]
        return nn.Sequential(first, *rest)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward_stages(
        self, x: Tensor, last: int = 4, after: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Images (B, in_channels, H, W) -> the outputs of layer1 to layer4: [(B, stage_channels[i], H / s, W / s)],
        s = 4, 8, 16, 32 (CIFAR stems: 1, 2, 4, 8). Sizes that the stride does not divide are rounded up. What comes
        after stage `last` is not computed. `after(n, x)` is what stage n's output becomes, also for the next one."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (B, 64, H / 4, W / 4)
        maps = []
        for number, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)[:last], 1):
            x = stage(x)
            x = x if after is None else after(number, x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> pooled features (B, num_features), or logits (B, num_classes)."""
        x = self.forward_stages(x)[-1]
        return self.fc(x.mean(dim=(2, 3)))  # (B, C, H / 32, W / 32) -> (B, C) -> logits


class ResNet18(ResNet):
    block, depths = BasicBlock, (2, 2, 2, 2)


class ResNet34(ResNet):
    block, depths = BasicBlock, (3, 4, 6, 3)


class ResNet50(ResNet):
    block, depths = Bottleneck, (3, 4, 6, 3)


class ResNet101(ResNet):
    block, depths = Bottleneck, (3, 4, 23, 3)


class WideResNet50(ResNet):
    """Wide ResNet-50-2."""

    block, depths = WideBottleneck, (3, 4, 6, 3)
