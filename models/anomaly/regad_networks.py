"""Spatial transformers (Jaderberg et al. 2015) as RegAD has them behind a backbone's stages, and its support views.

Maps (B, C, H, W) are sampled at theta (B, 2, 3) times (x, y, 1), x and y from -1 to 1 between the outer edges of a map:
bilinear, what lies outside reflected. So theta enlarges where its scale is below 1, and 2 is a map's whole extent.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment.color import to_gray
from models.backbones.resnet import conv3x3
from runtime.precision import at_least_float32


class SpatialTransformer(nn.Module):
    """Turns and scales each map by what it sees in it: (B, C, H, W) -> the warped map, and theta (B, 2, 3).

        theta = [[cos(a) s, -sin(a), 0], [sin(a), cos(a) t, 0]]

    The angle a in radians and the scales s and t come from the network; they start as 0, 1 and 1, which is the
    identity. Official RegAD's `rotation_scale` (models/stn.py, with its parameter names): the scales stand on the
    diagonal only. It is the default of nine modes and the one of the published checkpoints; the others are left out.

    The official layers fit maps of 224 x 224 images. Here the last maps are averaged to their official side
    (adaptive pooling, which then changes nothing), so that images may have any size. The angle and the scales are
    computed in float32 whatever the precision, for bfloat16 has steps of 0.8 % beside 1.

    Args:
        channels: C. side: of the maps that the linear layers see.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.side = side
        self.conv = nn.Sequential(
            conv3x3(channels, 64),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            conv3x3(64, 16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.fc = nn.Sequential(nn.Linear(16 * side * side, 1024), nn.ReLU(), nn.Linear(1024, 3))
        nn.init.zeros_(self.fc[2].weight)
        self.fc[2].bias = nn.Parameter(torch.tensor([0.0, 1.0, 1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.conv(x)  # (B, 16, H / 4, W / 4), rounded up
        with torch.autocast(x.device.type, enabled=False):
            seen = seen.to(self.fc[2].bias.dtype)
            numbers = self.fc(F.adaptive_avg_pool2d(seen, self.side).flatten(1))  # (B, 3)
            angle, along, across = numbers.unbind(1)
            cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
        theta = torch.stack([cos * along, -sin, none, sin, cos * across, none], 1).unflatten(1, (2, 3))
        return warp(x, theta), theta


@at_least_float32
def warp(x: Tensor, theta: Tensor) -> Tensor:
    """Maps (B, C, H, W) sampled at theta (B, 2, 3) or (2, 3), in at least float32 with autocast off: the same shape.

    A map whose theta is not finite becomes NaN. Under autocast even affine_grid would multiply in half precision, which
    knows 128 places between 0.5 and 1.
    """
    if x.shape[0] == 0:  # a process may have nothing left to score, and affine_grid refuses that
        return x
    grid = F.affine_grid(theta.expand(x.shape[0], 2, 3), list(x.shape), align_corners=False)  # (B, H, W, 2)
    # on a CPU the backward of grid_sample writes outside its memory for a NaN: take NaN from x, not from the grid
    lost = ~grid.isfinite().all(3).all(2).all(1)[:, None, None, None]  # (B, 1, 1, 1)
    x = x.masked_fill(lost, torch.nan)
    return F.grid_sample(x, grid.masked_fill(lost, 0), padding_mode="reflection", align_corners=False)


def inverse(theta: Tensor) -> Tensor:
    """What undoes a `theta` (B, 2, 3) that moves nothing; inf or NaN where nothing does. The host need not wait."""
    return F.pad(torch.linalg.inv_ex(theta[:, :, :2]).inverse, (0, 1))  # (B, 2, 3)


N_VIEWS = 22


def support_views(images: Tensor) -> Iterator[Tensor]:
    """The 22 views that official RegAD makes of support images (K, 3, H, W) in [0, 1], each (K, 3, H, W), in order:
    as they are, turned by -45, -33.75, -22.5, -11.25 and 11.25 to 45 degrees, moved by a tenth and by a twentieth of
    the image along both diagonals (its 0.2 and 0.1), mirrored left to right, grey, turned by 90, 180 and 270 degrees.

    Different from it: the weight of red in grey is 0.2989, not kornia's 0.299.
    """
    yield images
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        yield warp(images, _turn(step * math.pi / 16).to(images))
    for far in (0.2, 0.1):
        for right, down in ((far, far), (-far, far), (-far, -far), (far, -far)):
            yield warp(images, torch.tensor([[1, 0, right], [0, 1, down]]).to(images))
    yield images.flip(3)
    yield to_gray(images)
    for quarters in (1, 2, 3):
        yield warp(images, _turn(quarters * math.pi / 2).to(images))


def _turn(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
