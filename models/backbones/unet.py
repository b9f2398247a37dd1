"""UNet on a ResNet-18 (Ronneberger et al. 2015, arXiv 1505.04597): features at every resolution for dense tasks.

The construction is usuyama/pytorch-unet's ResNetUNet: 1x1 convolutions beside each of the encoder's stages, bilinear
upsampling, convolutions with bias and ReLU. Shapes: B batch, C channels, H x W the input's size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.resnet import ResNet18
from runtime.values import BelowOne, PositiveInt, WidthOrZero

OUT = 64  # channels of the finest map


def conv_relu(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2), nn.ReLU(inplace=True))


def up(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`, corners on corners as in the original."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


class UNetResNet18(ResNet18):
    """A ResNet-18 as the encoder, and a decoder that starts from random weights, since no ResNet checkpoint has one.

    Args:
        num_classes: 0 gives the pooled features, more adds a classifier.

    Attributes:
        num_features: 512 + 64, the encoder's last map and the decoder's finest one, each pooled.
        stage_channels: channels of the four maps of `forward_stages`.
    """

    may_lack = ("lateral", "original", "decoder")  # what a checkpoint need not have

    def __init__(
        self,
        *,
        stem: Literal["imagenet", "cifar", "cifar_solo"] = "imagenet",
        num_classes: WidthOrZero = 0,
        in_channels: PositiveInt = 3,
        drop_path: BelowOne = 0.0,
        zero_init_residual: bool = False,
    ):
        super().__init__(stem=stem, in_channels=in_channels, drop_path=drop_path, zero_init_residual=zero_init_residual)
        self.lateral = nn.ModuleList(conv_relu(c, c, 1) for c in (64, *self.stage_channels))  # strides 2 to 32
        self.original = nn.Sequential(conv_relu(in_channels, 64, 3), conv_relu(64, 64, 3))
        self.decoder = nn.ModuleList(
            conv_relu(coarse + skip, out, 3)  # to the strides 16, 8, 4, 2 and 1
            for coarse, skip, out in ((512, 256, 512), (512, 128, 256), (256, 64, 256), (256, 64, 128), (128, 64, OUT))
        )
        self.stage_channels = [256, 256, 512, 512]
        self.num_features = 512 + OUT
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def decode(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_channels, H, W) -> maps at the strides s = 1, 2, 4, 8, 16 and 32, or 1, 1, 1, 2, 4 and 8
        with the CIFAR stem, the last one the encoder's: [(B, C, H / s, W / s)], C = 64, 128, 256, 256, 512, 512."""
        finest = self.original(x)
        x = self.relu(self.bn1(self.conv1(x)))
        skips = [finest, self.lateral[0](x)]  # (B, 64, H, W), (B, 64, H / 2, W / 2)
        x = self.maxpool(x)
        for stage, lateral in zip((self.layer1, self.layer2, self.layer3, self.layer4), self.lateral[1:]):
            x = stage(x)
            skips.append(lateral(x))
        maps = [skips.pop()]  # (B, 512, H / 32, W / 32)
        for convolution in self.decoder:
            skip = skips.pop()
            maps.append(convolution(torch.cat([up(maps[-1], skip), skip], dim=1)))
        return maps[::-1]

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        """Images (B, in_channels, H, W) -> the decoder's maps at the strides s = 4, 8 and 16 and the encoder's at 32:
        [(B, stage_channels[i], H / s, W / s)], rounded up. The finest needs all the others, so `last` only says how
        many are returned."""
        return self.decode(x)[2 : 2 + last]

    def forward_dense(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> features of every pixel (B, 64, H, W)."""
        return self.decode(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> pooled features (B, num_features), or logits (B, num_classes)."""
        maps = self.decode(x)
        return self.fc(torch.cat([maps[-1].mean(dim=(2, 3)), maps[0].mean(dim=(2, 3))], dim=1))  # (B, 512 + 64)
