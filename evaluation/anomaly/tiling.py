"""An image larger than a detector's input, examined at its own resolution in overlapping squares.

Letters: h and w the image's height and width, H and W the same with padding, T tiles of S x S pixels.
"""

from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.batches import Findings
from data.geometry import FILL
from data.tiles import spans
from evaluation.anomaly.detection import gathered
from runtime import distributed
from runtime.errors import UserError

if TYPE_CHECKING:  # exported programs are examined where there is no models/
    from models.anomaly.detector import Detector

GRID = 32  # pixels: the coarsest stride of a backbone; at its multiples the patch grids of all tiles coincide


def check_tiling(detector: "Detector", tile: int, overlap: int) -> None:
    """Raise `UserError` unless `detector` can examine tiles of this size."""
    if detector.positional:
        raise UserError(
            f"tile={tile}: {type(detector).__name__} knows what each place of an image looks like, so it takes whole "
            "images only: remove tile, or fit another detector"
        )
    if tile < GRID or tile % GRID:
        raise UserError(f"tile={tile} must be a multiple of {GRID}, or 0 for whole images")
    if overlap % GRID or not 0 <= overlap < tile:
        raise UserError(f"overlap={overlap} must be a multiple of {GRID}, at least 0 and below tile={tile}")
    if not takes(detector, tile):
        sizes = sorted(range(GRID, 2 * tile + 16 * GRID, GRID), key=lambda size: abs(size - tile))
        near = next((f"take tile={size}" for size in sizes if takes(detector, size)), "remove tile")
        raise UserError(f"tile={tile} does not suit the networks of this run: {near}")


@torch.no_grad()
def takes(detector: "Detector", tile: int) -> bool:
    """Whether the detector's networks can pass squares of this size."""
    try:
        detector.networks(torch.zeros(1, 3, tile, tile, device=next(detector.parameters()).device))
    except UserError:
        return False
    return True


def padded_side(length: int, tile: int) -> int:
    return max(tile, -(-length // GRID) * GRID)


@torch.no_grad()
def examine_tiles(
    detector: "Detector", image: Tensor, *, tile: int, overlap: int, batch_size: int, device: torch.device
) -> Findings:
    """`Findings` of one image, uint8 (3, h, w), on the CPU: (1,) scores, (1, h, w) maps, peaks in its pixels.

    The score is the largest of all tiles' scores; peak, training image and its position are that tile's. Below and
    to the right the image is padded with the mean color to multiples of 32 and to one tile at least; `valid` keeps
    padding out of map and score.

    A pixel's value is what the whole image would give, up to rounding, if the tile goes on as far as the pixel's
    patches see: with PatchCore on a ResNet-18's stages 2 and 3 that is 161 pixels, so overlap=352 makes all equal. With
    less, the zeros with which convolutions pad a tile show near the cuts. Measured for MobileNetV2 with ImageNet
    weights on five magnetic tiles, enlarged to 768 or 1024 pixels, overlap=64: the difference to the whole image's
    map, in units of its median pixel, has with tile=256 a median of 2.6 %, a 99 % quantile of 23 % and a maximum of
    48 %; with tile=512 0, 13 % and 32 %. Scores were equal or up to 4 % higher: a tile's score counts its margins too.
    """
    height, width = image.shape[1:]
    padded = [padded_side(length, tile) for length in (height, width)]
    canvas = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].expand(3, *padded).clone()  # (3, H, W)
    canvas[:, :height, :width] = image
    inside = torch.zeros(padded, dtype=torch.bool)
    inside[:height, :width] = True
    places = list(product(*(spans(length, tile, overlap) for length in padded)))  # T x ((top, ..), (left, ..))
    heat, parts = torch.zeros(padded), []
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        tiles, valid = (
            torch.stack([x[..., top : top + tile, left : left + tile] for (top, *_), (left, *_) in some]).to(device)
            for x in (canvas, inside)
        )
        found = detector.examine_pixels(tiles, None if inside.all() else valid)
        if found.maps is not None:
            for ((top, *rows), (left, *columns)), own in zip(some, found.maps.cpu()):
                (y, bottom), (x, right) = rows, columns
                heat[y:bottom, x:right] = own[y - top : bottom - top, x - left : right - left]
        parts.append(found._replace(maps=None))
    has_maps = found.maps is not None
    found = Findings(*(None if values[0] is None else torch.cat(values).cpu() for values in zip(*parts)))  # (T, ...)
    best = found.scores.argmax()
    found = Findings(*(None if values is None else values[best][None] for values in found))
    if found.peaks is not None:
        (top, *_), (left, *_) = places[best]
        found = found._replace(peaks=found.peaks + found.peaks.new_tensor([top, left]))
    return found._replace(maps=heat[None, :height, :width]) if has_maps else found


@torch.no_grad()
def examine_set_in_tiles(detector: "Detector", loader, text: str, *, tile: int, overlap: int) -> Findings:
    """`detection.examine_set` of whole images at their own resolution: scores as `examine_tiles` gives them, maps and
    peaks brought to the size of the Loader's images, at which masks are compared and heat maps drawn."""
    dataset, device, geometry = loader.dataset, loader.device, loader.dataset.geometry
    own = [i for *_, indices in loader.epoch(0) for i in indices.tolist()]
    sizes = dataset.sizes.tolist()
    about = {"tile": tile, "overlap": overlap, "batch_size": loader.batch_size, "device": device}
    left = sum(-(-_count(sizes[i], tile, overlap) // loader.batch_size) for i in own)  # calls of the detector
    most = max(int(distributed.gather_rows(torch.tensor([left], device=device)).max()), 1)
    parts, numbers = [], []
    for i in tqdm(own, text, unit="image", leave=False, disable=not distributed.is_main()):
        found = examine_tiles(detector, dataset.original(i), **about)
        parts.append(_at_size(found, sizes[i], (geometry.height, geometry.width)))
        numbers.append(torch.tensor([i], device=device))
    for _ in range(most - left):  # a detector that is spread over processes needs all of them at every batch
        none = detector.examine(torch.empty(0, 3, tile, tile, device=device), None)
        maps = None if none.maps is None else torch.empty(0, geometry.height, geometry.width)
        parts.append(none._replace(maps=maps))
        numbers.append(torch.empty(0, dtype=torch.int64, device=device))
    return gathered(parts, numbers, device)


def _count(size: list[int], tile: int, overlap: int) -> int:
    """Tiles of an image of `size` (h, w)."""
    rows, columns = (len(spans(padded_side(length, tile), tile, overlap)) for length in size)
    return rows * columns


def _at_size(found: Findings, size: list[int], to: tuple[int, int]) -> Findings:
    """Findings of one image of `size` (h, w) in an image of size `to`; shrunken maps are averages."""
    maps, peaks = found.maps, found.peaks
    if maps is not None:
        maps = F.interpolate(maps[None], to, mode="bilinear", antialias=True, align_corners=False)[0]
    if peaks is not None:
        peaks = peaks * torch.tensor([new / old for new, old in zip(to, size)], dtype=peaks.dtype)
    return found._replace(maps=maps, peaks=peaks)
