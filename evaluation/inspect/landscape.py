"""Where a network's weights may be moved to, and the loss there: the loss landscape of Li et al. 2018, "Visualizing the
loss landscape of neural nets".

A point (x, y) is the network with the weights w + x d1 + y d2. The directions are random and filter-normalized, or lead
to other networks; evaluation/inspect/hessian.py has the Hessian's.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from runtime.distributed import all_reduce_max, alone, gather_rows, is_main, rank, world_size

Direction = dict[str, Tensor]  # by the names of a state_dict; what is not in it stays where it is

SAVED_EVERY = 2.0  # seconds, about, of points that a kill may lose
MOST_AT_ONCE = 1000  # points of a process between two savings
COLUMNS = 3  # of a measured point: loss, accuracy, seconds


def learned(network: nn.Module) -> Direction:
    """The parameters that training moves, by name. A frozen teacher's and an EMA target's are not among them."""
    return {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}


def random_direction(weights: Direction, seed: int) -> Direction:
    """Normal numbers, each filter of them as long as the network's (Li et al., section 4):

        d <- d |w| / (|d| + 1e-10)    of each slice along the first axis of a tensor

    Tensors with one number per slice, biases and the gains of norms, do not move, as in the official code with
    `xignore=biasbn`, which knows them by their one axis; here those of more axes, such as the lengths in a
    weight-normed layer, are left alone, too. Drawn on the CPU, so that all devices have the same, and networks of one
    shape the same but for the lengths of their filters.
    """
    generator, direction = torch.Generator().manual_seed(seed), {}
    for name, weight in weights.items():
        if weight.dim() and weight.numel() > len(weight):
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            direction[name] = drawn * (row_norms(weight) / (row_norms(drawn) + 1e-10)).to(weight)
    return direction


def row_norms(weight: Tensor) -> Tensor:
    """Norms of the slices along the first axis, (N, ...) -> float64 (N, 1, ...)."""
    return weight.double().flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))  # (N, 1, ...)


def filter_norm(weights: Direction) -> float:
    """The length of every `random_direction` of these weights."""
    return math.sqrt(sum(float(w.double().square().sum()) for w in weights.values() if w.dim() and w.numel() > len(w)))


def between(own: dict[str, Tensor], other: dict[str, Tensor]) -> Direction:
    """From one network's state to another's: weights, statistics and all else that is no whole number."""
    return {name: other[name].to(start) - start for name, start in own.items() if start.is_floating_point()}


def plane(first: Direction, second: Direction, weights: Direction) -> tuple[Direction, float]:
    """A direction orthogonal to `first`, such that `second` = x first + it; and x (Garipov et al. 2018, appendix A.3).

    Orthogonal and x in the sense of the learned `weights`; statistics follow.
    """
    dot = sum(float((first[name].double() * second[name].double()).sum()) for name in weights)
    x = dot / sum(float(first[name].double().square().sum()) for name in weights)
    return {name: second[name] - x * first[name] for name in second}, x


def symmetric_axis(points: int, extent: float) -> Tensor:
    """float64 (points,) from -extent to extent; of an odd number the middle is exactly 0."""
    return extent * (2 * torch.arange(points, dtype=torch.float64) - (points - 1)) / (points - 1)


def axis_between(points: int, extent: float) -> Tensor:
    """float64 (points,), evenly, about from 0.5 - extent to 0.5 + extent, so that 0 and 1, where the networks are, are
    exactly among them.

    Raises:
        ValueError: an extent below 0.5, or fewer than two points.
    """
    steps = max(1, round((points - 1) / (2 * extent)))  # from 0 to 1
    if steps > points - 1:
        raise ValueError(f"{points} points of extent {extent} do not hold 0 and 1")
    return (torch.arange(points, dtype=torch.float64) - (points - 1 - steps) // 2) / steps


def grid_of(*axes: Tensor) -> Tensor:
    """float64 (P, D), the first axis fastest: row y * X + x of two axes is (x, y)."""
    return torch.cartesian_prod(*axes[::-1]).reshape(-1, len(axes)).flip(1)  # (P, D)


@contextmanager
def restored(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gives copies of all that the network's state holds; on exit it is there again, bit for bit."""
    saved = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    try:
        yield saved
    finally:
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                tensor.copy_(saved[name])


@torch.no_grad()
def move(network: nn.Module, start: dict[str, Tensor], directions: list[Direction], position: list[float]) -> None:
    """Put the network at start + the sum of position_i direction_i; at 0 it is `start` bit for bit. Variances, which
    beyond two networks may become negative, stop at 0."""
    for name, tensor in network.state_dict().items():
        tensor.copy_(start[name])
        for x, direction in zip(position, directions):
            if x and name in direction:
                tensor.add_(direction[name], alpha=x)
        if name.endswith("running_var"):
            tensor.clamp_(min=0)


def walk(
    rows: Tensor,
    place: Callable[[int], None],
    measure: Callable[[], tuple[float, float]],
    save: Callable[[], None],
    device: torch.device,
    progress: str,
) -> None:
    """Measure the points whose row of `rows` (P, COLUMNS) is still NaN in its last column, in place: loss, accuracy and
    seconds of each.

    All processes share the points, and all have all rows after each round, when `save` is called: about every
    `SAVED_EVERY` seconds. Each measures as if it were alone, so that a loss gathers nothing of other points.

    Args:
        place: moves the network to the point of this number. measure: gives loss and accuracy there.
    """
    todo, each = rows[:, -1].isnan().nonzero()[:, 0], 1  # (M,)
    about = {"initial": len(rows) - len(todo), "unit": "point", "leave": False, "disable": not is_main()}
    with tqdm(total=len(rows), desc=progress, **about) as bar:
        while len(todo):
            together = each * world_size()
            now, todo = todo[:together], todo[together:]
            mine, found = now[rank() :: world_size()], []
            for point in mine.tolist():
                began = time.perf_counter()
                with alone():
                    place(point)
                    found.append([*measure(), time.perf_counter() - began])
            own = torch.tensor(found, dtype=torch.float64, device=device).reshape(-1, COLUMNS)
            rows[gather_rows(mine.to(device)).cpu()] = gather_rows(own).cpu()
            save()
            slowest = all_reduce_max(own[:, -1].sum() / max(1, len(own)))
            each = min(MOST_AT_ONCE, max(1, int(SAVED_EVERY / max(1e-9, float(slowest)))))
            bar.update(len(now))


def sharpness(center: float, around: Tensor) -> dict[str, float]:
    """How much the loss rises at a distance.

    Args:
        around: (2 K, COLUMNS) measured at w + r d and w - r d of K random directions, in turn.

    Returns:
        The mean rise over the directions, of which each is the mean of its two sides; and its standard error over them.
    """
    rises = around[:, 0].view(-1, 2).mean(1) - center  # (K,)
    error = float(rises.std() / math.sqrt(len(rises))) if len(rises) > 1 else float("nan")
    return {"rise": float(rises.mean()), "rise_error": error}
