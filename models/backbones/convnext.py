"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) and ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808).

Parameter names are timm's, from atto to tiny. Its `tiny` has linear layers where the smaller ones have 1x1
convolutions; here all have convolutions, and models/weights/load.py reshapes. Shapes: B batch, C channels, H x W the
input's size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.drop_path import DropPath, drop_rates
from runtime.errors import UserError
from runtime.values import BelowOne, Pixels, PositiveInt, WidthOrZero


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # to (B, H, W, C) and back


class GlobalResponseNorm(nn.Module):
    """V2's competition among channels (section 3.3): (B, C, H, W) -> (B, C, H, W).

    G = |x| over the positions (B, C, 1, 1); N = G / (mean of G over channels + 1e-6); x + weight * x N + bias, the
    identity at the start. The factor 1 + weight * N is computed in float32: squares, and N up to C, leave fp16.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        share = size / (size.mean(dim=1, keepdim=True) + 1e-6)  # (B, C, 1, 1)
        factor = 1 + self.weight.view(-1, 1, 1) * share  # (B, C, 1, 1)
        return x * factor.to(x.dtype) + self.bias.view(-1, 1, 1).to(x.dtype)


class ConvNeXtMlp(nn.Module):
    """Four times as many channels, GELU, V2's normalization, and back: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, version: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 4 * channels, 1)
        self.grn = GlobalResponseNorm(4 * channels) if version == 2 else nn.Identity()
        self.fc2 = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(F.gelu(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    """7x7 filter of each channel, LayerNorm, MLP, V1's layer scale, shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, version: int, drop_path: float):
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = LayerNorm2d(channels)
        self.mlp = ConvNeXtMlp(channels, version)
        self.gamma = nn.Parameter(torch.empty(channels)) if version == 1 else None
        self.drop_path = DropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.constant_(self.gamma, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm(self.conv_dw(x)))
        if self.gamma is not None:
            branch = branch * self.gamma.view(-1, 1, 1)  # (C, 1, 1), in float32: 1e-6 is nearly 0 in fp16
        return x + self.drop_path(branch)


class Stage(nn.Module):
    """LayerNorm and 2x2 convolution of stride 2, none in the first stage, then blocks:
    (B, in_channels, H, W) -> (B, channels, H / 2, W / 2)."""

    def __init__(self, in_channels: int, channels: int, version: int, rates: list[float]):
        super().__init__()
        self.downsample = nn.Identity()
        if in_channels != channels:
            self.downsample = nn.Sequential(LayerNorm2d(in_channels), nn.Conv2d(in_channels, channels, 2, stride=2))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels, version, rate) for rate in rates))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """The family; a member names its `depths` and `widths`, blocks and channels of the four stages, and its `version`.

    Args:
        num_classes: 0 gives the pooled features, more adds a classifier.
        in_channels: of the images.
        patch: side and stride of the first convolution: 4, or 1 or 2 for small images. Stages have strides of patch
            x 1, 2, 4, 8.
        drop_path: stochastic depth of the last block, linear from 0 at the first.

    Attributes:
        num_features: channels of the pooled, normalized features.
        stage_channels: channels of the four maps of `forward_stages`.
    """

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    version = 1

    def __init__(
        self,
        *,
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        patch: Pixels = 4,
        drop_path: BelowOne = 0.0,
    ):
        super().__init__()
        self.stage_channels = list(self.widths)
        self.num_features = self.widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, self.widths[0], patch, stride=patch), LayerNorm2d(self.widths[0])
        )
        rates = iter(drop_rates(drop_path, sum(self.depths)))
        widths_in = (self.widths[0], *self.widths)
        self.stages = nn.Sequential(
            *(
                Stage(width_in, width, self.version, [next(rates) for _ in range(depth)])
                for width_in, width, depth in zip(widths_in, self.widths, self.depths)
            )
        )
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(self.num_features, eps=1e-6)})
        if num_classes:
            self.head["fc"] = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_stages(
        self, x: Tensor, last: int = 4, after: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """Images (B, in_channels, H, W) -> the outputs of the four stages, before the final LayerNorm:
        [(B, stage_channels[i], H / s, W / s)], s = 4, 8, 16, 32 by default. Sizes that the stride does not divide are
        rounded down. What comes after stage `last` is not computed. `after(n, x)` is what stage n's output becomes,
        also for the next stage.

        Raises:
            UserError: the images are smaller than the stride of stage `last`.
        """
        stride = self.stem[0].stride[0] * 2 ** (last - 1)
        if min(x.shape[2:]) < stride:
            raise UserError(
                f"{type(self).__name__} needs images of at least {stride} x {stride} pixels for {last} stages, not "
                f"{x.shape[2]} x {x.shape[3]}: enlarge them, or set backbone.patch=1"
            )
        x, maps = self.stem(x), []
        for number, stage in enumerate(self.stages[:last], 1):
            x = stage(x)
            x = x if after is None else after(number, x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> pooled features (B, num_features), or logits (B, num_classes)."""
        x = self.head["norm"](self.forward_stages(x)[-1].mean(dim=(2, 3)))  # (B, C, H / 32, W / 32) -> (B, C)
        return self.head["fc"](x) if "fc" in self.head else x


class ConvNeXtAtto(ConvNeXt):
    depths, widths = (2, 2, 6, 2), (40, 80, 160, 320)


class ConvNeXtFemto(ConvNeXt):
    depths, widths = (2, 2, 6, 2), (48, 96, 192, 384)


class ConvNeXtPico(ConvNeXt):
    depths, widths = (2, 2, 6, 2), (64, 128, 256, 512)


class ConvNeXtNano(ConvNeXt):
    depths, widths = (2, 2, 8, 2), (80, 160, 320, 640)


class ConvNeXtTiny(ConvNeXt):
    depths, widths = (3, 3, 9, 3), (96, 192, 384, 768)


class ConvNeXtV2Atto(ConvNeXtAtto):
    version = 2


class ConvNeXtV2Femto(ConvNeXtFemto):
    version = 2


class ConvNeXtV2Pico(ConvNeXtPico):
    version = 2


class ConvNeXtV2Nano(ConvNeXtNano):
    version = 2


class ConvNeXtV2Tiny(ConvNeXtTiny):
    version = 2
