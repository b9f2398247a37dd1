"""RD4AD's trained networks, one-class bottleneck and decoder, with the official code's layers and parameter names."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.stages import stage_shapes
from runtime.errors import UserError

Student = Literal["auto", "resnet18", "resnet34", "resnet50", "wide_resnet50_2"]  # auto: see `build_student`
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


class ResizingBasicBlock(nn.Module):
    """ResNet-18/34's block, halving or doubling the resolution in `conv1` and the shortcut when `resize` says so."""

    def __init__(self, inputs: int, outputs: int, resize: Resize, *, width: int):
        super().__init__()
        if width != 64:
            raise ValueError(f"a ResizingBasicBlock has base width 64, not {width}")
        self.resize = resize
        self.conv1, self.bn1 = _conv3(inputs, outputs, resize), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv3(outputs, outputs), nn.BatchNorm2d(outputs)
        if resize:
            self.add_module(resize, _shortcut(inputs, outputs, resize))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = getattr(self, self.resize)(x) if self.resize else x
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResizingBottleneck(nn.Module):
    """ResNet-50's block, halving or doubling the resolution in `conv2` and the shortcut when `resize` says so.

    Args:
        width: base width, 64 or, for Wide-ResNet-50-2, 128; the inner width is outputs / 4 * width / 64.
    """

    def __init__(self, inputs: int, outputs: int, resize: Resize, *, width: int):
        super().__init__()
        inner = outputs * width // (4 * 64)
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


ResizingBlock = type[ResizingBasicBlock] | type[ResizingBottleneck]


def _layer(block: ResizingBlock, inputs: int, outputs: int, depth: int, resize: Resize, *, width: int) -> nn.Sequential:
    rest = [block(outputs, outputs, "", width=width) for _ in range(depth - 1)]
    return nn.Sequential(block(inputs, outputs, resize, width=width), *rest)


def _init(network: nn.Module) -> None:
    """He initialization, fan out, of the convolutions; transposed ones keep the default, as in the official code."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class OneClassBottleneck(nn.Module):
    """Multi-scale fusion and one-class embedding: the teacher's stages 1-3 to one map at half of stage 3's resolution.

    The official BN_layer. Its conv4 and bn4 are in every official checkpoint but never used; here they are frozen, so
    that DistributedDataParallel does not wait for their gradients.

    Args:
        channels: of the teacher's stages 1-3, (c1, c2, c3); each stage is half as large as the one before.
        block, width: of the student.
        depth: number of blocks of the embedding, 2 for ResNet-18, 3 for the others.
    """

    def __init__(self, channels: tuple[int, int, int], block: ResizingBlock, depth: int, *, width: int):
        super().__init__()
        fine, mid, coarse = channels
        self.bn_layer = _layer(block, 3 * coarse, 2 * coarse, depth, "downsample", width=width)
        self.conv1, self.bn1 = _conv3(fine, mid, "downsample"), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _conv3(mid, coarse, "downsample"), nn.BatchNorm2d(coarse)
        self.conv3, self.bn3 = _conv3(mid, coarse, "downsample"), nn.BatchNorm2d(coarse)
        self.conv4, self.bn4 = nn.Conv2d(4 * coarse, 2 * coarse, 1, bias=False), nn.BatchNorm2d(2 * coarse)
        self.conv4.requires_grad_(False)
        self.bn4.requires_grad_(False)
        _init(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """[(B, c1, H, W), (B, c2, H/2, W/2), (B, c3, H/4, W/4)] -> (B, 2 c3, H/8, W/8)."""
        fine = F.relu(self.bn1(self.conv1(features[0])))
        fine = F.relu(self.bn2(self.conv2(fine)))
        mid = F.relu(self.bn3(self.conv3(features[1])))
        return self.bn_layer(torch.cat([fine, mid, features[2]], dim=1))


class Decoder(nn.Module):
    """The official de_resnet: a ResNet's first three layers backwards, each doubling the resolution.

    Args:
        channels: of the teacher's stages 1-3, (c1, c2, c3).
        block, width: of the student.
        depths: blocks of layer1 (the coarsest here), layer2 and layer3, in the order of a ResNet's layers 1-3: the
            official decoder mirrors the channels but not the depths.
    """

    def __init__(
        self, channels: tuple[int, int, int], block: ResizingBlock, depths: tuple[int, int, int], *, width: int
    ):
        super().__init__()
        fine, mid, coarse = channels
        self.layer1 = _layer(block, 2 * coarse, coarse, depths[0], "upsample", width=width)
        self.layer2 = _layer(block, coarse, mid, depths[1], "upsample", width=width)
        self.layer3 = _layer(block, mid, fine, depths[2], "upsample", width=width)
        _init(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 2 c3, H, W) -> the teacher's stages 1-3: [(B, c1, 8H, 8W), (B, c2, 4H, 4W), (B, c3, 2H, 2W)]."""
        coarse = self.layer1(x)
        mid = self.layer2(coarse)
        return [self.layer3(mid), mid, coarse]


# a student's blocks in layers 1-3, its block, base width, and the depth of the official one-class embedding
STUDENTS = {
    "resnet18": ((2, 2, 2), ResizingBasicBlock, 64, 2),
    "resnet34": ((3, 4, 6), ResizingBasicBlock, 64, 3),
    "resnet50": ((3, 4, 6), ResizingBottleneck, 64, 3),
    "wide_resnet50_2": ((3, 4, 6), ResizingBottleneck, 128, 3),
}


def build_student(teacher: nn.Module, student: Student = "auto") -> tuple[OneClassBottleneck, Decoder]:
    """The student of a teacher: blocks and depths of `student`, channels of the teacher's stages 1-3.

    `auto` is the teacher's own kind, as in the official code, and a ResNet-18 for a teacher that is not in STUDENTS.

    Raises:
        UserError: a teacher whose stages 1-3 do not each halve the one before.
    """
    shapes = stage_shapes(teacher, last=3)
    halved = [(2 * height, 2 * width) for _, height, width in (s for s in shapes[1:] if len(s) == 3)]
    if halved != [shape[1:] for shape in shapes[:2]]:
        raise UserError(
            "reverse distillation needs a teacher whose stages 1-3 are maps that halve each other; from 64 x 64 pixels "
            f"this one makes {shapes}: set backbone.name to a CNN"
        )
    kind = (own_kind(teacher) or "resnet18") if student == "auto" else student
    depths, block, width, embedding_depth = STUDENTS[kind]
    channels = tuple(shape[0] for shape in shapes)
    return (
        OneClassBottleneck(channels, block, embedding_depth, width=width),
        Decoder(channels, block, depths, width=width),
    )


def own_kind(teacher: nn.Module) -> str | None:
    """The row of STUDENTS with a ResNet's depths, block and width."""
    if hasattr(teacher, "layer3"):
        depths = tuple(len(getattr(teacher, f"layer{n}")) for n in (1, 2, 3))
        block = ResizingBottleneck if hasattr(teacher.layer1[0], "conv3") else ResizingBasicBlock
        for kind, row in STUDENTS.items():
            if (depths, block, teacher.layer1[0].conv2.out_channels) == row[:3]:
                return kind
    return None
