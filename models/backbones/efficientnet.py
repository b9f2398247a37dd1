"""EfficientNet (Tan & Le 2019, arXiv 1905.11946), B0 to B4, and EfficientNet-Lite (tensorflow/tpu, lite/), 0 to 2.

Parameter names, initialization and outputs of B0 to B4 are torchvision's, so its weights load strictly. It has no Lite;
here these have the same names without those of squeeze and excitation. models/weights/names.py translates timm's.
Shapes: B batch, C channels, H x W the input's size.
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from data.normalize import HALF
from models.backbones.drop_path import DropPath
from models.backbones.mobilenet import MobileNet, scaled
from models.backbones.mobilenet_v3 import conv_bn
from runtime.values import BelowOne, NonNegativeFloat, PositiveInt, WidthOrZero

# Expansion, kernel, stride of the first, channels, number of blocks of B0 (table 1 of the paper)
SETTINGS = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
STEM, HEAD = 32, 1280  # channels before and after them


class SqueezeExcitationSiLU(nn.Module):
    """A factor in [0, 1] for each channel, from the means of all: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.fc2(F.silu(self.fc1(means))).sigmoid()


class MBConv(nn.Module):
    """Expand by 1x1, filter each channel, weigh the channels, project by 1x1 without activation:
    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        squeeze: bool,
        activation: type[nn.Module],
        padding: str,
        drop_path: float,
    ):
        super().__init__()
        hidden = in_channels * expansion
        self.block = nn.Sequential(
            *([conv_bn(in_channels, hidden, 1, activation)] if expansion > 1 else []),
            conv_bn(hidden, hidden, kernel, activation, stride=stride, groups=hidden, padding=padding),
            *([SqueezeExcitationSiLU(hidden, max(1, in_channels // 4))] if squeeze else []),
            conv_bn(hidden, out_channels, 1, None),
        )
        self.drop_path = DropPath(drop_path)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.block(x)) if self.has_shortcut else self.block(x)


class EfficientNet(MobileNet):
    """The family; a member names its `width` and `depth`, factors on the channels and on the numbers of blocks of B0
    (both rounded, the latter up), and the `dropout` before its classifier.

    Args:
        num_classes: 0 gives the pooled features, more adds dropout and a classifier.
        in_channels: of the images.
        bn_eps: added to BatchNorms' variances; 1e-3 for weights that were trained in TensorFlow.
        padding: of the convolutions with stride; `tensorflow` for weights that were trained there, timm's `tf_`.
        drop_path: stochastic depth, of block i of n `drop_path` i / n; 0.2 in the official training.

    Attributes:
        num_features: channels of the pooled features.
        stage_channels: channels of the four maps of `forward_stages`.
    """

    width: float
    depth: float
    dropout: float
    lite = False
    stage_ends = (2, 3, 5, 7)  # of `features`, the last at each stride

    def __init__(
        self,
        *,
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        bn_eps: NonNegativeFloat = 1e-5,
        padding: Literal["torch", "tensorflow"] = "torch",
        drop_path: BelowOne = 0.0,
    ):
        super().__init__()
        self.bn_eps, self.padding = bn_eps, padding
        activation = nn.ReLU6 if self.lite else nn.SiLU
        stem, self.num_features = (n if self.lite else scaled(n, self.width) for n in (STEM, HEAD))
        channels = [stem]  # after each of `features`
        layers: list[nn.Module] = [conv_bn(in_channels, stem, 3, activation, stride=2, padding=padding)]
        depths, done = self.depths(), 0
        for (expansion, kernel, stride, out_channels, _), depth in zip(SETTINGS, depths):
            channels.append(scaled(out_channels, self.width))
            how = {"expansion": expansion, "kernel": kernel, "squeeze": not self.lite, "activation": activation}
            blocks = []
            for i in range(depth):
                ends = channels[-2 if i == 0 else -1], channels[-1]
                drop = drop_path * done / sum(depths)
                blocks.append(MBConv(*ends, **how, stride=stride if i == 0 else 1, padding=padding, drop_path=drop))
                done += 1
            layers.append(nn.Sequential(*blocks))
        layers.append(conv_bn(channels[-1], self.num_features, 1, activation))
        self.features = nn.Sequential(*layers)
        self.stage_channels = [channels[i] for i in self.stage_ends]
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Sequential(nn.Dropout(self.dropout), nn.Linear(self.num_features, num_classes))
        self._initialize(num_classes)

    @classmethod
    def depths(cls) -> list[int]:
        """Blocks of each stage; Lite scales neither the first nor the last."""
        numbers = [number for *_, number in SETTINGS]
        deeper = [math.ceil(number * cls.depth) for number in numbers]
        return [numbers[0], *deeper[1:-1], numbers[-1]] if cls.lite else deeper

    def _initialize(self, num_classes: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = self.bn_eps, 0.1  # timm's; TensorFlow's 0.01 lags in fine-tuning
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.uniform_(module.weight, -1 / math.sqrt(num_classes), 1 / math.sqrt(num_classes))
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class EfficientNetB0(EfficientNet):
    width, depth, dropout = 1.0, 1.0, 0.2


class EfficientNetB1(EfficientNet):
    width, depth, dropout = 1.0, 1.1, 0.2


class EfficientNetB2(EfficientNet):
    width, depth, dropout = 1.1, 1.2, 0.3


class EfficientNetB3(EfficientNet):
    width, depth, dropout = 1.2, 1.4, 0.3


class EfficientNetB4(EfficientNet):
    width, depth, dropout = 1.4, 1.8, 0.4


class EfficientNetLite(EfficientNet):
    """Without squeeze and excitation, with ReLU6 and a stem and head of one width, all for quantization. The defaults
    are those of the released weights, which were trained in TensorFlow on pixels in [-1, 1].

    Args:
        num_classes: 0 gives the pooled features, more adds dropout and a classifier.
        in_channels: of the images.
        bn_eps: added to BatchNorms' variances; 1e-5 for the weights that timm trained.
        padding: of the convolutions with stride; `torch` for the weights that timm trained.
        drop_path: stochastic depth, of block i of n `drop_path` i / n; 0.2 in the official training.
    """

    lite = True
    normalization = HALF

    def __init__(
        self,
        *,
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        bn_eps: NonNegativeFloat = 1e-3,
        padding: Literal["torch", "tensorflow"] = "tensorflow",
        drop_path: BelowOne = 0.0,
    ):
        options = {"bn_eps": bn_eps, "padding": padding, "drop_path": drop_path}
        super().__init__(num_classes=num_classes, in_channels=in_channels, **options)


class EfficientNetLite0(EfficientNetLite):
    width, depth, dropout = 1.0, 1.0, 0.2


class EfficientNetLite1(EfficientNetLite):
    width, depth, dropout = 1.0, 1.1, 0.2


class EfficientNetLite2(EfficientNetLite):
    width, depth, dropout = 1.1, 1.2, 0.3
