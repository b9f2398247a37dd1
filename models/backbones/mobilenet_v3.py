"""MobileNetV3 (Howard et al. 2019, arXiv 1905.02244), large and small, of any width.

Parameter names, initialization and outputs are torchvision's, so its weights load strictly. Shapes: B batch, C
channels, H x W the input's size.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.mobilenet import CONVOLUTIONS, MobileNet, WidthFactor, scaled
from runtime.values import NonNegativeFloat, PositiveInt, WidthOrZero

# Kernel, expanded channels, channels, squeeze and excitation, Hardswish, stride (tables 1 and 2 of the paper)
LARGE = (
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)
SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel: int,
    activation: type[nn.Module] | None,
    *,
    stride: int = 1,
    groups: int = 1,
    padding: str = "torch",
) -> nn.Sequential:
    return nn.Sequential(
        CONVOLUTIONS[padding](in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels, momentum=0.01),
        *([activation(inplace=True)] if activation else []),
    )


class SqueezeExcitation(nn.Module):
    """A factor in [0, 1] for each channel, from the means of all: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = scaled(channels // 4, 1.0)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(means))))


class InvertedResidualV3(nn.Module):
    """Expand by 1x1, filter each channel, weigh the channels, project by 1x1 without activation:
    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        *,
        kernel: int,
        squeeze: bool,
        activation: type[nn.Module],
        stride: int,
        padding: str,
    ):
        super().__init__()
        self.block = nn.Sequential(
            *([conv_bn(in_channels, hidden, 1, activation)] if hidden != in_channels else []),
            conv_bn(hidden, hidden, kernel, activation, stride=stride, groups=hidden, padding=padding),
            *([SqueezeExcitation(hidden)] if squeeze else []),
            conv_bn(hidden, out_channels, 1, None),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.has_shortcut else self.block(x)


class MobileNetV3(MobileNet):
    """The family; a member names its `settings` and the width `hidden` of its classifier.

    Args:
        num_classes: 0 gives the pooled features, more adds a hidden layer, dropout of 0.2 and a classifier.
        in_channels: of the images.
        width: factor on all channels.
        bn_eps: added to BatchNorms' variances; 1e-5 for the weights that timm trained.
        padding: of the convolutions with stride; `tensorflow` for timm's `tf_` weights, which were trained there.

    Attributes:
        num_features: channels of the pooled features, 960 (large) or 576 (small) at width 1. timm's models without
            classifier go one layer further, to 1280 or 1024.
        stage_channels: channels of the four maps of `forward_stages`.

    Raises:
        UserError: width is not positive.
    """

    settings: tuple[tuple[int, int, int, bool, bool, int], ...]
    hidden: int

    def __init__(
        self,
        *,
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        width: WidthFactor = 1.0,
        bn_eps: NonNegativeFloat = 1e-3,
        padding: Literal["torch", "tensorflow"] = "torch",
    ):
        super().__init__()
        self.bn_eps, self.padding = bn_eps, padding
        channels, strides = [scaled(16, width)], [2]  # after each of `features`
        layers = [conv_bn(in_channels, channels[0], 3, nn.Hardswish, stride=2, padding=padding)]
        for kernel, expanded, out_channels, squeeze, hardswish, stride in self.settings:
            layers.append(
                InvertedResidualV3(
                    channels[-1],
                    scaled(expanded, width),
                    scaled(out_channels, width),
                    kernel=kernel,
                    squeeze=squeeze,
                    activation=nn.Hardswish if hardswish else nn.ReLU,
                    stride=stride,
                    padding=padding,
                )
            )
            channels.append(scaled(out_channels, width))
            strides.append(strides[-1] * stride)
        self.num_features = 6 * channels[-1]
        layers.append(conv_bn(channels[-1], self.num_features, 1, nn.Hardswish))
        self.features = nn.Sequential(*layers)
        last_at = {stride: i for i, stride in enumerate(strides)}
        self.stage_ends = tuple(last_at[stride] for stride in (4, 8, 16, 32))
        self.stage_channels = [channels[i] for i in self.stage_ends]
        self.classifier = nn.Identity()
        if num_classes:
            hidden = scaled(self.hidden, width)
            self.classifier = nn.Sequential(
                nn.Linear(self.num_features, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, num_classes)
            )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = bn_eps
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


class MobileNetV3Large(MobileNetV3):
    settings, hidden = LARGE, 1280


class MobileNetV3Small(MobileNetV3):
    settings, hidden = SMALL, 1024
