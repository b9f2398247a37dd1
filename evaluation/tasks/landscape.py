"""The loss around the weights of runs: contours, curves, a surface, sharpness; several runs on one scale.

    python eval.py task=landscape runs=runs/finetuned,runs/scratch images=500
    python eval.py task=landscape runs=runs/simclr directions=hessian points=25
    torchrun --nproc_per_node=2 eval.py task=landscape runs=runs/a to=runs/b

Takes runs of train_classifier.py (their loss on plain images) and of train_ssl.py (the pretext loss, with the same
views at every point). A shift of 1 is as long as the weights, filter by filter; with `to`, 1 is where the other network
is. The same command resumes a killed one. Writes landscape.csv, contours.png or curves.png, results.json and
TensorBoard events to eval_landscape/ in the first run's folder.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data import DataConfig
from evaluation.inspect import landscape
from evaluation.inspect.hessian import leading
from evaluation.inspect.landscape import COLUMNS, Direction
from evaluation.inspect.run_loss import RunLoss, load_loss
from evaluation.tables import csv_table, markdown_table
from plots.heatmaps import save as save_image
from plots.landscape import Landscape, Scale, contour_image, curve_image, surface
from runtime import checkpoint, config, distributed
from runtime.errors import UserError, cut
from runtime.files import whole_file
from runtime.integrity import checksum
from runtime.log import Log
from runtime.values import FewOrZero, PathText, PositiveFloat, PositiveInt, Range, Seed
from runtime.version import code_version

FOLDER = "eval_landscape"


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


@dataclass
class Plan:
    """What is measured of one run."""

    loss: RunLoss
    clean: tuple[float, float]  # loss and accuracy where it stands
    start: dict[str, Tensor]  # the network's state
    directions: list[Direction]
    eigenvalues: list[float]
    marks: list[tuple[float, float, str]]  # positions of networks


def run(cfg: Config) -> None:
    began, device = time.perf_counter(), distributed.setup(cfg.device)
    dimensions = check(cfg)
    options = {"images": cfg.images, "data": cfg.data, "split": cfg.split, "batch_size": cfg.batch_size}
    losses = [load_loss(path, device, **options, seed=cfg.seed) for path in cfg.runs]
    others = [load_loss(path, device, **options, seed=cfg.seed) for path in cfg.to]
    named_apart(losses, cfg.runs)
    same_images(losses)
    like(losses[0], others, cfg)
    cleans = [measured_clean(loss, cfg) for loss in losses]  # also finds what cannot work before the folder is touched

    axis = landscape.axis_between if cfg.to else landscape.symmetric_axis
    axes = [axis(cfg.points, cfg.extent)] * dimensions
    grid = landscape.grid_of(*axes)  # (P, D)
    fresh = {"grid": rows(len(losses), len(grid)), "around": rows(len(losses), 2 * cfg.draws)}
    fresh["networks"] = [checksum(loss.network.state_dict()) for loss in (*losses, *others)]
    folder = Path(cfg.out) if cfg.out else checkpoint.file_of(cfg.runs[0]).parent / FOLDER
    about = {"schema": Config, "resume": cfg.resume, "images": {"names": losses[0].images}}
    saved = checkpoint.open_run(folder, config.as_dict(cfg), **about)
    state = resumed(saved, fresh, folder)
    log = Log(folder, cfg)
    for loss in losses:
        log.say(f"{loss.name}: {len(loss.images)} images of {cfg.split}, {len(grid)} points")
        if loss.note:
            log.say(f"note: {loss.note}")

    keep = partial(save, folder, cfg, losses[0], state)
    plans = []
    for i, (loss, clean) in enumerate(zip(losses, cleans)):
        with landscape.restored(loss.network) as start:
            plan = planned(cfg, dimensions, loss, clean, start, others, folder / f"hessian_{i}.pt", saved is not None)
            measure(cfg, plan, grid, state["grid"][i], state["around"][i], keep, device)
        plans.append(plan)
    finish(cfg, log, plans, axes, state, began)


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


def named_apart(losses: list[RunLoss], paths: list[str]) -> None:
    """Runs of one name get their paths as names."""
    if len({loss.name for loss in losses}) < len(losses):
        for loss, path in zip(losses, paths):
            loss.name = str(path)


def same_images(losses: list[RunLoss]) -> None:
    """UserError when the runs would not be measured on the same images."""
    for loss in losses[1:]:
        if sorted(loss.images) != sorted(losses[0].images):
            raise UserError(
                f"{loss.name} and {losses[0].name} have other images, and one scale needs the same: set data, or "
                "split=test"
            )


def like(loss: RunLoss, others: list[RunLoss], cfg: Config) -> None:
    """UserError when a network of `to` has other weights than the run's by name or shape."""
    shapes = {name: tensor.shape for name, tensor in loss.network.state_dict().items()}
    for other, path in zip(others, cfg.to):
        its = {name: tensor.shape for name, tensor in other.network.state_dict().items()}
        if type(other) is not type(loss) or its != shapes:
            raise UserError(f"to={cut(path)} is another kind of network than {loss.name}, so there is no line between")


def measured_clean(loss: RunLoss, cfg: Config) -> tuple[float, float]:
    """Loss and accuracy of a run as it is."""
    with landscape.restored(loss.network), distributed.alone():
        return measure_here(loss, cfg.norms)


def measure_here(loss: RunLoss, norms: str) -> tuple[float, float]:
    if norms == "reestimated":
        loss.reestimate()
    return loss.measure()


def rows(runs: int, points: int) -> Tensor:
    return torch.full((runs, points, COLUMNS), torch.nan, dtype=torch.float64)


def resumed(saved: dict | None, fresh: dict, folder: Path) -> dict:
    """What a killed task has measured, or nothing yet."""
    if saved is None:
        return fresh
    if saved.get("networks") != fresh["networks"]:
        raise UserError(f"the networks of {folder} changed since it began: resume=never starts it anew")
    return {key: saved[key] for key in fresh}


def save(folder: Path, cfg: Config, loss: RunLoss, state: dict) -> None:
    about = {"config": config.as_dict(cfg), "names": loss.images}
    checkpoint.save(folder / checkpoint.LAST, {}, **about, **state)


def planned(
    cfg: Config,
    dimensions: int,
    loss: RunLoss,
    clean: tuple[float, float],
    start: dict[str, Tensor],
    others: list[RunLoss],
    file: Path,
    resumes: bool,
) -> Plan:
    """The directions of one run; the Hessian's are in `file` when the task resumes."""
    weights, eigenvalues, found = landscape.learned(loss.network), [], []
    wanted = max(cfg.eigenvalues, dimensions if cfg.directions == "hessian" else 0)
    if wanted:
        eigenvalues, found = hessian(cfg, loss, wanted, file, resumes)
    marks = [(0.0, 0.0, "")]
    if others:
        ways = [landscape.between(start, other.network.state_dict()) for other in others]
        marks = [(0.0, 0.0, loss.name), (1.0, 0.0, others[0].name)]
        directions = ways[:1]
        if len(others) == 2:
            second, x = landscape.plane(*ways, weights)
            directions.append(second)
            marks.append((x, 1.0, others[1].name))
    elif cfg.directions == "hessian":
        directions = found[:dimensions]
    else:
        directions = [landscape.random_direction(weights, cfg.seed + i) for i in range(dimensions)]
    return Plan(loss, clean, start, directions, eigenvalues[: cfg.eigenvalues or wanted], marks)


def hessian(cfg: Config, loss: RunLoss, wanted: int, file: Path, resumes: bool) -> tuple[list[float], list[Direction]]:
    """Eigenvalues and directions at the run itself, kept in `file`, from which all ranks have the same."""
    if not (resumes and file.exists()):
        with landscape.restored(loss.network), distributed.alone():
            if cfg.norms == "reestimated":
                loss.reestimate()
            values, directions = leading(loss, wanted, cfg.seed)
        checkpoint.save(file, {}, config={}, eigenvalues=values, directions=directions)
    distributed.barrier()
    stored, device = checkpoint.load(file), loss.batches[0][1].device
    directions = [{name: part.to(device) for name, part in each.items()} for each in stored["directions"]]
    return stored["eigenvalues"], directions


def measure(
    cfg: Config,
    plan: Plan,
    grid: Tensor,
    found: Tensor,
    around: Tensor,
    keep: Callable[[], None],
    device: torch.device,
) -> None:
    """Fill the rows of one run's grid, and of the points around it."""
    loss, weights = plan.loss, {name: plan.start[name] for name in landscape.learned(plan.loss.network)}
    sphere: dict[int, Direction] = {}  # the last direction of it, for its two sides

    def to_grid(point: int) -> None:
        landscape.move(loss.network, plan.start, plan.directions, grid[point].tolist())

    def to_sphere(point: int) -> None:
        number, side = divmod(point, 2)
        if number not in sphere:
            sphere.clear()
            sphere[number] = landscape.random_direction(weights, cfg.seed + 1000 + number)
        landscape.move(loss.network, plan.start, [sphere[number]], [cfg.radius * (1 - 2 * side)])

    here = partial(measure_here, loss, cfg.norms)
    landscape.walk(found, to_grid, here, keep, device, f"{loss.name}: grid")
    landscape.walk(around, to_sphere, here, keep, device, f"{loss.name}: sharpness")


def finish(cfg: Config, log: Log, plans: list[Plan], axes: list[Tensor], state: dict, began: float) -> None:
    """Table, CSV, images, surfaces and results."""
    drawn, described, cells = [], [], []
    for plan, found, around in zip(plans, state["grid"], state["around"]):
        loss, accuracy = plan.clean
        row = {"run": plan.loss.name, "loss": loss, "accuracy": None if math.isnan(accuracy) else accuracy}
        row |= landscape.sharpness(loss, around) if cfg.draws else {}
        row |= {"eigenvalues": plan.eigenvalues} if plan.eigenvalues else {}
        row |= {"lowest": float(found[:, 0].nan_to_num(math.inf).min()), "seconds_per_point": float(found[:, 2].mean())}
        described.append(row)
        cells += [
            {"run": plan.loss.name, **dict(zip("xy", position)), "loss": at, "accuracy": right}
            for position, (at, right, _) in zip(landscape.grid_of(*axes).tolist(), found.tolist())
        ]
        shape = [len(axis) for axis in axes[::-1]]
        about = {"name": plan.loss.name, "note": note_of(row, cfg), "marks": plan.marks}
        y = axes[1] if len(axes) == 2 else None
        drawn.append(Landscape(x=axes[0], y=y, loss=found[:, 0].view(shape), **about))  # (Y, X)
    names = axis_names(cfg, plans)
    if len(axes) == 2:
        image, file, key = contour_image(drawn, *names), "contours.png", "landscape"
        scale = Scale([each.loss for each in drawn])
        for each in drawn:
            log.mesh(f"landscape/surface/{each.name}", *surface(each, scale))
    else:
        image, file, key = curve_image(drawn, names[0]), "curves.png", "landscape/curves"
    log.image(key, pil_to_tensor(image))
    table = markdown_table(*described_table(described, cfg))
    log.text("landscape/table", table)
    log.say(table)
    if distributed.is_main():
        save_image(image, log.folder / file)
        with whole_file(log.folder / "landscape.csv") as csv:
            csv.write(csv_table(cells))
    results = {"task": "landscape", "runs": described, "points": cfg.points, "dimensions": len(axes)}
    results |= {"directions": "networks" if cfg.to else cfg.directions, "n_images": len(plans[0].loss.images)}
    seconds = time.perf_counter() - began
    log.results(results | {"processes": distributed.world_size(), "seconds": seconds, "version": code_version()})
    distributed.cleanup()


def note_of(row: dict, cfg: Config) -> str:
    parts = [f"loss {row['loss']:.3g}"]
    parts += [] if row["accuracy"] is None else [f"accuracy {row['accuracy']:.3f}"]
    parts += [f"rise at {cfg.radius:g}: {row['rise']:.2g}"] if "rise" in row else []
    parts += [f"eigenvalue {row['eigenvalues'][0]:.3g}"] if "eigenvalues" in row else []
    return ", ".join(parts)


def axis_names(cfg: Config, plans: list[Plan]) -> tuple[str, str]:
    if cfg.to:
        return f"from {plans[0].loss.name} (0) to {plans[0].marks[1][2]} (1)", "orthogonal to it, to the third network"
    kind = {"random": "random direction", "hessian": "eigenvector"}[cfg.directions]
    return f"shift along {kind} 1", f"shift along {kind} 2"


def described_table(described: list[dict], cfg: Config) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people."""
    header = ["run", "loss", "accuracy", "lowest on the grid", f"mean rise at {cfg.radius:g}", "largest eigenvalues"]
    body = []
    for row in described:
        rise = f"{row['rise']:.4g} ± {row['rise_error']:.2g}" if "rise" in row else "-"
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        values = ", ".join(f"{value:.4g}" for value in row.get("eigenvalues", [])) or "-"
        body.append([row["run"], f"{row['loss']:.5g}", accuracy, f"{row['lowest']:.5g}", rise, values])
    return header, body
