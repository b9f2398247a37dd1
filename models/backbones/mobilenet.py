"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), of any width.

Parameter names, initialization and outputs are torchvision's, so its weights load strictly. Shapes: B batch, H x W the
input's size.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from runtime.values import PositiveInt, Range, WidthOrZero

# Expansion, channels at width 1, number of blocks, stride of the first (table 2 of the paper)
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

WidthFactor = Annotated[float, Range(above=0, most=4)]  # of all channels; 1.0 is the standard network


def scaled(channels: int, width: float) -> int:
    """channels * width, to the nearest multiple of 8, but at least 8 and not more than 10 % down."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


class TensorFlowConv2d(nn.Conv2d):
    """Conv2d with TensorFlow's "SAME" padding: where stride 2 needs an odd number of zeros, one more below and right.

    Weights trained in TensorFlow expect it; under torch's padding their maps come out half a stride displaced.
    `padding_mode` says what stands there, as for a Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in reversed(list(zip(x.shape[2:], self.kernel_size, self.stride))):  # width first
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.conv2d(F.pad(x, pads, mode), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


CONVOLUTIONS = {"torch": nn.Conv2d, "tensorflow": TensorFlowConv2d}


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1, padding: str = "torch"
) -> nn.Sequential:
    return nn.Sequential(
        CONVOLUTIONS[padding](in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 without activation:
    (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, *, expansion: int, stride: int, padding: str = "torch"):
        super().__init__()
        hidden = in_channels * expansion
        self.conv = nn.Sequential(
            *([conv_bn_relu(in_channels, hidden, 1)] if expansion > 1 else []),
            conv_bn_relu(hidden, hidden, 3, stride=stride, groups=hidden, padding=padding),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNet(nn.Module):
    """What both versions do with their `features`, `stage_ends` of which are the last at strides 4, 8, 16 and 32."""

    features: nn.Sequential
    classifier: nn.Module
    stage_ends: tuple[int, int, int, int]

    def forward_stages(
        self, x: Tensor, last: int = 4, after: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Images (B, in_channels, H, W) -> the last block's output at each stride s = 4, 8, 16, 32:
        [(B, stage_channels[i], H / s, W / s)]. Sizes that the stride does not divide are rounded up. What comes after
        stage `last` is not computed. `after(n, x)` is what stage n's output becomes, also for the next stage."""
        maps = []
        for i, layer in enumerate(self.features[: self.stage_ends[last - 1] + 1]):
            x = layer(x)
            if i in self.stage_ends:
                x = x if after is None else after(len(maps) + 1, x)
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> pooled features (B, num_features), or logits (B, num_classes)."""
        x = self.features(x)  # (B, num_features, H / 32, W / 32)
        return self.classifier(x.mean(dim=(2, 3)))  # (B, num_features) -> logits


class MobileNetV2(MobileNet):
    """MobileNetV2.

    Args:
        num_classes: 0 gives the pooled features, more adds dropout of 0.2 and a classifier.
        in_channels: of the images.
        width: factor on all channels, the 1280 features excepted where it is below 1.
        padding: of the convolutions with stride; `tensorflow` for weights that were trained there.

    Attributes:
        num_features: channels of the pooled features.
        stage_channels: channels of the four maps of `forward_stages`.

    Raises:
        UserError: width is not positive.
    """

    stage_ends = (3, 6, 13, 17)

    def __init__(
        self,
        *,
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        width: WidthFactor = 1.0,
        padding: Literal["torch", "tensorflow"] = "torch",
    ):
        super().__init__()
        self.padding = padding
        self.num_features = scaled(1280, max(1.0, width))
        channels = [scaled(32, width)]  # after each of `features`
        layers = [conv_bn_relu(in_channels, channels[0], 3, stride=2, padding=padding)]
        for expansion, out_channels, depth, stride in SETTINGS:
            for i in range(depth):
                channels.append(scaled(out_channels, width))
                how = {"expansion": expansion, "stride": stride if i == 0 else 1, "padding": padding}
                layers.append(InvertedResidual(*channels[-2:], **how))
        layers.append(conv_bn_relu(channels[-1], self.num_features, 1))
        self.features = nn.Sequential(*layers)
        self.stage_channels = [channels[i] for i in self.stage_ends]
        self.classifier = nn.Identity()
        if num_classes:
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.num_features, num_classes))
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
