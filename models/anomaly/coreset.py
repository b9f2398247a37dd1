"""Exact k-center greedy (farthest point sampling): the same picks, in the same order, as the plain loop in float64.

The plain loop reads all N points once for every pick. A point's distance to the picks only ever falls, so (Minoux' lazy
greedy) the next picks come from the points that are farthest now: as long as the best of this pool is at least as far
as everything outside it was, it is the global choice. The picks of a pool then update all points in one pass: a matrix
product that bounds squared distances from below (`LowerBounds`) leaves the few (point, pick) pairs that could lower a
point's distance, and those are evaluated by float64 differences. So every distance that a choice rests on is the
float64 one, and neither the pool, the chunks, the threads nor the device can change a pick.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.anomaly.nearest import (
    LowerBounds,
    block_minima,
    entries_within,
    full_precision,
    pair_distances,
    require_finite,
)

PICKED = -torch.inf  # the distance of a picked point: below every other, so it is never picked again


@torch.no_grad()
def greedy_coreset(
    features: Tensor,
    n_picks: int,
    *,
    start: int = 0,
    pool: int = 4096,
    chunk: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """K-center greedy (PatchCore, Roth et al. 2022, algorithm 1) of features (N, D): (n_picks,) int64 CPU indices.

    The first pick is `start`; each next one is the point not yet picked whose squared distance to its nearest pick,
    `(x.double() - y.double()).square().sum(-1)` on the CPU, is largest; ties go to the lowest index. (So once only
    copies of picks are left, they come in the order of their index.) features: any floating dtype, taken as float32.

    pool: most candidates at a time (memory 4 pool^2 bytes); the size follows the number of picks that a pool yields.
    chunk: entries of the N x picks product that exist at once. progress: called with the number of new picks, as in
    `progress=bar.update`. The matrix products run on the device of the features, the rest on the CPU. Memory beyond
    the features: one copy of them (in float64 once distances are too small for float32 bounds) and 8 N bytes.

    Raises ValueError on a wrong shape, n_picks, start, pool or chunk; UserError when a feature is NaN or inf.
    """
    if features.dim() != 2 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(f"greedy_coreset: features {tuple(features.shape)} {features.dtype} must be floating (N, D)")
    if not 1 <= n_picks <= len(features) or not 0 <= start < len(features):
        raise ValueError(f"greedy_coreset: {n_picks} picks from {start} do not fit features {tuple(features.shape)}")
    if pool < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"greedy_coreset: pool {pool} and chunk {chunk} must be at least 1")
    features = features.float()
    require_finite(features, "features")
    points = features.cpu().contiguous()
    everyone = torch.arange(len(points))
    least = pair_distances(points, everyone, points, torch.full_like(everyone, start))  # (N,) float64, to nearest pick
    least[start] = PICKED
    bounds = LowerBounds(features)
    rows = bounds.rows(features)
    typical = float(rows[:, -2].mean())  # squared norm
    picks, size = torch.tensor([start]), 512
    report = progress or (lambda _: None)
    report(1)
    while len(picks) < n_picks:
        farthest = float(least.max())
        if farthest == 0:
            copies = (least == 0).nonzero().squeeze(1)[: n_picks - len(picks)]
            report(len(copies))
            return torch.cat([picks, copies])
        if bounds.dtype == torch.float32 and 32 * bounds.slack * typical > farthest:  # bounds too wide to be of use
            del rows
            bounds = LowerBounds(features, dtype=torch.float64)
            rows = bounds.rows(features)
        members = farthest_points(least, min(size, pool, len(points) - len(picks)))
        new = picks_inside(points, rows, bounds, least, members, n_picks - len(picks))
        least[new] = PICKED
        picks, size = torch.cat([picks, new]), max(4 * len(new), 512)
        if len(picks) < n_picks:
            lower(least, points, rows, bounds, new, chunk or (2**20 if rows.device.type == "cpu" else 2**24))
        report(len(new))
    return picks


def farthest_points(least: Tensor, size: int) -> Tensor:
    """The `size` largest of least (N,), among equal ones those of lowest index -> (size,) indices, ascending."""
    floor = least.topk(size).values[-1]
    above = (least > floor).nonzero().squeeze(1)
    level = (least == floor).nonzero().squeeze(1)
    return torch.cat([above, level[: size - len(above)]]).sort().values


def picks_inside(
    points: Tensor, rows: Tensor, bounds: LowerBounds, least: Tensor, members: Tensor, room: int
) -> Tensor:
    """The next picks (t,), 1 <= t <= room, as far as the candidates members (B,), ascending, can tell."""
    outside = least.clone()
    outside[members] = PICKED
    rival = int(outside.argmax())  # torch: the first of equal maxima
    threshold = float(outside[rival])
    x, value = points[members].double(), least[members]
    chosen = rows[members.to(rows.device)]
    with full_precision(rows.device):
        low = (chosen @ bounds.columns(chosen).T)[:, : len(members)].cpu()  # (B, B)
    picked = []
    while len(picked) < room:
        best = int(value.argmax())
        farthest = float(value[best])
        if farthest < threshold or (farthest == threshold and int(members[best]) > rival) or farthest <= 0:
            break
        picked.append(best)
        value[best] = PICKED
        near = (low[best] < value).nonzero().squeeze(1)  # only these can come closer
        value[near] = torch.minimum(value[near], (x.index_select(0, near) - x[best]).square_().sum(-1))
    return members[picked]


def lower(least: Tensor, points: Tensor, rows: Tensor, bounds: LowerBounds, new: Tensor, chunk: int) -> None:
    """least (N,) = min(least, squared distances to the points new (t,)), in place."""
    columns = bounds.columns(rows[new.to(rows.device)])
    step = max(1, chunk // len(columns))
    buffer = rows.new_empty(min(step, len(rows)), len(columns))
    for first in range(0, len(rows), step):
        block, now = rows[first : first + step], least[first : first + step].to(rows.device)
        with full_precision(rows.device):
            low = torch.mm(block, columns.T, out=buffer[: len(block)])  # (n, t')
        minima = block_minima(low)
        limit = torch.minimum(now, minima.amin(1).double() + bounds.width(block, columns))
        i, j = entries_within(low, minima, limit.where(now > 0, PICKED))
        i, j = (i + first).cpu(), new[j.clamp_(max=len(new) - 1).cpu()]  # columns past t repeat the last
        least.scatter_reduce_(0, i, pair_distances(points, i, points, j), "amin")
