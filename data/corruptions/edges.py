"""OpenCV's Canny edges and its distance transform, for the drops of `spatter`.

Letters: B images, H and W their height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.corruptions.fields import extended

TAN_22 = 13573  # of 22.5 degrees, times 2^15
STEPS = {(0, 1): 1.0, (1, 0): 1.0, (1, 1): 1.4, (1, 2): 2.1969, (2, 1): 2.1969}  # of a 5 x 5 mask, (rows, columns)
ROUNDS = 8  # of growing the edges, after which is seen whether they still grow


def offset(x: Tensor, rows: int, columns: int, size: tuple[int, int]) -> Tensor:
    """What stands so many pixels below and to the right: x (B, H + 2 m, W + 2 m), padded -> (B, H, W)."""
    top, left = ((whole - side) // 2 for whole, side in zip(x.shape[1:], size))
    return x[:, top + rows : top + rows + size[0], left + columns : left + columns + size[1]]


def edges(levels: Tensor, low: float, high: float) -> Tensor:
    """OpenCV's Canny with a 3 x 3 Sobel filter and the sum of both gradients' sizes: levels (B, H, W) -> bool."""
    size = levels.shape[1:]
    padded = extended(levels, 1, 1, "edge")
    at = {(y, x): offset(padded, y, x, size) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    across = (at[-1, 1] - at[-1, -1]) + 2 * (at[0, 1] - at[0, -1]) + (at[1, 1] - at[1, -1])  # (B, H, W)
    down = (at[1, -1] - at[-1, -1]) + 2 * (at[1, 0] - at[-1, 0]) + (at[1, 1] - at[-1, 1])
    gradient = across.abs() + down.abs()

    around = F.pad(gradient, (1, 1, 1, 1))
    at = {(y, x): offset(around, y, x, size) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    steep, flat = down.abs() * 2**15, across.abs() * TAN_22
    horizontal, vertical = steep < flat, steep > flat + across.abs() * 2**16
    falling = (across < 0) == (down < 0)  # along the diagonal from the top left
    sideways = (gradient > at[0, -1]) & (gradient >= at[0, 1])
    upright = (gradient > at[-1, 0]) & (gradient >= at[1, 0])
    along = (gradient > at[-1, -1]) & (gradient > at[1, 1])
    against = (gradient > at[-1, 1]) & (gradient > at[1, -1])
    peak = torch.where(horizontal, sideways, torch.where(vertical, upright, torch.where(falling, along, against)))
    weak = peak & (gradient > low)
    found = weak & (gradient > high)
    while True:  # weak ones count where they touch an edge
        before = found
        for _ in range(ROUNDS):
            found = weak & (F.max_pool2d(found[:, None].float(), 3, 1, 1)[:, 0] > 0)
        if torch.equal(found, before):
            return found


def chamfer_distance(targets: Tensor, most: float) -> Tensor:
    """Distance of each pixel to the nearest of `targets` bool (B, H, W), at most `most`: float32 (B, H, W).

    The shortest way in steps of 1, 1.4 and 2.1969, as of OpenCV's DIST_L2 with its 5 x 5 mask. No step is shorter than
    a pixel, so after `most` rounds all is known.
    """
    size = targets.shape[1:]
    distance = torch.where(targets, 0.0, most)
    moves = [(y * a, x * b, cost) for (y, x), cost in STEPS.items() for a in (1, -1) for b in (1, -1)]
    for _ in range(int(most)):
        padded = F.pad(distance, (2, 2, 2, 2), value=most)
        for y, x, cost in dict.fromkeys(moves):
            distance = torch.minimum(distance, offset(padded, y, x, size) + cost)
    return distance
