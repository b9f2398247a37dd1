"""JPEG, compressed and decoded again, in the whole numbers of libjpeg: what Pillow gives, level for level.

Colors are halved in both directions (4:2:0) and come back smoothly ("fancy upsampling"), the cosine transform is the
accurate integer one (ISLOW), as Pillow has them unless told otherwise. Its two passes are products with a matrix of
whole numbers and a rounding shift, which float64 has exactly.

Letters: B images, H and W their height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.corruptions.fields import Key
from runtime.memory import send

LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32),
)  # of the JPEG standard, annex K
PART = 2.0**16  # colors are converted in parts of it
TO_YCC = ((19595.0, 38470.0, 7471.0), (-11059.0, -21709.0, 32768.0), (32768.0, -27439.0, -5329.0))  # of R, G and B
OFFSETS = (2.0**15, 128 * PART + 2.0**15 - 1, 128 * PART + 2.0**15 - 1)


def jpeg_compression(pixels: Tensor, key: Key, quality: int) -> Tensor:  # noqa: ARG001
    """(B, 3, H, W) in [0, 1] -> likewise, whole levels."""
    height, width = pixels.shape[2:]
    levels = (pixels * 255).round_().double()
    matrix, offsets = levels.new_tensor(TO_YCC), levels.new_tensor(OFFSETS)
    colors = torch.einsum("kc,bchw->bkhw", matrix, levels) + offsets[:, None, None]  # (B, 3, H, W)
    colors = (colors / PART).floor_()  # (B, 3, H, W): Y, Cb, Cr

    luma = decoded(filled(colors[:, :1], 8, 8), LUMINANCE, quality)[..., :height, :width]
    chroma = decoded(filled(halved(colors[:, 1:]), 8, 8), CHROMINANCE, quality)
    chroma = doubled(chroma[..., : -(-height // 2), : -(-width // 2)])[..., :height, :width]
    blue, red = (chroma - 128).split(1, dim=1)  # (B, 1, H, W) each
    rgb = [
        luma + ((91881 * red + PART / 2) / PART).floor_(),
        luma + ((-22554 * blue - 46802 * red + PART / 2) / PART).floor_(),
        luma + ((116130 * blue + PART / 2) / PART).floor_(),
    ]
    return (torch.cat(rgb, dim=1).clamp_(0, 255) / 255).float()


def filled(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Planes (B, C, H, W) whose last row and column repeat until their sizes are multiples of `rows` and `columns`."""
    more = -planes.shape[3] % columns, -planes.shape[2] % rows
    return F.pad(planes, (0, more[0], 0, more[1]), mode="replicate")


def halved(planes: Tensor) -> Tensor:
    """Means of 2 x 2 values, rounded down and up in turn: (B, C, H, W) -> (B, C, H / 2, W / 2), H and W filled up."""
    planes = filled(planes, 2, 16)
    sums = F.avg_pool2d(planes, 2, divisor_override=1)
    bias = torch.arange(sums.shape[3], device=sums.device) % 2 + 1
    return ((sums + bias) / 4).floor_()


def doubled(planes: Tensor) -> Tensor:
    """3/4 of a value and 1/4 of its neighbor along both axes: (B, C, h, w) -> (B, C, 2 h, 2 w)."""
    rows = 3 * planes
    above, below = (beside(planes, 2, way) for way in (-1, 1))
    sums = torch.stack([rows + above, rows + below], dim=3).flatten(2, 3)  # (B, C, 2 h, w)
    left, right = (beside(sums, 3, way) for way in (-1, 1))
    both = [((3 * sums + side + bias) / 16).floor_() for side, bias in ((left, 8), (right, 7))]
    return torch.stack(both, dim=4).flatten(3, 4)  # (B, C, 2 h, 2 w)


def beside(planes: Tensor, dim: int, way: int) -> Tensor:
    """The neighbor of each value, at the border itself."""
    size = planes.shape[dim]
    index = (torch.arange(size, device=planes.device) + way).clamp_(0, size - 1)
    return planes.index_select(dim, index)


def decoded(planes: Tensor, table: tuple[int, ...], quality: int) -> Tensor:
    """Planes (B, C, H, W) of whole levels as they are after quantization, H and W multiples of 8."""
    matrix = send(cosines(), planes.device)
    steps = send(quantization(table, quality), planes.device)  # (8, 8)
    blocks = (planes - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, C, H / 8, W / 8, 8, 8)
    scaled = shift(matrix @ shift(blocks @ matrix.T, 11), 15)  # 8 x the cosine transform
    whole = (scaled.abs() + 4 * steps).div_(8 * steps).floor_() * scaled.sign()
    levels = shift(shift(matrix.T @ (whole * steps), 11) @ matrix, 18).add_(128).clamp_(0, 255)
    return levels.transpose(3, 4).flatten(4).flatten(2, 3)  # (B, C, H, W)


def shift(x: Tensor, bits: int) -> Tensor:
    """Over 2^bits, rounded to the nearest."""
    return x.mul_(2.0**-bits).add_(0.5).floor_()


def quantization(table: tuple[int, ...], quality: int) -> Tensor:
    """The steps of a quality from 1 to 100: float64 (8, 8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor(table, dtype=torch.float64).view(8, 8)
    return ((steps * scale + 50) / 100).floor_().clamp_(1, 255)


def cosines() -> Tensor:
    """sqrt(8) x the cosine transform in parts of 2^13, as libjpeg adds it up from 13-bit constants: float64 (8, 8)."""
    a, b, c, d, e = -7373, -20995, -16069, -3196, 9633  # z1 to z5 of jfdctint.c
    half = torch.tensor(  # of what stands at 0 to 3; 7 to 4 are equal, in odd rows with the other sign
        [
            [8192, 8192, 8192, 8192],
            [12299 + a + d + e, e, d + e, a + e],
            [4433 + 6270, 4433, -4433, -4433 - 6270],
            [e, 25172 + b + c + e, b + e, c + e],
            [8192, -8192, -8192, 8192],
            [d + e, b + e, 16819 + b + d + e, e],
            [4433, 4433 - 15137, 15137 - 4433, -4433],
            [a + e, c + e, e, 2446 + a + c + e],
        ],
        dtype=torch.float64,
    )
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)[:, None]
    return torch.cat([half, signs * half.flip(1)], dim=1)
