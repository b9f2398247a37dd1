"""The patches of all training images, of which PatchCore keeps some: in RAM, or in a file beyond a limit."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.distributed import all_reduce_sum, gather_rows
from runtime.memory import Workspace, gib

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


def all_ids(ids: Tensor, device: torch.device) -> Tensor:
    """The ids of all processes, ascending, on the CPU."""
    return gather_rows(ids.to(device)).sort().values.cpu()


def memory_plan(grid: tuple[int, int], width: int, narrow: int, n_rows: int, kept: int, work: Workspace) -> str:
    """One line on the memory that a process is about to take: h x w patches per image of `width` channels, `n_rows` of
    them here, searched under `narrow` channels, of which `kept` go into the bank."""
    patches, search, bank = 4 * n_rows * width, 8 * n_rows * narrow, 8 * kept * width  # the last two with a copy
    return (
        f"memory of each process: {n_rows} patches ({grid[0]} x {grid[1]} per image) x {width} channels: "
        f"{gib(patches)} in {work.place(patches)} (limit {gib(work.limit)}), search {gib(search)}, bank {gib(bank)}"
    )
