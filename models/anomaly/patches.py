"""The patches of all training pictures, of which PatchCore keeps some: in RAM, or in a file beyond a limit."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from models.anomaly.detector import Batch
from models.anomaly.maps import grid_valid
from models.anomaly.memory import Workspace
from training.distributed import all_reduce_sum, gather_rows, world_size


class Patches(NamedTuple):
    """This process's share. An id says where a patch is from: (picture h + row) w + column."""

    features: Tensor  # (N_r, D) on the CPU, perhaps memory-mapped
    ids: Tensor  # (N_r,) int64 ascending, on the CPU
    grid: tuple[int, int]  # h x w patches a picture
    cell: tuple[float, float]  # height and width of a patch's cell in input pixels

    def chosen(self, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `Bank.hold` takes of the picked ids (n,) of all processes: the features of those that lie here, their
        places among the picks, and of all picks picture, row and column (n, 3)."""
        at, here = self._find(picks)
        places = here.nonzero().flatten()
        area, columns = math.prod(self.grid), self.grid[1]
        origins = torch.stack([picks // area, picks % area // columns, picks % columns], 1)  # (n, 3)
        return self.features[at[places]], places, origins

    def squared_mean_distance(self, points: Tensor, starts: Tensor, device: torch.device) -> Tensor:
        """(mean distance of each point to those with the ids `starts`)^2, (N_r,) float64; points (N_r, d) belong to
        this share's patches, starts may lie on other processes. `device`: of the processes' exchange."""
        at, here = self._find(starts)
        rows = (
            points[at].double() * here[:, None] if len(points) else points.new_zeros(len(at), points.shape[1]).double()
        )
        rows = all_reduce_sum(rows.to(device)).cpu()  # (n, d)
        return torch.cat([torch.cdist(some.double(), rows).mean(1) for some in points.split(2**12)]).square()

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
    """All patches of this process's pictures, which come in ascending order; None when there is no picture.

    Args:
        embed: normalised (B, 3, H, W) -> patches (B, h, w, D).
        n_images: pictures of all processes, which share them evenly.
        plan: called as plan((h, w), D, rows) once the sizes are known, before memory is taken.
    """
    features, rows, ids = None, 0, []
    for images, valid, indices in batches:
        found = embed(images)  # (B, h, w, D)
        grid, width = tuple(found.shape[1:3]), found.shape[-1]
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
        raise ValueError("training pictures must come in ascending order, each once")
    return Patches(features[:rows], ids, grid, cell)


def all_ids(ids: Tensor, device: torch.device) -> Tensor:
    """The ids of all processes, ascending, on the CPU."""
    return gather_rows(ids.to(device)).sort().values.cpu()
