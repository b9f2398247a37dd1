"""The patches of all training images, of which PatchCore keeps some: in RAM, or in a file beyond a limit."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from models.anomaly.detector import Batch
from models.anomaly.maps import grid_valid
from runtime.distributed import all_reduce_sum, gather_rows, world_size
from search.spill import Workspace

DIRECT = "donot_use_mm_for_euclid_dist"  # a product's last digits depend on how many rows there are


class Patches(NamedTuple):
    """This process's share. An id says where a patch is from: (image h + row) w + column."""

    features: Tensor  # (N_r, D) on the CPU, perhaps memory-mapped
    ids: Tensor  # (N_r,) int64 ascending, on the CPU
    grid: tuple[int, int]  # h x w patches per image
    cell: tuple[float, float]  # height and width of a patch's cell in input pixels

    def chosen(self, picks: Tensor, work: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """What `Bank.hold` takes of the picked ids (n,) of all processes: the features of those that lie here, in
        memory of `work`, their places among the picks, and of all picks image, row and column (n, 3)."""
        at, here = self._find(picks)
        places = here.nonzero().flatten()
        area, columns = math.prod(self.grid), self.grid[1]
        origins = torch.stack([picks // area, picks % area // columns, picks % columns], 1)  # (n, 3)
        held = work.empty(len(places), self.features.shape[1])
        for some, out in zip(at[places].split(2**14), held.split(2**14)):
            torch.index_select(self.features, 0, some, out=out)
        return held, places, origins

    def squared_mean_distance(self, points: Tensor, starts: Tensor, device: torch.device) -> Tensor:
        """(mean distance of each point to those with the ids `starts`)^2, (N_r,) float64; points (N_r, d) belong to
        this share's patches, starts may lie on other processes. `device`: of the processes' exchange."""
        at, here = self._find(starts)
        rows = (
            points[at].double() * here[:, None] if len(points) else points.new_zeros(len(at), points.shape[1]).double()
        )
        rows = all_reduce_sum(rows.to(device)).cpu()  # (n, d)
        pieces = [torch.cdist(some.double(), rows, compute_mode=DIRECT) for some in points.split(2**12)]
        return torch.cat(pieces).mean(1).square()

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each id (n,), and whether it is here."""
        at = torch.searchsorted(self.ids, ids).clamp(max=max(len(self.ids) - 1, 0))
        return at, self.ids[at] == ids if len(self.ids) else torch.zeros_like(ids, dtype=torch.bool)


def collect(
    batches: Iterable[Batch],
    embed: Callable[[Tensor], Tensor],
    n_images: int,
    work: Workspace,
    plan: Callable[[tuple[int, int], int, int], None],
) -> Patches | None:
    """All patches of this process's images, which come in ascending order; None when there is no image.

    Args:
        embed: normalised (B, 3, H, W) -> patches (B, h, w, D).
        n_images: images of all processes, which share them evenly.
        plan: called as plan((h, w), D, rows) once the sizes are known, before memory is taken.
    """
    features, grid, width, rows, ids = None, (0, 0), 0, 0, []
    for images, valid, indices in batches:
        found = embed(images)  # (B, h, w, D)
        if features is not None and tuple(found.shape[1:]) != (*grid, width):
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels give other patches than those before")
        grid, width = (found.shape[1], found.shape[2]), found.shape[3]
        if features is None:
            n_rows = -(-n_images // world_size()) * math.prod(grid)
            plan(grid, width, n_rows)
            features = work.empty(n_rows, width)
            cell = (images.shape[2] / grid[0], images.shape[3] / grid[1])
        number = indices.cpu()[:, None] * math.prod(grid) + torch.arange(math.prod(grid))  # (B, h w)
        found, number = found.flatten(0, 2), number.flatten()  # (B h w, D), (B h w,)
        if valid is not None:
            inside = grid_valid(valid, grid).flatten()
            found, number = found[inside], number[inside.cpu()]
        features[rows : rows + len(found)] = found
        rows += len(found)
        ids.append(number)
    if features is None:
        return None
    ids = torch.cat(ids)
    if (ids.diff() <= 0).any():
        raise ValueError("training images must come in ascending order, each once")
    return Patches(features[:rows], ids, grid, cell)


def all_ids(ids: Tensor, device: torch.device) -> Tensor:
    """The ids of all processes, ascending, on the CPU."""
    return gather_rows(ids.to(device)).sort().values.cpu()


def memory_plan(grid: tuple[int, int], width: int, narrow: int, n_rows: int, kept: int, work: Workspace) -> str:
    """One line on the memory that a process is about to take: h x w patches per image of `width` channels, `n_rows` of
    them here, searched under `narrow` channels, of which `kept` go into the bank."""
    patches, search, bank = 4 * n_rows * width, 8 * n_rows * narrow, 8 * kept * width  # the last two with a copy
    return (
        f"memory of each process: {n_rows} patches ({grid[0]} x {grid[1]} an image) x {width} channels: "
        f"{_gib(patches)} in {work.place(patches)} (limit {_gib(work.limit)}), search {_gib(search)}, bank {_gib(bank)}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
