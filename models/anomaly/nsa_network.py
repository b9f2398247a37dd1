"""NSA's decoder, from a backbone's last stage to one logit a pixel, with the official code's layers and names."""

import torch.nn.functional as F
from torch import Tensor, nn

ENLARGED = 32  # how many times as high and wide the logits are as the decoder's input


class TransposedBlock(nn.Module):
    """ResNet-18's block backwards: (B, inputs, H, W) -> (B, planes, 2H, 2W). The official TransposeBasicBlock."""

    def __init__(self, inputs: int, planes: int):
        super().__init__()
        double = {"stride": 2, "output_padding": 1, "bias": False}
        self.conv1, self.bn1 = nn.ConvTranspose2d(inputs, planes, 3, padding=1, **double), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.upsample = nn.Sequential(nn.ConvTranspose2d(inputs, planes, 1, **double), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.upsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class LocalizationDecoder(nn.Module):
    """The half of the official resnet18_enc_dec (model/resnet.py, `pool=True`, `preact=False`) behind its ResNet.

    Convolutions start by He initialisation, fan out; transposed ones keep PyTorch's default, as there. The sigmoid is
    left to the caller.

    Args:
        inputs: channels of the backbone's last stage, 512 in the official network.
    """

    def __init__(self, inputs: int):
        super().__init__()
        to_256, to_128 = (nn.Conv2d(i, o, 1, bias=False) for i, o in ((inputs, 256), (256, 128)))
        self.nin = nn.Sequential(to_256, nn.ReLU(), to_128, nn.ReLU())
        self.uplayer1 = nn.Sequential(TransposedBlock(128, 64))
        self.uplayer2 = nn.Sequential(TransposedBlock(64, 32))
        self.uplayer3 = nn.Sequential(TransposedBlock(32, 16))
        self.convtranspose1 = nn.ConvTranspose2d(16, 1, 7, stride=2, padding=3, output_padding=1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> logits (B, 32H, 32W)."""
        x = self.uplayer3(self.uplayer2(self.uplayer1(self.nin(x))))  # (B, 16, 8H, 8W)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.convtranspose1(x)[:, 0]
