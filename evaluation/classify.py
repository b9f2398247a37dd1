"""A run's classifier on new images: what predict.py and scavenge.load_classifier have in common.

network, geometry, state = load_classifier_run(folder)
for image, result in classify(network, images, state, device, batch_size=16, precision="fp32", threshold=...):
    print(result.path, result.verdict, result.probability)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data import DataConfig, Geometry, build_geometry
from evaluation.anomaly.prediction import LoadedImage, Precision, is_number
from runtime import checkpoint, config
from runtime.errors import UserError
from runtime.values import coerce

if TYPE_CHECKING:  # exported programs classify where there is no models/
    from models.classifier import Classifier

NONE = "none of these"
OLDER = (
    "trained by an older version, which kept no features of training images to compare new ones with: train it anew, "
    "by the command that began it with resume=never"
)


@dataclass(kw_only=True, eq=False)
class Classified:
    """What a classifier says of one image."""

    path: str  # of the file
    likeliest: str  # of the classes
    probability: float  # that it is this one, with the run's temperature
    probabilities: Tensor = field(repr=False)  # float32 (C,), of all classes
    score: float | None  # how little the image looks like the training images: models.classifier.novelty
    threshold: float | None  # of the score; None: the run has none
    is_unknown: bool | None  # whether the score is above the threshold; None without one

    @property
    def verdict(self) -> str:
        """The likeliest class, or `none of these`."""
        return NONE if self.is_unknown else self.likeliest


def load_classifier_run(path: Path | str, state: dict | None = None) -> tuple["Classifier", Geometry, dict]:
    """The classifier of a run in eval mode on the CPU, how its images become inputs, and the checkpoint's other values.

    Of a run that has not finished, `state["calibration"]` has no temperature and no threshold, and `state["bank"]`,
    which the scores are distances to, is None.

    Args:
        path: a checkpoint, or a run folder, whose last.pt is meant.
        state: what the checkpoint holds, if it has been read.

    Raises:
        UserError: it is no such checkpoint, is older than the score, or was edited.
    """
    from models.classifier import load_trained  # here, for exported programs do without

    network, state = load_trained(path, state)
    file = checkpoint.file_of(path)
    try:
        geometry = build_geometry(config.build(DataConfig, checkpoint.section(state, "data", file), "data."))
        coerce(state["config"].get("precision"), Precision, "precision")
    except UserError as error:
        raise UserError(f"the config in {file}: {error}") from None
    found = {"temperature": None, "threshold": None} | state.get("calibration", {})
    temperature = found["temperature"]
    if not all(map(is_number, (temperature, found["threshold"]))) or (temperature is not None and temperature <= 0):
        raise UserError(f"{file} was edited: its calibration cannot be what was saved; {checkpoint.advice_on(file)}")
    bank, width = state.get("bank"), network.backbone.num_features
    if bank is None and "calibration" in state:  # its threshold is of another score
        raise UserError(f"{file} was {OLDER}")
    if bank is not None and not (
        isinstance(bank, Tensor) and bank.shape[1:] == (width,) and len(bank) and bank.isfinite().all()
    ):
        raise UserError(f"{file} was edited: its bank is no features (M, {width}); {checkpoint.advice_on(file)}")
    return network, geometry, state | {"calibration": found, "bank": bank}


@torch.no_grad()
def classify(
    network: "Classifier",
    loaded: Iterator[LoadedImage],
    state: dict,
    device: torch.device,
    *,
    batch_size: int,
    precision: str,
    threshold: float | None,
) -> Iterator[tuple[LoadedImage, Classified]]:
    """Each image and its `Classified`, on the CPU.

    Args:
        state: of `load_classifier_run`.
        threshold: of the score.

    Raises:
        UserError: logits that are not finite.
    """
    answer = network.answering(state, device, precision)
    while group := list(islice(loaded, batch_size)):
        pixels = torch.stack([item.image for item in group]).to(device)  # (B, 3, H, W)
        logits, found, scores = answer(pixels)
        finite, likeliest = logits.isfinite().all(1).tolist(), logits.argmax(1).tolist()  # (B,) each
        for item, row, likely, score, good in zip(group, found, likeliest, scores.tolist(), finite):
            if not good:
                raise UserError(
                    f"the logits of {item.path} are not finite: use precision=fp32, or the run has diverged"
                )
            yield (
                item,
                Classified(
                    path=item.path,
                    likeliest=state["classes"][likely],
                    probability=float(row[likely]),
                    probabilities=row,
                    score=score if math.isfinite(score) else None,
                    threshold=threshold,
                    is_unknown=None if threshold is None else score > threshold,
                ),
            )
