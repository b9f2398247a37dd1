"""Which patches of two images show the same to a backbone.

Letters: P and Q patches of the first and the second image, C channels, h x w a grid of patches.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.geometry import Geometry
from data.normalize import normalize
from evaluation.inspect.dense import DenseFeatures
from search.nearest import nearest


class Matches(NamedTuple):
    """M pairs of patches that are each other's nearest, the most similar first; patches are numbered row by row."""

    first: Tensor  # (M,) int64
    second: Tensor  # (M,) int64
    cosine: Tensor  # (M,) float32


def patches(maps: Tensor) -> Tensor:
    """Features (C, h, w) of one image as unit vectors, one row per patch, (h w, C) float32."""
    return F.normalize(maps.flatten(1).T.double(), dim=1).float()  # (h w, C)


def nearest_patches(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of the patches (P, C) the most similar of (Q, C), both unit vectors: its number (P,), ties to the lowest,
    and the cosine (P,)."""
    distance, number = nearest(first, second)
    return number[:, 0], 1 - distance[:, 0].square() / 2  # |a - b|^2 = 2 - 2 cos


def mutual_matches(first: Tensor, second: Tensor) -> Matches:
    """The pairs of patches (P, C) and (Q, C), unit vectors, of which each is the other's nearest."""
    there, cosine = nearest_patches(first, second)
    back, _ = nearest_patches(second, first)
    own = (back[there] == torch.arange(len(first), device=first.device)).nonzero()[:, 0]  # (M,)
    own = own[cosine[own].argsort(descending=True, stable=True)]
    return Matches(own, there[own], cosine[own])


def cosine_map(maps: Tensor, patch: Tensor) -> Tensor:
    """How similar each patch of features (C, h, w) is to one patch (C,): cosines (h, w)."""
    return F.cosine_similarity(maps, patch[:, None, None], dim=0)  # (h, w)


def found_in_mirror(dense: DenseFeatures, image: Tensor) -> float:
    """Share of an image's patches whose nearest one in its mirror image is the same place, or one next to it.

    There the right answer is known, so this says how far to trust matches of these features; of a uniform surface no
    features find the place again. image: uint8 (3, H, W), on the backbone's device.
    """
    maps = dense(normalize(torch.stack([image, image.flip(2)]), dense.normalization))  # (2, C, h, w)
    height, width = maps.shape[2:]
    number, _ = nearest_patches(patches(maps[0]), patches(maps[1]))
    own = torch.arange(height * width, device=number.device)
    down = (number // width - own // width).abs()
    across = (width - 1 - number % width - own % width).abs()
    return float(((down <= 1) & (across <= 1)).double().mean())


def spread(places: Tensor, cell: float) -> Tensor:
    """Which of the places (M, 2) to draw: the first of each square of `cell` pixels; int64, ascending."""
    _, first = np.unique((places / cell).long().numpy(), axis=0, return_index=True)
    return torch.from_numpy(np.sort(first))


def places_of(numbers: Tensor, grid: tuple[int, int], geometry: Geometry) -> Tensor:
    """Centers of patches (M,) of an h x w grid in the input's pixels, y and x: (M, 2) float64."""
    cell = torch.tensor([geometry.height / grid[0], geometry.width / grid[1]], dtype=torch.float64)
    at = torch.stack([numbers // grid[1], numbers % grid[1]], 1).cpu()  # (M, 2)
    return (at + 0.5) * cell


def to_input_point(point: tuple[float, float], geometry: Geometry, size: tuple[int, int]) -> tuple[float, float]:
    """y, x of the input that shows the point y, x of an original of `size` h, w: the inverse of
    `geometry.to_original_point`, which is linear in each axis. It may lie outside the input, where that is a crop."""
    ends = torch.tensor([[0.0, 0.0], [geometry.height, geometry.width]], dtype=torch.float64)
    low, high = geometry.to_original_point(ends, torch.tensor([size, size]))  # each (2,)
    share = (torch.tensor(point, dtype=torch.float64) - low) / (high - low)
    y, x = (share * ends[1]).tolist()
    return y, x
