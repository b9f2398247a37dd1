"""Whole images cut into overlapping squares at their own resolution, to fit detectors of small defects on."""

from itertools import pairwise, product

import torch
from torch import Tensor

from data.dataset import Dataset
from data.geometry import Geometry
from runtime.errors import UserError

KEPT = 4  # whole images in memory, for tiles that follow one another are of one image


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start, low, high) of the tiles along a side of `length` >= `tile`: pixels low to high of the side are taken from
    the tile that begins at `start`, for nowhere else do they lie farther from a tile's end.

    Tiles begin every `tile - overlap` pixels, the last one so that it ends with the side. Two neighbors meet in the
    middle of what they share.
    """
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    cuts = [0, *((a + tile + b) // 2 for a, b in pairwise(starts)), length]
    return [(start, low, high) for start, (low, high) in zip(starts, pairwise(cuts))]


class Tiles(Dataset):
    """The tiles of some images of a set, image by image, row by row: uint8 (3, S, S), with their image's label.

    Args:
        images: positions in the set.
        tile: S. overlap: pixels that neighbors share.

    Raises:
        UserError: an image that is smaller than a tile.
    """

    def __init__(self, dataset: Dataset, images: list[int], tile: int, overlap: int):
        self._whole: dict[int, Tensor] = {}
        self._source, self._sizes = dataset, dataset.sizes.tolist()
        self._corners: list[tuple[int, int, int]] = []  # image, top, left
        for i in images:
            height, width = self._sizes[i]
            if min(height, width) < tile:
                raise UserError(f"data.tile={tile}: {dataset.paths[i]} has {height} x {width} pixels; lower data.tile")
            grid = product(spans(height, tile, overlap), spans(width, tile, overlap))
            self._corners += [(i, top, left) for (top, *_), (left, *_) in grid]
        owners = [i for i, _, _ in self._corners]
        geometry = Geometry(tile, tile, white=dataset.geometry.white, black=dataset.geometry.black)
        paths = [dataset.paths[i] for i in owners]
        super().__init__(dataset.split, geometry, dataset.root, paths, dataset.labels[owners], dataset.classes)

    def image(self, index: int) -> Tensor:
        i, top, left = self._corners[index]
        whole = self._whole.get(i)
        if whole is None:
            whole = self._whole[i] = self._source.original(i)
            for old in [*self._whole][:-KEPT]:
                self._whole.pop(old, None)  # another thread may have been faster
        height, width = self.geometry.height, self.geometry.width
        return whole[:, top : top + height, left : left + width].contiguous()

    @property
    def sizes(self) -> Tensor:
        return torch.tensor([[self.geometry.height, self.geometry.width]]).expand(len(self), 2)

    @property
    def names(self) -> list[str]:
        """`<the image's name>#<top>,<left>`."""
        names = self._source.names
        return [f"{names[i]}#{top},{left}" for i, top, left in self._corners]
