"""Weather: snow, frost, fog, and water or mud spattered on the lens.

All take pixels (B, 3, H, W) in [0, 1] and give float (B, 3, H, W) to be cut off at 0 and 1.
"""

import torch
from torch import Tensor

from data.augment.random_numbers import between, uniform
from data.corruptions.blur import trails
from data.corruptions.edges import chamfer_distance, edges
from data.corruptions.fields import Key, correlated, extended, mean_of_nine, normal_field, smooth, uniform_field, zoomed
from runtime.memory import send

LUMA = (0.299, 0.587, 0.114)  # OpenCV's gray
WATER, MUD = (175, 238, 238), (63, 42, 20)  # of 255: pale turquoise, brown
NEAR = 20.0  # pixels up to which the distance to the rim of a drop counts
RELIEF = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))  # an emboss filter


def levels_of(x: Tensor) -> Tensor:
    """[0, 1] -> whole levels, cut off as by numpy's uint8."""
    return (x.clamp(0, 1) * 255).floor_()


def snow(
    pixels: Tensor,
    key: Key,
    mean: float,
    std: float,
    zoom: float,
    least: float,
    radius: int,
    sigma: float,
    own: float,
) -> Tensor:
    """Streaks of zoomed noise above `least`, falling and turned around, on an image that is whitened but for `own`."""
    size, device = pixels.shape[2:], pixels.device
    flakes = mean + std * normal_field((*key, 0), (1, *size), device).double()  # (B, 1, H, W)
    flakes = zoomed(flakes, zoom)
    flakes = levels_of(torch.where(flakes < least, 0.0, flakes))
    angles = between(uniform((*key, 1), 1)[:, 0], (-135, -45))
    layer = correlated(flakes, send(trails(angles, radius, sigma), device), "edge").round_().float() / 255
    gray = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)  # (B, 1, H, W)
    pale = own * pixels + (1 - own) * torch.maximum(pixels, gray * 1.5 + 0.5)
    return pale + layer + layer.flip((2, 3))


def plasma(key: Key, size: tuple[int, int], decay: float, device: torch.device) -> Tensor:
    """Clouds by the diamond-square algorithm, which wrap around: float32 (B, H, W), cut out of a square of 2^n pixels
    whose values run from 0 to 1. `decay`: by what the randomness falls when the distance of the points is halved."""
    side = 1 << (max(*size, 2) - 1).bit_length()
    noise = uniform_field(key, (side, side), device) * 2 - 1  # of each point, used when the point is reached
    points = torch.zeros_like(noise)
    step, wibble = side, 100.0

    def fill(rows: slice, columns: slice, around: Tensor) -> None:
        points[:, rows, columns] = around / 4 + wibble**2 * noise[:, rows, columns]

    while step >= 2:
        corners, middles = slice(0, side, step), slice(step // 2, side, step)
        corner = points[:, corners, corners]
        ends = corner + corner.roll(-1, 1)
        fill(middles, middles, ends + ends.roll(-1, 2))
        centers = points[:, middles, middles]
        fill(corners, middles, centers + centers.roll(1, 1) + (corner + corner.roll(-1, 2)))
        fill(middles, corners, centers + centers.roll(1, 2) + (corner + corner.roll(-1, 1)))
        step, wibble = step // 2, wibble / decay
    points -= points.amin((1, 2), keepdim=True)
    points /= points.amax((1, 2), keepdim=True)
    return points[:, : size[0], : size[1]]


def fog(pixels: Tensor, key: Key, strength: float, decay: float) -> Tensor:
    most = pixels.amax((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    clouds = plasma(key, pixels.shape[2:], decay, pixels.device)[:, None]
    return (pixels + strength * clouds) * (most / (most + strength))


def frost(pixels: Tensor, key: Key, own: float, frosted: float) -> Tensor:
    """The weighted sum of the image and of frost, which is drawn.

    The official code has five photographs of frost, which are not ours to give. This is a white-blue plasma, and on it
    stars of six rays, about a fourteenth of the image's short side long.
    """
    size, device = pixels.shape[2:], pixels.device
    bed = plasma((*key, 0), size, 1.8, device)[:, None]  # (B, 1, H, W)
    length = max(2, min(size) // 14)
    turns = uniform((*key, 1), 1)[:, 0] * 60
    rays = sum(trails(turns + angle, length, length / 2) for angle in range(0, 360, 60))
    stars = (normal_field((*key, 2), (1, *size), device) > 2.2).float()
    needles = correlated(stars, send(rays.float(), device), "edge") * (length / 4)
    white = (0.25 + 0.5 * bed + needles * bed).clamp(max=1)
    tint = pixels.new_tensor((0.86, 0.94, 1.0))[:, None, None]
    return own * pixels + frosted * (white * tint)


def spatter(
    pixels: Tensor, key: Key, mean: float, std: float, sigma: float, least: float, weight: float, mud: int
) -> Tensor:
    """Drops where smoothed noise is above `least`: of water, bright at their rims, or of mud, smoothed by `weight`."""
    size, device = pixels.shape[2:], pixels.device
    liquid = smooth(mean + std * normal_field(key, size, device).double(), sigma)  # (B, H, W)
    liquid = torch.where(liquid < least, 0.0, liquid)
    color = pixels.new_tensor(MUD if mud else WATER)[:, None, None] / 255  # (3, 1, 1)
    if mud:
        covered = smooth((liquid > least).double(), weight).float()[:, None]  # (B, 1, H, W)
        covered = torch.where(covered < 0.8, 0.0, covered)
        return pixels * (1 - covered) + color * covered
    liquid = levels_of(liquid)
    light = (liquid * rims(liquid)).float()[:, None]  # (B, 1, H, W)
    light = light / light.amax((2, 3), keepdim=True).clamp(min=1e-12)
    return pixels + weight * light * color


def rims(liquid: Tensor) -> Tensor:
    """How near to the rim of a drop a pixel is, in relief: levels (B, H, W), whole float64, -> (B, H, W) likewise."""
    distance = chamfer_distance(edges(liquid, 50, 150), NEAR)
    near = equalized(mean_of_nine(distance.double()).floor())
    padded = extended(near, 1, 1, "mirror")
    height, width = near.shape[1:]
    lit = sum(
        RELIEF[y][x] * padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3) if RELIEF[y][x]
    )
    return mean_of_nine(lit.clamp(0, 255)).round()


def equalized(levels: Tensor) -> Tensor:
    """OpenCV's equalizeHist of (B, H, W), whole numbers in 0 to 255."""
    flat = levels.long().flatten(1)  # (B, H W)
    counts = levels.new_zeros(len(flat), 256, dtype=torch.float64)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))  # whole, so in any order
    lowest = flat.amin(1, keepdim=True)
    of_lowest = counts.gather(1, lowest)  # (B, 1)
    rest = flat.shape[1] - of_lowest
    table = ((counts.cumsum(1) - of_lowest) * (255 / rest.clamp(min=1))).round().clamp(0, 255)
    table = torch.where(rest > 0, table, lowest.double())  # an image of one level stays
    return table.gather(1, flat).view_as(levels)
