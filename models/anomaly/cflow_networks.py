"""CFlow-AD's decoders: normalizing flows of affine couplings, conditioned on the position in the image.

The official code builds them from FrEIA (SequenceINN of AllInOneBlocks, github.com/vislearn/FrEIA); these have its
arithmetic and its parameter names, of the settings that CFlow-AD uses. Letters: N vectors of C channels, P numbers that
describe a position.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLAMP = 1.9  # largest |log scale| of a coupling


class CouplingBlock(nn.Module):
    """One invertible step. A network sees half of the vector and its position, and scales and shifts the other half;
    then every channel has its learned scale and offset; then a fixed random rotation mixes them. With x = (x1, x2):

        s, t = subnet(x1, position) / 10
        y = R (scale * (x1, x2 * exp(1.9 tanh s) + t) + offset),  scale = 0.2 log(1 + exp(global_scale / 2)), at first 1
        log |det dy/dx| = sum 1.9 tanh s + sum log scale

    FrEIA's AllInOneBlock with affine_clamping 1.9, global_affine_type SOFTPLUS and permute_soft. An odd C gives x1 the
    channel more. Different from it: R is drawn in a second, not minutes (`random_rotation`), and its inverse is not
    kept. The subnet runs in the precision of the caller's autocast, all else in that of x, for eight roundings to
    bfloat16 in a row are not a density.
    """

    def __init__(self, channels: int, encoding: int):
        super().__init__()
        self.splits = [channels - channels // 2, channels // 2]
        inner = self.splits[0] + encoding
        self.subnet = nn.Sequential(nn.Linear(inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, 2 * self.splits[1]))
        self.global_scale = nn.Parameter(torch.full((1, channels), 2 * math.log(math.exp(5) - 1)))
        self.global_offset = nn.Parameter(torch.zeros(1, channels))
        self.w_perm = nn.Parameter(random_rotation(channels), requires_grad=False)  # a buffer would be sent every step

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) and (N, P) -> (N, C) and log |det| (N,)."""
        x1, x2 = x.split(self.splits, dim=1)
        s, t = (0.1 * self.subnet(torch.cat([x1, position], dim=1)).to(x.dtype)).chunk(2, dim=1)  # (N, C // 2) each
        with torch.autocast(x.device.type, enabled=False):
            log_scale = CLAMP * s.tanh()
            scale = 0.1 * F.softplus(self.global_scale, beta=0.5)  # (1, C)
            y = torch.cat([x1, x2 * log_scale.exp() + t], dim=1) * scale + self.global_offset  # (N, C)
            return F.linear(y, self.w_perm), log_scale.sum(1) + scale.log().sum()


class ConditionalFlow(nn.Module):
    """`blocks` couplings one after the other."""

    def __init__(self, channels: int, encoding: int, blocks: int):
        super().__init__()
        self.module_list = nn.ModuleList(CouplingBlock(channels, encoding) for _ in range(blocks))  # FrEIA's name

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (N, C) at positions (N, P) -> z (N, C), standard normal once trained, and log |det dz/dx| (N,)."""
        log_det = x.new_zeros(x.shape[0])
        for block in self.module_list:
            x, each = block(x, position)
            log_det = log_det + each
        return x, log_det


def random_rotation(n: int) -> Tensor:
    """(n, n) float32, uniformly distributed over the rotations SO(n), orthonormal to 1e-6.

    Q of the QR decomposition of a Gaussian matrix, columns signed so that R's diagonal is positive (Mezzadri 2007), and
    one row turned round where the determinant is -1. Drawn from torch's generator; in float64, so that it does not
    depend on the number of threads.
    """
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    q = q * r.diagonal().sign()
    q[0] *= torch.linalg.slogdet(q).sign
    return q.float()


def encode_positions(size: tuple[int, int], encoding: int, device: torch.device) -> Tensor:
    """Sines and cosines of every position of an H x W grid, as the official `positionalencoding2d`: (H, W, P) float32.

    Of P numbers the first half is of the column x, the second of the row y: sin(x w_0), cos(x w_0), sin(x w_1), ...
    with w_k = 10000^(-2k / (P/2)).

    Args:
        encoding: P, a multiple of 4.
    """
    half = encoding // 2
    frequencies = torch.exp(torch.arange(0, half, 2, device=device) * (-math.log(1e4) / half))  # (P / 4,)
    waves = []
    for count in size:
        angles = torch.arange(count, device=device)[:, None] * frequencies  # (count, P / 4)
        waves.append(torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))  # (count, P / 2)
    rows, columns = waves
    return torch.cat([columns.expand(size[0], -1, -1), rows[:, None].expand(-1, size[1], -1)], dim=2)
