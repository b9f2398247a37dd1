"""The loss around the weights of runs: contours, curves, a surface, sharpness; all on one scale.

    python eval.py task=landscape runs=runs/finetuned,runs/scratch images=500
    python eval.py task=landscape runs=runs/simclr directions=hessian points=25
    torchrun --nproc_per_node=2 eval.py task=landscape runs=runs/a to=runs/b

Takes runs of train_classifier.py (their loss on plain images) and of train_ssl.py (the pretext loss, with the same
views at every point). A shift of 1 is as long as the weights, filter by filter; with `to`, 1 is where the other network
is. The same command resumes a killed one. Writes landscape.csv, contours.png or curves.png, results.json and
TensorBoard events to eval_landscape/ in the first run's folder.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from data import DataConfig
from evaluation.inspect import landscape, landscape_report
from evaluation.inspect.hessian import leading
from evaluation.inspect.landscape import COLUMNS, Direction
from evaluation.inspect.landscape_report import Measured
from evaluation.inspect.run_loss import RunLoss, load_loss
from runtime import checkpoint, config, distributed
from runtime.errors import UserError, cut
from runtime.integrity import checksum
from runtime.log import Log
from runtime.values import FewOrZero, PathText, PositiveFloat, PositiveInt, Range, Seed
from runtime.version import code_version

FOLDER = "eval_landscape"
SPHERE = 1000  # after the seed of the grid's directions comes that of the sharpness's


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    runs: list[PathText]  # run folders or checkpoints of train_classifier.py and train_ssl.py, all on one scale
    to: list[PathText] = field(default_factory=list)  # a network like that of the only run: a line to it; two: a plane
    directions: Literal["random", "hessian"] = "random"  # without `to`; hessian: its two largest eigenvectors
    dimensions: Literal[1, 2] | None = None  # none: 2, with `to` of one network 1
    points: Annotated[int, Range(least=3, most=1001)] = 51  # along each axis, an odd number
    extent: PositiveFloat = 1.0  # the axes go from -extent to extent, with `to` about from 0.5 - extent to 0.5 + extent
    data: DataConfig | None = None  # the images; none: each run's own
    split: Literal["train", "validation", "test"] = "train"  # of these; of train what the run has learned from
    images: PositiveInt = 1000  # of these, spread evenly, at most
    batch_size: PositiveInt | None = None  # images per forward; a contrastive loss depends on it; none: the run's
    norms: Literal["fixed", "reestimated"] = "fixed"  # BatchNorm's statistics: the run's, or estimated at each point
    radius: PositiveFloat = 0.1  # of the sharpness
    draws: FewOrZero = 10  # random directions of it; 0: no sharpness
    eigenvalues: FewOrZero = 0  # so many of the Hessian's largest
    seed: Seed = 0  # of the directions and of the order of a pretext's images
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    resume: Literal["auto", "never"] = "auto"  # auto: measure the points that are missing; never: all of them
    out: PathText | None = None  # folder; none: eval_landscape/ in that of the first run


def run(cfg: Config) -> None:
    began, device = time.perf_counter(), distributed.setup(cfg.device)
    dimensions = check(cfg)
    options = {"images": cfg.images, "data": cfg.data, "split": cfg.split, "batch_size": cfg.batch_size}
    options |= {"reestimates": cfg.norms == "reestimated", "seed": cfg.seed}
    losses, others = ([load_loss(path, device, **options) for path in paths] for paths in (cfg.runs, cfg.to))
    require_comparable(losses, others, cfg)
    cleans = [measured_clean(loss) for loss in losses]  # what cannot work is found before the folder is touched

    axis = landscape.axis_between if cfg.to else landscape.symmetric_axis
    axes = [axis(cfg.points, cfg.extent)] * dimensions
    state = {"grid": rows(len(losses), cfg.points**dimensions), "around": rows(len(losses), 2 * cfg.draws)}
    state["networks"] = [checksum(loss.network.state_dict()) for loss in (*losses, *others)]
    folder = Path(cfg.out) if cfg.out else checkpoint.file_of(cfg.runs[0]).parent / FOLDER
    about = {"schema": Config, "resume": cfg.resume, "images": {"names": losses[0].images}}
    saved = checkpoint.open_run(folder, config.as_dict(cfg), **about)
    if saved and saved.get("networks") != state["networks"]:
        raise UserError(f"the networks of {folder} changed since it began: resume=never starts it anew")
    state |= {key: saved[key] for key in state} if saved else {}
    log = Log(folder, cfg)
    for loss in losses:
        log.say(f"{loss.name}: {len(loss.images)} images of {cfg.split}, {cfg.points**dimensions} points")
        if loss.note:
            log.say(f"note: {loss.note}")

    save = partial(checkpoint.save, folder / checkpoint.LAST, {}, config=config.as_dict(cfg), names=losses[0].images)
    measured = []
    for i, (loss, (clean, accuracy)) in enumerate(zip(losses, cleans)):
        grid, around = state["grid"][i], state["around"][i]
        with landscape.restored(loss.network) as start:
            values, found = hessian(cfg, dimensions, loss, folder / f"hessian_{i}.pt", saved is not None)
            directions, marks = found[:dimensions], [(0.0, 0.0, "")]
            if others:
                directions, marks = to_others(loss, start, others)
            elif cfg.directions == "random":
                weights = landscape.learned(loss.network)
                directions = [landscape.random_direction(weights, cfg.seed + axis) for axis in range(dimensions)]
            measure(cfg, loss, start, directions, landscape.grid_of(*axes), grid, around, partial(save, **state))
        about = {"loss": clean, "accuracy": accuracy, "grid": grid, "around": around, "radius": cfg.radius}
        measured.append(Measured(name=loss.name, **about, eigenvalues=values, marks=marks))

    results = {"task": "landscape", "runs": landscape_report.write(log, measured, axes, axis_names(cfg, measured[0]))}
    results |= {"points": cfg.points, "dimensions": dimensions, "n_images": len(losses[0].images)}
    results |= {"processes": distributed.world_size(), "seconds": time.perf_counter() - began}
    log.results(results | {"version": code_version()})
    distributed.cleanup()


def check(cfg: Config) -> int:
    """How many dimensions; `UserError` for keys that contradict each other."""
    if not cfg.runs:
        raise UserError("task=landscape needs runs: runs=runs/a, or runs=runs/a,runs/b on one scale")
    if len({*cfg.runs}) < len(cfg.runs):
        raise UserError("runs names one twice: remove it")
    if cfg.points % 2 == 0:
        raise UserError(f"points={cfg.points} must be odd, so that the run itself is one of them")
    if not cfg.to:
        return cfg.dimensions or 2
    if len(cfg.runs) > 1 or len(cfg.to) > 2:
        raise UserError("to goes from one run to one other network, or spans a plane with two: not more")
    if cfg.directions != "random":
        raise UserError(f"to gives the directions, so leave out directions={cfg.directions}")
    if cfg.extent < 0.5:
        raise UserError(f"extent={cfg.extent} must be at least 0.5 with to, or the other network is outside")
    if cfg.dimensions not in (None, len(cfg.to)):
        networks = "one network" if len(cfg.to) == 1 else "two networks"
        raise UserError(f"to of {networks} makes {len(cfg.to)} dimensions, not dimensions={cfg.dimensions}")
    return len(cfg.to)


def require_comparable(losses: list[RunLoss], others: list[RunLoss], cfg: Config) -> None:
    """UserError when the runs would not be measured on the same images, or a network of `to` has other weights than the
    run by name or shape. Runs of one name get their paths as names."""
    for loss in losses[1:]:
        if sorted(loss.images) != sorted(losses[0].images):
            raise UserError(
                f"{loss.name} and {losses[0].name} have other images, and one scale needs the same: set data, or "
                "split=test"
            )
    shapes = [shapes_of(loss) for loss in (losses[0], *others)]
    for other, its, path in zip(others, shapes[1:], cfg.to):
        if type(other) is not type(losses[0]) or its != shapes[0]:
            raise UserError(
                f"to={cut(path)} is another kind of network than {losses[0].name}, so there is no line between them"
            )
    if len({loss.name for loss in (*losses, *others)}) < len(losses) + len(others):
        for loss, path in zip((*losses, *others), (*cfg.runs, *cfg.to)):
            loss.name = path


def shapes_of(loss: RunLoss) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in loss.network.state_dict().items()}


def measured_clean(loss: RunLoss) -> tuple[float, float]:
    """Loss and accuracy of a run as it is."""
    with landscape.restored(loss.network), distributed.alone():
        return loss.measure()


def rows(runs: int, points: int) -> Tensor:
    """Nothing is measured yet."""
    return torch.full((runs, points, COLUMNS), torch.nan, dtype=torch.float64)


def to_others(
    loss: RunLoss, start: dict[str, Tensor], others: list[RunLoss]
) -> tuple[list[Direction], list[tuple[float, float, str]]]:
    """The directions to one or two other networks, and where all of them are."""
    ways = [landscape.between(start, other.network.state_dict()) for other in others]
    marks = [(0.0, 0.0, loss.name), (1.0, 0.0, others[0].name)]
    if len(others) == 1:
        return ways, marks
    second, x = landscape.plane(*ways, landscape.learned(loss.network))
    return [ways[0], second], [*marks, (x, 1.0, others[1].name)]


def hessian(
    cfg: Config, dimensions: int, loss: RunLoss, file: Path, resumes: bool
) -> tuple[list[float], list[Direction]]:
    """The largest eigenvalues and their directions at the run itself, as many as are asked for; kept in `file`, from
    which all ranks have the same."""
    count = max(cfg.eigenvalues, dimensions if cfg.directions == "hessian" else 0)
    if not count:
        return [], []
    if not (resumes and file.exists()):
        with landscape.restored(loss.network), distributed.alone():
            values, directions = leading(loss, count, cfg.seed)
        checkpoint.save(file, {}, config={}, eigenvalues=values, directions=directions)
    distributed.barrier()
    stored, device = checkpoint.load(file), loss.batches[0][1].device
    directions = [{name: part.to(device) for name, part in each.items()} for each in stored["directions"]]
    return stored["eigenvalues"], directions


def measure(
    cfg: Config,
    loss: RunLoss,
    start: dict[str, Tensor],
    directions: list[Direction],
    positions: Tensor,
    grid: Tensor,
    around: Tensor,
    save: Callable[[], None],
) -> None:
    """Fill what is missing of one run's rows of the grid, and of the points around it for the sharpness."""
    weights, drawn = {name: start[name] for name in landscape.learned(loss.network)}, {}

    def to_grid(point: int) -> None:
        landscape.move(loss.network, start, directions, positions[point].tolist())

    def to_sphere(point: int) -> None:
        number, side = divmod(point, 2)
        if number not in drawn:  # a direction has two sides
            drawn.clear()
            drawn[number] = landscape.random_direction(weights, cfg.seed + SPHERE + number)
        landscape.move(loss.network, start, [drawn[number]], [cfg.radius * (1 - 2 * side)])

    for found, place, what in ((grid, to_grid, "grid"), (around, to_sphere, "sharpness")):
        landscape.walk(found, place, loss.measure, save, loss.batches[0][1].device, f"{loss.name}: {what}")


def axis_names(cfg: Config, first: Measured) -> tuple[str, str]:
    if cfg.to:
        return f"from {first.name} (0) to {first.marks[1][2]} (1)", "orthogonal to it, to the third network"
    kind = {"random": "random direction", "hessian": "eigenvector"}[cfg.directions]
    return f"shift along {kind} 1", f"shift along {kind} 2"
