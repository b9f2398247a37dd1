"""Exact k-center greedy (farthest point sampling): the same picks, in the same order, as the plain loop in float64.

The plain loop reads all N points once for every pick. A point's distance to the picks only ever falls, so (Minoux' lazy
greedy) the next picks come from the points that are farthest now: as long as the best of this pool is at least as far
as everything outside it can be, it is the global choice. The picks of a pool then update all points in one pass: a
matrix product bounds squared distances (`LowerBounds`), which nearly always tells which pick is a point's nearest. The
distance itself is evaluated, by float64 differences, only where the bounds cannot tell and when the point comes into a
pool (`Distances`). So every distance that a choice rests on is the float64 one, and neither the pool, the chunks, the
threads nor the device can change a pick.

With several processes each one holds some of the points. It sends its share of the pool and the best of what it keeps
back; then all make the same picks from the joint pool: one exchange a pass, and the picks are those of one process.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.distributed import gather, gather_rows, world_size
from search.bounds import (
    LowerBounds,
    block_minima,
    entries_within,
    extent,
    full_precision,
    pair_distances,
)

PICKED = -torch.inf  # the distance of a picked point: below every other, so it is never picked again
NOBODY = torch.iinfo(torch.int64).max  # the id of padding


class Coreset(NamedTuple):
    """What `greedy_coreset` found, equal on all processes."""

    picks: Tensor  # (n,) int64 ids in the order of picking, CPU
    radius: float  # largest distance of a point, of all processes, from its nearest pick; 0 when all are picked


class Pool(NamedTuple):
    """The farthest points of all processes, by ascending id, on the CPU. A padded one has the distance `PICKED`."""

    values: Tensor  # (B,) float64 squared distances
    ids: Tensor  # (B,) int64
    points: Tensor  # (B, D) float32
    threshold: float  # squared distance of the farthest point outside
    rival: int  # its id


@torch.no_grad()
def greedy_coreset(
    features: Tensor,
    n_picks: int,
    *,
    start: int | None = None,
    least: Tensor | None = None,
    ids: Tensor | None = None,
    radius: float = 0.0,
    pool: int = 4096,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
    empty: Callable[..., Tensor] = torch.empty,
) -> Coreset:
    """K-center greedy (PatchCore, Roth et al. 2022, algorithm 1) of features (N_r, D), this process's share of N.

    The next pick is the point not yet picked whose squared distance to its nearest pick,
    `(x.double() - y.double()).square().sum(-1)` on the CPU, is largest; ties go to the lowest id. (So once only copies
    of picks are left, they come in the order of their ids.) With several processes every one must call this, also one
    without points; they must be of one kind, since all redo the same float64 sums.

    Args:
        features: any floating dtype, taken as float32. May be a memory-mapped tensor: it is read in pieces.
        n_picks: how many to pick over all processes; an upper bound when `least` or `radius` is given.
        start: id of the first pick. Or instead
        least: (N_r,) squared distances to what is there already, float64 (a bank, starting points); none is picked yet.
        ids: (N_r,) int64, ascending, each once over all processes, by default 0..N-1 of a single process.
        radius: stop when no point is farther than this from its nearest pick; 0: only n_picks ends the search.
        pool: most candidates at a time (memory 4 pool^2 bytes); the size follows the number of picks a pool yields.
        chunk: entries of the N_r x picks product that exist at once.
        progress: called with the number of new picks, as in `progress=bar.update`.
        empty: `empty(N_r, D + 4, dtype=...)` makes room for the one large copy of features that lie on the CPU.

    The matrix products run on the device of the features, the rest on the CPU. Memory beyond the features: one copy of
    them (in float64 once distances are too small for float32 bounds), one more on the CPU if they are elsewhere, one
    of the picks, and about 40 N_r bytes.

    Raises:
        ValueError: a wrong shape, n_picks, start, least, ids, radius, pool or chunk.
        UserError: a feature is NaN or inf.
    """
    _check(features, n_picks, start, least, ids, radius, pool, chunk)
    features = features.float() if features.dtype == torch.float64 else features
    points = features.cpu().contiguous()
    ids = torch.arange(len(points)) if ids is None else ids
    n_points = int(_together(torch.tensor([len(points)])).sum())
    if n_picks > n_points and least is None and radius == 0:
        raise ValueError(f"greedy_coreset: {n_picks} picks do not fit {n_points} points")
    room, report = min(n_picks, n_points), progress or (lambda _: None)
    if room == 0:
        return Coreset(torch.empty(0, dtype=torch.int64), 0.0)
    centre, spread = extent(features, "features", _together)
    bounds = LowerBounds(centre, spread)
    empty = empty if features.device.type == "cpu" else features.new_empty
    rows = bounds.rows(features, empty)
    typical = float(rows[:, -4].mean()) if len(rows) else 0.0  # squared norm
    picks, size = torch.empty(0, dtype=torch.int64), 512
    if least is None:
        first = _together(points[ids == start].float(), gather_rows)  # (1, D)
        if len(first) != 1:
            raise ValueError(f"greedy_coreset: {len(first)} points have the id of start, {start}")
        distances = Distances(points, torch.full((len(points),), torch.inf, dtype=torch.float64))
        distances.add(rows, bounds, first, chunk)
        picks = torch.tensor([start])
        distances.pick(torch.isin(ids, picks))
        report(1)
    else:
        distances = Distances(points, least.clone())
    while True:
        share = -(-max(1, min(size, pool, n_points - len(picks))) // world_size())
        some = exchange(distances, ids, share)
        farthest = max(float(some.values.max()), some.threshold)  # of all points, from the picks so far
        if len(picks) == room or (radius > 0 and farthest <= radius**2):
            break
        if bounds.dtype == torch.float32 and 32 * bounds.slack * typical > farthest > 0:  # bounds too wide to be of use
            del rows
            bounds = LowerBounds(centre, spread, dtype=torch.float64)
            rows = bounds.rows(features, empty)
        new, n_apart = picks_inside(some, bounds, rows.device, room - len(picks), radius**2)
        distances.pick(torch.isin(ids, some.ids[new]))
        picks, size = torch.cat([picks, some.ids[new]]), max(4 * len(new), 512)
        report(len(new))
        farthest = float(some.values.max())
        if len(picks) == room and farthest >= some.threshold:  # no point outside is farther: all is known
            break
        distances.add(rows, bounds, some.points[new[:n_apart]], chunk)
    return Coreset(picks, max(farthest, 0.0) ** 0.5)


class Distances:
    """Squared distances of this process's points from their nearest picks, exact only once they are asked for.

    Attributes:
        high: (N_r,) float64, the distance or more; `PICKED` of a picked point.
        low: (N_r,) float64, the distance or less; equal to `high` where both are exact.
        nearest: (N_r,) int64, where they are not, the row of the point's nearest pick in
        centres: (P, D) float32, the picks.
    """

    def __init__(self, points: Tensor, exact: Tensor):
        self.points, self.high, self.low = points, exact, exact.clone()
        self.nearest, self.centres = torch.zeros_like(exact, dtype=torch.int64), points[:0]

    def farthest(self, size: int) -> Tensor:
        """`farthest_points`, made exact."""
        members = farthest_points(self.high, size)
        self.make_exact(members)
        if size:  # these are at least as far as the nearest of them; so may be a few others
            self.make_exact((self.high >= self.high[members].min()).nonzero().squeeze(1))
        return farthest_points(self.high, size)

    def make_exact(self, which: Tensor) -> None:
        which = which[self.low[which] < self.high[which]]
        self.high[which] = pair_distances(self.points, which, self.centres, self.nearest[which])
        self.low[which] = self.high[which]

    def pick(self, which: Tensor) -> None:
        self.high[which] = self.low[which] = PICKED

    def add(self, rows: Tensor, bounds: LowerBounds, new: Tensor, chunk: int | None = None) -> None:
        """Lower the distances to those from the new picks (t, D). Where the bounds tell which pick is now the nearest,
        its distance is not evaluated."""
        if len(new) == 0:
            return
        n_before, self.centres = len(self.centres), torch.cat([self.centres, new])
        columns = bounds.columns(new.to(rows.device))
        largest = bounds.largest(columns)
        step = max(1, (chunk or (2**22 if rows.device.type == "cpu" else 2**24)) // len(columns))
        buffer = rows.new_empty(min(step, len(rows)), len(columns))
        for first in range(0, len(rows), step):
            block = rows[first : first + step]
            high, low = (x[first : first + step].to(rows.device) for x in (self.high, self.low))
            with full_precision(rows.device):
                found = torch.mm(block, columns.T, out=buffer[: len(block)])  # (n, t') bounds
            minima = block_minima(found)
            near = minima.amin(1).double()
            far = near + bounds.width(block, largest)
            i, j = entries_within(found, minima, torch.minimum(high, far).where(high > 0, PICKED))
            real = j < len(new)  # columns past t repeat the last
            i, j = i[real], j[real]
            clear = ((i.bincount(minlength=len(block)) == 1) & (far < low))[i]
            k, at = i[clear], (i[clear] + first).cpu()
            self.high[at], self.low[at] = far[k].cpu(), near[k].cpu()
            self.nearest[at] = j[clear].cpu() + n_before
            i, j = (i[~clear] + first).cpu(), j[~clear].cpu()
            self.make_exact(i)
            self.high.scatter_reduce_(0, i, pair_distances(self.points, i, new, j), "amin")
            self.low[i] = self.high[i]


def exchange(distances: Distances, ids: Tensor, share: int) -> Pool:
    """The `share` farthest points of every process, those of lowest id among equal ones, in one exchange."""
    points, high = distances.points, distances.high
    members = distances.farthest(min(share, len(high)))
    values = torch.full((share + 1, 1), PICKED, dtype=torch.float64)
    numbers = torch.full((share + 1, 1), NOBODY)
    places = torch.zeros(share + 1, points.shape[1])
    values[: len(members), 0], numbers[: len(members), 0] = high[members], ids[members]
    places[: len(members)] = points[members]
    if len(high):
        outside = high.clone()
        outside[members] = PICKED
        rival = outside.argmax()  # torch: the first of equal maxima
        values[-1], numbers[-1] = outside[rival], ids[rival]
    packed = torch.cat([x.view(torch.int32) for x in (values, numbers, places)], 1)  # (share + 1, 4 + D), bit for bit
    joint = _together(packed).unflatten(0, (-1, share + 1))  # (W, share + 1, 4 + D)
    values, numbers = (
        joint[..., i : i + 2].contiguous().view(t)[..., 0] for i, t in ((0, torch.float64), (2, torch.int64))
    )
    order = numbers[:, :-1].flatten().argsort()
    threshold = values[:, -1].max()
    return Pool(
        values=values[:, :-1].flatten()[order],
        ids=numbers[:, :-1].flatten()[order],
        points=joint[:, :-1, 4:].flatten(0, 1)[order].view(torch.float32),
        threshold=float(threshold),
        rival=int(numbers[:, -1][values[:, -1] == threshold].min()),
    )


def farthest_points(least: Tensor, size: int) -> Tensor:
    """The `size` largest of least (N,), among equal ones those of lowest index -> (size,) indices, ascending."""
    if size == 0:
        return torch.empty(0, dtype=torch.int64)
    floor = least.topk(size).values[-1]
    above = (least > floor).nonzero().squeeze(1)
    level = (least == floor).nonzero().squeeze(1)
    return torch.cat([above, level[: size - len(above)]]).sort().values


def picks_inside(some: Pool, bounds: LowerBounds, device: torch.device, room: int, stop: float) -> tuple[Tensor, int]:
    """The next picks (t,), 1 <= t <= room, as far as the pool can tell: indices into it, and how many of them, the
    first, lay apart from what was picked before. Of the others there are only if stop, the least squared distance
    that need not be picked, is 0. The pool's values become distances to the picks too."""
    picked, value, ids, x = [], some.values.numpy(), some.ids.numpy(), some.points.double().numpy()
    points = some.points.to(device)
    with full_precision(device):
        low = (bounds.rows(points) @ bounds.columns(points).T)[:, : len(points)].cpu().numpy()  # (B, B)
    while len(picked) < room:
        best = value.argmax()  # the first of equal maxima
        farthest = value[best]
        behind = farthest < some.threshold or (farthest == some.threshold and ids[best] > some.rival)
        if behind or farthest <= stop:
            break
        picked.append(int(best))
        value[best] = PICKED
        near = (low[best] < value).nonzero()[0]  # only these can come closer; NumPy, for they are few
        if len(near):
            difference = torch.from_numpy(x[near] - x[best])
            value[near] = np.minimum(value[near], difference.square_().sum(-1).numpy())
    value = some.values
    n_apart = len(picked)
    if stop == 0 and value.max() == 0 and some.threshold <= 0:  # copies of picks, in the order of their ids
        copies = ((value == 0) & ((some.ids < some.rival) | (some.threshold < 0))).nonzero().squeeze(1)
        picked += copies[: room - n_apart].tolist()
        value[picked] = PICKED
    return torch.tensor(picked), n_apart


def _together(x: Tensor, collective: Callable[[Tensor], Tensor] = gather) -> Tensor:
    """The rows of x of all processes, on the CPU."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return collective(x.cuda() if on_gpu else x.cpu()).cpu()


def _check(features, n_picks, start, least, ids, radius, pool, chunk) -> None:
    """Raise ValueError; see `greedy_coreset`."""
    shape = tuple(features.shape)
    if features.dim() != 2 or not features.is_floating_point() or shape[1] == 0:
        raise ValueError(f"greedy_coreset: features {shape} {features.dtype} must be floating (N, D)")
    if n_picks < 1 or not radius >= 0:
        raise ValueError(f"greedy_coreset: {n_picks} picks, at least 1, within radius {radius}, at least 0")
    if pool < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"greedy_coreset: pool {pool} and chunk {chunk} must be at least 1")
    if (start is None) == (least is None):
        raise ValueError("greedy_coreset: one of start and least says where to begin")
    if least is not None and (least.shape != shape[:1] or least.dtype != torch.float64 or not (least >= 0).all()):
        raise ValueError(f"greedy_coreset: least {tuple(least.shape)} {least.dtype} must be float64 (N,), at least 0")
    if ids is None and world_size() > 1:
        raise ValueError("greedy_coreset: several processes need ids")
    if ids is not None and (ids.shape != shape[:1] or ids.dtype != torch.int64 or (ids.diff() <= 0).any()):
        raise ValueError(f"greedy_coreset: ids {tuple(ids.shape)} {ids.dtype} must be int64 (N,), ascending")
