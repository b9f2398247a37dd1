"""Examine images with the detector of a run of train_anomaly.py, or tell them apart with the classifier of a run of
train_classifier.py.

    python predict.py runs/patchcore_own images/ out=results/
    python predict.py runs/patchcore_own images/large.jpg out=results/ tile=512 overlap=64 threshold=3.5
    python predict.py runs/patchcore_can /path/to/mvtec_ad2/can/test_private submission=submission/
    python predict.py runs/classifier_own images/ out=results/
    python predict.py runs/patchcore_own/eval_export/detector.pt2 images/ out=results/

The run folder is all it needs, or a file of eval.py task=export, for which models/ need not be there. Images are those
in a folder and below, or one file, of any sizes. Writes to `out`:

predictions.csv: a row per image. Of a detector: path (below the folder), score, is_anomalous (1 if the score is above
    the threshold, else 0), threshold, nearest_training_image (of detectors with a memory), and y, x: row and column of
    the most anomalous pixel of the original. Of a classifier: path, class (the likeliest, or `none of these` if the
    score is above the threshold), probability of the likeliest class, score (how little the image looks like the
    training images), is_unknown, threshold, and the probability of each class. What is not known is empty.
heatmaps/<path>.png, of a detector: the original in gray under its anomaly map, pixel for pixel, regions above the pixel
    threshold outlined and the peak marked; below it the verdict, the score and a legend. None for detectors without
    maps, and for runs that had no normal images to take the color scale from.

`tile`, of a detector: images are not fitted into the input but cut into squares at their own resolution; the score is
the largest of all tiles' scores. A run that was fitted with `data.tile` has thresholds for that; those of another run
were measured on whole images in the input's size and promise nothing: give one.

An image that cannot be read is named on stderr and in the JSON on the last line, and skipped. One whose heat map cannot
be written is named in the same way and keeps its row; the exit status is then 1. A full disk ends the program at once:
the same command, once there is room, examines all images again.
"""

import runtime.threads  # before torch

import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import Geometry
from data.batches import Findings
from data.image_files import find_images
from data.opening import memory_kept
from evaluation.anomaly.prediction import (
    LoadedImage,
    Precision,
    ahead,
    decode_whole,
    examine,
    load_image,
    load_run,
    predicted,
)
from evaluation.anomaly.submission import check_private, write_submission
from evaluation.anomaly.tiling import check_tiling
from evaluation.classify import OLDER, Classified, classify, load_classifier_run
from evaluation.export.exported import is_exported, load_exported
from plots.heatmaps import bytes_to_draw, save, single_heatmap
from runtime import checkpoint, config, distributed, errors, help
from runtime.errors import DiskFull, UserError, cut
from runtime.files import locked, whole_file
from runtime.memory import gib
from runtime.text import printable
from runtime.values import PathText, PixelsOrZero, PositiveInt
from runtime.version import another_version

COLUMNS = ("path", "score", "is_anomalous", "threshold", "nearest_training_image", "y", "x")
CLASS_COLUMNS = ("path", "class", "probability", "score", "is_unknown", "threshold")  # and the classes
USAGE = "usage: python predict.py <run folder> <images: folder or file> [out=results threshold=.. tile=512 ...]"
THREADS = min(16, runtime.threads.cpu_count())  # that decode and draw; each holds an image at full size


@dataclass(kw_only=True)
class Config:
    run: PathText  # folder of a finished run, or a .pt2 file of task=export
    images: PathText  # a folder or a file
    out: PathText = "results"  # folder of the table and the heat maps
    threshold: float | None = None  # of the score; none: the run's own
    tile: PixelsOrZero | None = None  # side of square tiles in pixels; 0: whole images; none: as the run was fitted
    overlap: PixelsOrZero | None = None  # pixels that neighboring tiles share; none: as the run was fitted, else 64
    batch_size: PositiveInt = 16  # images, or tiles of one image
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    category: str | None = None  # of a run of several: what the images show; it has thresholds of its own
    precision: Precision | None = None  # none: the run's own, which its thresholds are of
    submission: PathText | None = None  # folder of what MVTec AD 2's server takes; the images are a private test set's


def main(argv: list[str]) -> None:
    # ---------------------------------------------------------------- configuration, detector, images
    if not help.asked(argv) and (len(argv) < 2 or not all("=" in word for word in argv[2:])):
        raise UserError(USAGE)
    words = [word for word in argv if help.asked([word])] or [f"run={argv[0]}", f"images={argv[1]}", *argv[2:]]
    cfg = config.load(Config, words)
    device = distributed.setup(cfg.device)
    if distributed.world_size() > 1:
        raise UserError("predict.py runs in one process: start it without torchrun, once for each folder")
    out = Path(cfg.out)
    examiner = with_exported(cfg) if is_exported(cfg.run) else with_run(cfg, device)
    root, paths = images_of(Path(cfg.images), out, submission=cfg.submission is not None)
    if os.path.isfile(out / "heatmaps"):
        raise UserError(f"{out / 'heatmaps'} is no folder: remove it or choose another out=")

    # ---------------------------------------------------------------- read, examine, draw, write: all while going
    began, skipped, not_drawn, verdicts = time.perf_counter(), [], [], Counter()
    load = partial(load_image, geometry=examiner.geometry, whole=bool(cfg.tile))
    with (
        locked(out, "heatmaps"),
        whole_file(out / "predictions.csv", durable=True) as file,
        tqdm(total=len(paths), desc="images", unit="image") as bar,
        runtime.threads.Threads(THREADS) as pool,
    ):
        table = csv.writer(file)
        table.writerow(examiner.columns)
        loaded = ahead(load, paths, pool, THREADS if cfg.tile else THREADS + cfg.batch_size)
        examined = examiner.examine(without_broken(loaded, skipped, bar))
        for row, problem in ahead(partial(examiner.finish, root=root), examined, pool, THREADS):
            table.writerow(row)
            file.flush()
            if problem is not None:
                not_drawn.append(str(root / row[0]))
                say(f"no heat map of {not_drawn[-1]}: {problem}")
            verdicts[row[examiner.columns.index(examiner.verdict)]] += 1
            bar.update()
        if not verdicts:
            raise UserError(f"none of the {len(paths)} images in {cfg.images} can be read: check the files")

    # ---------------------------------------------------------------- what was done
    seconds, n_rows = time.perf_counter() - began, verdicts.total()
    results = {"images": n_rows, **examiner.summary(verdicts), "skipped": skipped, "without_heatmap": not_drawn}
    results |= {"seconds": seconds, "images_per_second": n_rows / seconds, "out": str(out)}
    print(json.dumps(results), flush=True)
    if not_drawn:
        sys.exit(1)


@dataclass(kw_only=True)
class Examiner:
    """What a run does with images."""

    columns: tuple[str, ...]  # of the table
    verdict: str  # the column that is counted
    geometry: Geometry  # how files become inputs
    examine: Callable[[Iterator[LoadedImage]], Iterator]  # images to whatever `finish` takes, in batches, in order
    finish: Callable[..., tuple[list, UserError | None]]  # (examined, root=) -> row, and why it has no heat map
    summary: Callable[[Counter], dict]  # for the JSON, of the counted verdicts


def with_run(cfg: Config, device: torch.device) -> Examiner:
    if not checkpoint.file_of(cfg.run).exists():
        scripts = "train_anomaly.py or train_classifier.py"
        raise UserError(f"{cfg.run} has no {checkpoint.LAST}: name the folder of a finished run of {scripts}")
    state = checkpoint.load(cfg.run)
    if "head" in state["config"]:
        refuse_keys_of_detectors(cfg)
        if "calibration" not in state:
            if (checkpoint.folder_of(cfg.run) / "results.json").exists():
                raise UserError(f"the run in {cfg.run} was {OLDER}")
            raise UserError(f"the run in {cfg.run} has not finished: the command that began it resumes it")
        network, geometry, state = load_classifier_run(cfg.run, state)
        say_version(cfg, state)
        return with_classifier(cfg, network.to(device), geometry, state, device)
    detector, geometry, state = load_run(Path(cfg.run), cfg.category, state)
    say_version(cfg, state)
    settle_tiles(cfg, state)
    if cfg.tile:
        check_tiling(detector, cfg.tile, cfg.overlap or 0)
    return with_detector(cfg, detector.to(device), geometry, state, device)


def with_exported(cfg: Config) -> Examiner:
    """A program of eval.py task=export, which runs on the CPU, with the tiles and the precision that it has."""
    if cfg.device not in ("auto", "cpu"):
        raise UserError(f"device={cfg.device}: {cfg.run} was exported for the CPU; set device=cpu, or name the run")
    exported = load_exported(cfg.run, "detector", "classifier", category=cfg.category)
    if exported.kind == "classifier":
        refuse_keys_of_detectors(cfg)
    settings = exported.state["config"]
    for key, own in (settings.get("data", {}) | {"precision": settings["precision"]}).items():
        if (value := getattr(cfg, key)) not in (None, own):
            raise UserError(f"{key}={value} is not how {cfg.run} was exported ({own}): remove it, or name a run")
        setattr(cfg, key, own)
    use = with_detector if exported.kind == "detector" else with_classifier
    return use(cfg, exported, exported.geometry, exported.state, torch.device("cpu"))


def with_detector(cfg: Config, detector: Any, geometry: Geometry, state: dict, device: torch.device) -> Examiner:
    about: dict[str, Any] = {"batch_size": cfg.batch_size, "tile": cfg.tile, "overlap": cfg.overlap}
    about["precision"] = cfg.precision or state["config"]["precision"]
    threshold = threshold_of(cfg, state)
    return Examiner(
        columns=COLUMNS,
        verdict="is_anomalous",
        geometry=geometry,
        examine=lambda images: examine(detector, images, device, **about),
        finish=partial(row_and_heatmap, cfg=cfg, threshold=threshold, state=state),
        summary=lambda verdicts: {"anomalous": None if threshold is None else verdicts[1]},
    )


def refuse_keys_of_detectors(cfg: Config) -> None:
    for key in ("tile", "overlap", "category", "submission"):
        if (value := getattr(cfg, key)) is not None:
            raise UserError(f"{key}={cut(str(value), 40)} is for detectors, and {cfg.run} is a classifier's: remove it")


def with_classifier(cfg: Config, network: Any, geometry: Geometry, state: dict, device: torch.device) -> Examiner:
    threshold = state["calibration"]["threshold"] if cfg.threshold is None else cfg.threshold
    if threshold is None:
        say(f"warning: {cfg.run} had no validation images, so no image is called none of these: give threshold=")
    about: dict[str, Any] = {"batch_size": cfg.batch_size, "precision": cfg.precision or state["config"]["precision"]}
    return Examiner(
        columns=(*CLASS_COLUMNS, *(f"probability of {name}" for name in state["classes"])),
        verdict="class",
        geometry=geometry,
        examine=lambda images: classify(network, images, state, device, threshold=threshold, **about),
        finish=class_row,
        summary=lambda verdicts: {"classes": dict(sorted(verdicts.items()))},
    )


def say_version(cfg: Config, state: dict) -> None:
    if other := another_version(state.get("version"), with_script=False):
        say(f"warning: {cfg.run} was made by {other}, so scores may differ from its own")


def settle_tiles(cfg: Config, state: dict) -> None:
    """Tiles as the run was fitted, unless they are given."""
    for key, without in (("tile", 0), ("overlap", 64)):
        if getattr(cfg, key) is None:
            setattr(cfg, key, state["config"]["data"].get(key, without))


def threshold_of(cfg: Config, state: dict) -> float | None:
    """The threshold of the score, given or the run's, with a warning where there is none or it promises nothing."""
    threshold = state["calibration"]["threshold"] if cfg.threshold is None else cfg.threshold
    if threshold is None:
        say(f"warning: {cfg.run} has no threshold, so nothing is called anomalous or normal: give threshold=")
    elif cfg.threshold is None and cfg.tile != (fitted := state["config"]["data"].get("tile", 0)):
        measured = f"tiles of {fitted}" if fitted else "whole images"
        say(f"warning: the run's thresholds were measured on {measured}, not at tile={cfg.tile}: give threshold=")
    return threshold


def class_row(examined: tuple[LoadedImage, Classified], *, root: Path) -> tuple[list, None]:
    """An image's row of the table; it has no heat map that could fail."""
    item, found = examined
    unknown = None if found.is_unknown is None else int(found.is_unknown)
    row = [os.path.relpath(item.path, root), found.verdict, found.probability, found.score, unknown, found.threshold]
    return row + found.probabilities.tolist(), None


def row_and_heatmap(
    examined: tuple[LoadedImage, Findings], *, cfg: Config, root: Path, threshold: float | None, state: dict
) -> tuple[list, UserError | None]:
    """Draw an image's heat map, if its detector has maps; returns its row of the table, and why it is not drawn."""
    (item, found), out = examined, Path(cfg.out)
    said, name, problem = predicted(item, found, state, threshold), os.path.relpath(item.path, root), None
    if cfg.submission:
        write_submission(Path(cfg.submission), item.path, said.map, state["calibration"])
    if said.map is not None and state["calibration"]["low"] is not None:
        about: dict[str, Any] = {"score": said.score, "threshold": threshold, "peak": said.peak}
        try:
            # read again, so that no more images than those being drawn are held at full size
            whole = decode_whole(item.path, item.geometry)
            with memory_kept(needed := bytes_to_draw(*item.size), f"it takes {gib(needed)}"):
                drawn = single_heatmap(whole, said.map, state["calibration"], **about)
                save(drawn, out / "heatmaps" / f"{name}.png")  # of a.jpg and of a.png: two files
        except DiskFull:  # no other heat map could be written either, and soon no row
            raise
        except (UserError, MemoryError) as error:
            problem = UserError(str(error) or "the memory is full")
    alarm = None if said.is_anomalous is None else int(said.is_anomalous)
    row = [name, said.score, alarm, threshold, said.nearest_training_image, *(said.peak or (None, None))]
    return row, problem  # None is written as an empty cell


def images_of(place: Path, out: Path, *, submission: bool = False) -> tuple[Path, list[str]]:
    """The folder that paths in the table are relative to, and the images, without heat maps of this or other runs.

    `submission`: they must be of MVTec AD 2's private test sets.
    """
    if os.path.lexists(place) and not place.is_dir():
        return place.parent, [str(place)]
    paths = find_images(place, leave_out=out / "heatmaps")
    if not paths:
        raise UserError(f"there are no images in {place}" if place.is_dir() else f"{place} is not there. {USAGE}")
    if submission:
        check_private(paths)
    return place, paths


def without_broken(
    loaded: Iterator[tuple[str, LoadedImage | UserError]], skipped: list[str], bar: tqdm
) -> Iterator[LoadedImage]:
    """The images that could be read; the others are named on stderr and added to `skipped`."""
    for path, item in loaded:
        if isinstance(item, LoadedImage):
            yield item
        else:
            skipped.append(path)
            say(f"skipped: {' '.join(str(item).split())}")
            bar.update()


def say(line: str) -> None:
    tqdm.write(printable(line), file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
