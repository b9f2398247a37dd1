"""A run's detector on new images: what predict.py and scavenge.load_detector have in common.

    detector, geometry, state = load_run(folder)
    for image, found in examine(detector, images, device, batch_size=16, precision="fp32"):
        prediction = predicted(image, found, state, threshold)

Images are examined in the size of the input; a `Prediction` is in the pixels of the original.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from data import DataConfig, Geometry, build_geometry
from data.batches import Findings
from data.geometry import as_geometry
from data.images import decode, image_size
from data.opening import REMEDY
from evaluation.anomaly.tiling import examine_tiles
from runtime import checkpoint, config
from runtime.errors import UserError
from runtime.precision import PRECISIONS
from runtime.text import first_few
from runtime.values import coerce

if TYPE_CHECKING:  # exported programs are examined where there is no models/
    from models.anomaly.detector import Detector

Precision = Literal["fp32", "bf16", "fp16"]


class LoadedImage(NamedTuple):
    path: str  # or what else it is called
    size: tuple[int, int]  # height and width of the original
    geometry: Geometry  # how it became the image
    image: Tensor  # uint8 (3, H, W)


@dataclass(kw_only=True, eq=False)
class Prediction:
    """What a detector says of one image; h and w are the original's height and width."""

    path: str  # of the file
    score: float  # how anomalous it is
    threshold: float | None  # of the score; None: the run has none
    is_anomalous: bool | None  # whether the score is above the threshold; None without one
    p_value: float | None  # `p_value` by the run's normal images; None: the run has none to spare, or does not say
    map: Tensor | None = field(repr=False)  # float32 (h, w), how anomalous each pixel is; None: the detector has no map
    peak: tuple[int, int] | None  # y, x of the most anomalous pixel; None: the detector names none
    nearest_training_image: str | None  # its path below data.root; None: the detector remembers none


def load_run(folder: Path, category: str | None = None, state: dict | None = None) -> tuple["Detector", Geometry, dict]:
    """The detector of a run folder in eval mode on the CPU, how its images become inputs, and the checkpoint's other
    values. `category`: of a run of several the one that the images are of, whose thresholds and normal images count.
    `state`: what the checkpoint holds, if it has been read.

    Raises:
        UserError: there is no finished run of train_anomaly.py, or it has no such category.
    """
    from models.anomaly import DETECTORS, DetectorConfig  # here, for exported programs do without
    from models.backbones.build import BackboneConfig, build_backbone

    file = checkpoint.file_of(folder)
    if not file.exists():
        raise UserError(f"{folder} has no {checkpoint.LAST}: name the folder of a finished run of train_anomaly.py")
    state = state or checkpoint.load(file)
    if "detector" not in state["config"]:
        raise UserError(f"{folder} holds a run without a detector: name a run folder of train_anomaly.py")
    if "calibration" not in state:
        raise UserError(f"the run in {folder} has not finished: the command that began it resumes it")
    sections = {name: checkpoint.section(state, name, file) for name in ("backbone", "detector", "data")}
    try:
        backbone = config.build(BackboneConfig, sections["backbone"] | {"weights": None}, "backbone.")  # all in "model"
        settings = config.build(DetectorConfig, sections["detector"], "detector.")
        geometry = build_geometry(config.build(DataConfig, sections["data"], "data."))
        coerce(state["config"].get("precision"), Precision, "precision")
        detector = DETECTORS[settings.name](build_backbone(backbone)[0], **settings.options)
    except UserError as error:
        raise UserError(f"the config in {file}: {error}") from None
    require_calibration(state, file)
    state["calibration"] = calibration_of(state, category, folder)
    detector.to(memory_format=torch.channels_last).eval()
    detector.load_fitted(state.pop("model", None), file, (geometry.height, geometry.width))
    return detector, geometry, state


def calibration_of(state: dict, category: str | None, folder: Path) -> dict:
    """The thresholds and normal images that count: of all, or of a category of several."""
    each = state["calibration"].get("per_category", {})
    if category is None:
        return state["calibration"]
    if category not in each:
        there = f"of {first_few(each, 8)}" if each else "of one category, which needs no name"
        raise UserError(f"category={category} has no thresholds in {folder}, a run {there}")
    return each[category]


def require_calibration(state: dict, path: Path) -> None:
    """UserError unless the checkpoint has the values of `calibrate` that a prediction needs, and the images' names."""
    wrong, each = [], state["calibration"].get("per_category", {})
    for values in (state["calibration"], *(each.values() if isinstance(each, dict) else [{}])):
        wrong += [key for key in ("threshold", "pixel_threshold", "low", "high") if not is_number(values.get(key, ""))]
        normals = values.get("scores")
        if normals is not None and not (isinstance(normals, list) and normals and all(map(is_number, normals))):
            wrong.append("scores")
    if wrong or any(number >= len(state.get("names", ())) for number in state.get("learned", (0,))):
        what = f"calibration.{wrong[0]}" if wrong else "names"
        raise UserError(f"{path} was edited: {what} is missing or cannot be what was saved; run train_anomaly.py again")


def is_number(value) -> bool:
    """A number, or None for one that is not known."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def load_image(path: str, geometry: Geometry, *, whole: bool = False) -> tuple[str, LoadedImage | UserError]:
    """A path and its image fitted into the input, or `whole`, as large as it is; of a broken one the error."""
    try:
        size = image_size(path)
        geometry = geometry.whole(size) if whole else geometry
        return path, LoadedImage(path, size, geometry, decode(path, geometry))
    except UserError as error:
        return path, UserError(str(error).removesuffix(REMEDY))  # there is no data.on_error here


def decode_whole(path: str, geometry: int | Geometry = 1) -> Tensor:
    """The upright image with all its pixels, uint8 (3, h, w), black and white as the geometry has them; errors as
    data.images.decode."""
    return decode(path, as_geometry(geometry).whole(image_size(path)))


def examine(
    detector: "Detector",
    loaded: Iterator[LoadedImage],
    device: torch.device,
    *,
    batch_size: int,
    precision: str,
    tile: int = 0,
    overlap: int = 0,
) -> Iterator[tuple[LoadedImage, Findings]]:
    """Each image and its `Findings` (of 1), on the CPU. Without tiles all inputs are of one size, with them each image
    is a batch of its own."""
    dtype = PRECISIONS[precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    while group := list(islice(loaded, 1 if tile else batch_size)):
        with torch.inference_mode(), autocast:
            if tile:
                size = {"tile": tile, "overlap": overlap, "batch_size": batch_size}
                found = examine_tiles(detector, group[0].image, **size, device=device)
            else:
                valid = group[0].geometry.inside(torch.tensor([item.size for item in group]), device)
                batch = torch.stack([p.image for p in group]).to(device)  # (B, 3, H, W)
                found = detector.examine_pixels(batch, valid)
                found = Findings(*(None if values is None else values.cpu() for values in found))
        for i, item in enumerate(group):
            yield item, Findings(*(None if values is None else values[i : i + 1] for values in found))


def predicted(item: LoadedImage, found: Findings, state: dict, threshold: float | None) -> Prediction:
    """The `Prediction` of an image from its `Findings` (of 1) and the values of `load_run`.

    Raises:
        UserError: the score is not finite.
    """
    path, size, geometry, _ = item
    score, names, normals = float(found.scores), state["names"], state["calibration"].get("scores")
    if not math.isfinite(score):
        raise UserError(f"the score of {path} is {score}: use precision=fp32; if it is, the run has diverged")
    peak = None
    if found.peaks is not None:
        point = geometry.to_original_point(found.peaks, torch.tensor([size]))[0].tolist()
        peak = tuple(min(max(int(p), 0), side - 1) for p, side in zip(point, size))  # a patch may stick out
    return Prediction(
        path=path,
        score=score,
        threshold=threshold,
        is_anomalous=None if threshold is None else score > threshold,
        p_value=None if normals is None else p_value(score, normals),
        map=None if found.maps is None else geometry.to_original(found.maps[0], size),
        peak=peak,
        nearest_training_image=None if found.nearest_image is None else names[int(found.nearest_image)],
    )


def p_value(score: float, normals: list[float]) -> float:
    """How likely a normal image scores at least as high, by n normal images that the detector was not fitted on.

    The conformal p-value (Vovk et al. 2005): (1 + how many of them do) / (n + 1), never below 1 / (n + 1). It is at
    most a with probability a at most for a new normal image, under the conditions of `thresholds.normal_threshold`.
    """
    return (1 + sum(normal >= score for normal in normals)) / (len(normals) + 1)


def ahead(function: Callable, items: Iterable, pool: Executor, count: int) -> Iterator:
    """function(item) of each item, in order, by the pool's threads; at most `count` results wait at a time."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
