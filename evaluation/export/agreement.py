"""Whether an exported program says what its run says, image by image: scores, maps and decisions, at any batch size."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data import DataConfig, Geometry, build_dataset, build_geometry
from data.image_files import find_images
from data.splits import evenly
from evaluation.anomaly.prediction import LoadedImage, examine, load_image, load_run, predicted
from evaluation.classify import classify, load_classifier_run
from evaluation.export.exported import Exported
from evaluation.export.programs import BackboneProgram, ClassifierProgram, DetectorProgram
from evaluation.features import stored_sections
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config
from runtime.errors import UserError

TOLERANCE = 1e-4  # of `Agreement.largest`
CPU = torch.device("cpu")


class Answer(NamedTuple):
    """What the run or the program says of one image."""

    path: str
    values: dict[str, Tensor]  # score, map, ...
    verdict: str | None = None  # the decision; None of a backbone
    places: tuple = ()  # the most anomalous pixel and the nearest training image


# (network, images, state with config and calibration, batch size); the network is a run's or an `Exported`
Ask = Callable[[Any, list[LoadedImage], dict, int], list[Answer]]


@dataclass(kw_only=True)
class Subject:
    """A run to export."""

    kind: str
    live: Any  # its detector, classifier or backbone
    state: dict  # of its checkpoint
    program: nn.Module  # what is traced
    kept: dict  # of the state, what an `Exported` needs
    geometry: Geometry  # how files become inputs
    size: Geometry  # of the program's images: with tiles, theirs
    masked: bool  # whether the program takes what is padding
    ask: Ask


def subject_of(path: str | Path, threshold: float | None) -> Subject:
    """The run of a checkpoint.

    Args:
        threshold: of the score; None: the run's own.

    Raises:
        UserError: no such run or an unfinished one, a detector without a threshold, a backbone with one.
    """
    sections = checkpoint.load(path)["config"]
    if "detector" in sections:
        return _detector(path, threshold)
    if "head" in sections:
        return _classifier(path, threshold)
    if threshold is not None:
        raise UserError(f"threshold={threshold:g} is for detectors and classifiers, and {path} is neither: remove it")
    return _backbone(path)


def _detector(path: str | Path, threshold: float | None) -> Subject:
    detector, geometry, state = load_run(Path(path))
    calibration = _with_threshold(state, threshold)
    if calibration["threshold"] is None:
        raise UserError(f"the run in {path} has no threshold, so it decides nothing: give threshold=")
    precision, data = state["config"]["precision"], state["config"]["data"]
    tile = data.get("tile", 0)
    settings = {"precision": precision, "data": {"tile": tile, "overlap": data.get("overlap", 0)}}
    return Subject(
        kind="detector",
        live=detector,
        state=state,
        program=DetectorProgram(detector, precision),
        kept={"config": settings, "calibration": calibration, "names": state["names"], "learned": []},
        geometry=geometry,
        size=geometry.whole((tile, tile)) if tile else geometry,
        masked=tile > 0 or geometry.fit == "pad",
        ask=ask_detector,
    )


def _classifier(path: str | Path, threshold: float | None) -> Subject:
    classifier, geometry, state = load_classifier_run(path)
    settings = {key: state["config"][key] for key in ("precision", "loss")}
    return Subject(
        kind="classifier",
        live=classifier,
        state=state,
        program=ClassifierProgram(classifier, state),
        kept={"config": settings, "calibration": _with_threshold(state, threshold), "classes": state["classes"]},
        geometry=geometry,
        size=geometry,
        masked=False,
        ask=ask_classifier,
    )


def _backbone(path: str | Path) -> Subject:
    sections = stored_sections(path)
    network, _ = build_backbone(config.build(BackboneConfig, sections["backbone"], "backbone."))
    program = BackboneProgram(network.to(memory_format=torch.channels_last).eval())
    geometry = build_geometry(config.build(DataConfig, sections["data"], "data."))
    return Subject(
        kind="backbone",
        live=program,
        state=checkpoint.load(path),
        program=program,
        kept={},
        geometry=geometry,
        size=geometry,
        masked=False,
        ask=ask_backbone,
    )


def _with_threshold(state: dict, threshold: float | None) -> dict:
    """The calibration, of which predict.py reads all but the names of suspicious images; also put into the state."""
    state["calibration"] = {key: value for key, value in state["calibration"].items() if key != "suspicious"}
    if threshold is not None:
        state["calibration"] |= {"threshold": threshold, "per_category": {}}
    return state["calibration"]


def ask_detector(network: Any, images: list[LoadedImage], state: dict, batch_size: int) -> list[Answer]:
    tiles = {key: state["config"]["data"].get(key, 0) for key in ("tile", "overlap")}
    about = {"batch_size": batch_size, "precision": state["config"]["precision"]} | tiles
    answers = []
    for item, found in examine(network, iter(images), CPU, **about):
        said = predicted(item, found, state, state["calibration"]["threshold"])
        values = {"score": found.scores} | ({} if found.maps is None else {"map": found.maps[0]})
        verdict = "anomalous" if said.is_anomalous else "normal"
        answers.append(Answer(item.path, values, verdict, (said.peak, said.nearest_training_image)))
    return answers


def ask_classifier(network: Any, images: list[LoadedImage], state: dict, batch_size: int) -> list[Answer]:
    about = {"precision": state["config"]["precision"], "threshold": state["calibration"]["threshold"]}
    answers = []
    for item, said in classify(network, iter(images), state, CPU, batch_size=batch_size, **about):
        score = {} if said.score is None else {"score": torch.tensor([said.score])}
        answers.append(Answer(item.path, {"probabilities": said.probabilities} | score, said.verdict))
    return answers


@torch.no_grad()
def ask_backbone(network: Any, images: list[LoadedImage], state: dict, batch_size: int) -> list[Answer]:  # noqa: ARG001
    answers = []
    for first in range(0, len(images), batch_size):
        group = images[first : first + batch_size]
        features = network(torch.stack([item.image for item in group]))["features"]  # (B, D)
        answers += [Answer(item.path, {"features": row}) for item, row in zip(group, features)]
    return answers


# -------------------------------------------------------------------- the images


def images_of(subject: Subject, place: str | None, count: int) -> list[LoadedImage]:
    """At most `count` images, spread evenly over those of the run's test set, or of a folder or file.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    whole = subject.size is not subject.geometry
    if place is not None:
        paths = find_images(Path(place)) if Path(place).is_dir() else [place]
        if not paths:
            raise UserError(f"there are no images in {place}")
        items = [load_image(paths[i], subject.geometry, whole=whole)[1] for i in evenly(len(paths), count).tolist()]
        for item in items:
            if isinstance(item, UserError):
                raise item
        return items
    data = config.build(DataConfig, subject.state["config"]["data"], "data.")
    try:
        dataset = build_dataset(data, "test", tiled=True)
    except UserError as error:
        raise UserError(f"the images to compare the program on: {error}; or give images=, a folder") from None
    items = []
    for i in evenly(len(dataset), count).tolist():
        size = tuple(dataset.sizes[i].tolist())
        geometry = dataset.geometry.whole(size) if whole else dataset.geometry
        items.append(
            LoadedImage(dataset.full_name(i), size, geometry, dataset.original(i) if whole else dataset.image(i))
        )
    return items


# -------------------------------------------------------------------- the comparison


@dataclass(kw_only=True)
class Agreement:
    """What was compared, and how well it agrees."""

    largest: dict[str, float]  # by value: the largest difference of an image, as `difference` has it
    decisions: int  # that were compared, all equal: one per image and batch size
    moved: int  # of them, those whose peak or nearest training image is another, as ties may be
    seconds_live: float  # per image, at the largest batch size
    seconds_exported: float


def compare(subject: Subject, exported: Exported, images: list[LoadedImage], batch_sizes: list[int]) -> Agreement:
    """Ask the run at the largest batch size, and the program at each. At the largest they take turns, so that their
    times can be compared on a machine with other work.

    Raises:
        UserError: they do not agree; it names the image.
    """
    *smaller, most = batch_sizes
    asked = (subject.live, subject.state), (exported, exported.state)
    for network, state in asked:  # what is made once is made
        subject.ask(network, images[:most], state, most)
    answers: tuple[list[Answer], list[Answer]] = ([], [])
    seconds = [0.0, 0.0]
    for first in range(0, len(images), most):
        for i, (network, state) in enumerate(asked):
            began = time.perf_counter()
            answers[i].extend(subject.ask(network, images[first : first + most], state, most))
            seconds[i] += time.perf_counter() - began
    live, found = answers
    largest = dict.fromkeys(live[0].values, 0.0)
    typical = {name: torch.stack([answer.values[name].abs().max() for answer in live]).mean() for name in largest}
    moved = agree(live, found, most, typical, largest)
    for batch_size in smaller:
        found = subject.ask(exported, images, exported.state, batch_size)
        moved += agree(live, found, batch_size, typical, largest)
    return Agreement(
        largest=largest,
        decisions=len(images) * len(batch_sizes) if live[0].verdict is not None else 0,
        moved=moved,
        seconds_live=seconds[0] / len(images),
        seconds_exported=seconds[1] / len(images),
    )


def agree(
    live: list[Answer], exported: list[Answer], batch_size: int, typical: dict[str, Tensor], largest: dict[str, float]
) -> int:
    """How many answers have other places; raises `largest` where a difference is larger.

    Raises:
        UserError: they do not agree.
    """
    for then, now in zip(live, exported, strict=True):
        at = f"of {then.path} at batch size {batch_size}"
        for name, value in then.values.items():
            away = difference(value, now.values.get(name, torch.empty(0)), typical[name])
            largest[name] = max(largest[name], away)
            if not away <= TOLERANCE:
                raise UserError(
                    f"the exported program's {name} {at} differs from the run's by {away:.1e} of its size, more than "
                    f"{TOLERANCE:g}: the file is not kept"
                )
        if now.verdict != then.verdict:
            raise UserError(
                f"the exported program's decision {at} is {now.verdict}, the run's {then.verdict}: the file is not kept"
            )
    return sum(then.places != now.places for then, now in zip(live, exported))


def difference(live: Tensor, exported: Tensor, typical: Tensor) -> float:
    """The largest difference of an image's values, as a share of their largest magnitude, or of an image's on average
    where this is larger."""
    if live.shape != exported.shape:
        return float("inf")
    if torch.equal(live, exported):  # as where all are 0
        return 0.0
    return float((live - exported).abs().max() / torch.maximum(live.abs().max(), typical))
