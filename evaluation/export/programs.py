"""Networks as torch.export traces them: images uint8 (B, 3, H, W) in, a dict of tensors out, for any B.

What a program holds: the normalization, all networks in the run's precision, distances, maps, the temperature and the
probabilities. What stays outside: decoding and resizing of files, padding, the cutting of large images into tiles, and
the comparison with the threshold.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import IO

import torch
from torch import Tensor, nn

from data.geometry import Geometry
from data.normalize import normalization_of, normalize
from evaluation.export.exported import ABOUT, about_file
from losses.supervised import probabilities
from models.anomaly.detector import Detector
from models.classifier import Classifier, WithNovelty
from runtime.errors import UserError, cut
from runtime.precision import PRECISIONS

ONNX = ("onnx", "onnxscript", "onnxruntime")  # packages: its format, torch's converter, what runs it


class BackboneProgram(nn.Module):
    """features (B, D)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.normalization = backbone, normalization_of(backbone)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"features": self.backbone(normalize(pixels, self.normalization)).float()}


class DetectorProgram(nn.Module):
    """scores (B,); of detectors that have them maps (B, H, W), peaks (B, 2) and nearest_image (B,): see Findings."""

    def __init__(self, detector: Detector, precision: str):
        super().__init__()
        detector.prepare_export()
        self.detector, self.precision = detector, precision

    def forward(self, pixels: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        with autocast(self.precision):
            found = self.detector.examine_pixels(pixels, valid)._replace(nearest_positions=None)
        return {name: values for name, values in found._asdict().items() if values is not None}


class ClassifierProgram(nn.Module):
    """logits (B, C), probabilities (B, C) with the temperature, and scores (B,): see Answers."""

    def __init__(self, classifier: Classifier, state: dict):
        super().__init__()
        self.both, self.loss = WithNovelty(classifier, state["bank"]), state["config"]["loss"]["name"]
        self.temperature = state["calibration"]["temperature"] or 1.0
        self.precision = state["config"]["precision"]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        with autocast(self.precision):
            rows = self.both(normalize(pixels, self.both.normalization))  # (B, C + 1)
        logits = rows[:, :-1]  # (B, C)
        return {
            "logits": logits,
            "probabilities": probabilities(logits, self.loss, self.temperature),
            "scores": rows[:, -1],
        }


def autocast(precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def traced(program: nn.Module, geometry: Geometry, *, masked: bool) -> torch.export.ExportedProgram:
    """The program for any number of images of the geometry's size.

    Raises:
        UserError: torch cannot trace it.
    """
    size, batch = (geometry.height, geometry.width), torch.export.Dim("batch", min=1)
    inputs = (torch.zeros(3, 3, *size, dtype=torch.uint8),)
    shapes: dict = {"pixels": {0: batch}}
    if masked:
        inputs, shapes = (*inputs, torch.ones(3, *size, dtype=torch.bool)), shapes | {"valid": {0: batch}}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own tracing
            found = torch.export.export(program.eval(), inputs, dynamic_shapes=shapes, strict=False)
            # into plain operations: no regions with their own autocast, of which torch cannot read empty ones again
            found = found.run_decompositions({})
    except Exception as error:  # torch raises whatever the traced code or its own solver does
        why = cut(" ".join(str(error).split()), 150)
        raise UserError(f"torch.export cannot trace {type(program).__name__} of this run: {why}") from None
    for node in found.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return found


def write(program: torch.export.ExportedProgram, about: dict, file: IO[bytes]) -> None:
    """A file that `load_exported` reads; `about` are the arguments of `about_file`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")  # of weights in channels_last, which are whole
        torch.export.save(program, file, extra_files={ABOUT: about_file(**about)})
    file.flush()


def write_onnx(program: torch.export.ExportedProgram, file: IO[bytes]) -> Callable[..., dict[str, Tensor]]:
    """Write the program as an ONNX model, and return what onnxruntime makes of it.

    Raises:
        UserError: it cannot be converted.
    """
    try:
        model = torch.onnx.export(program, dynamo=True)
        model.save(file.name, external_data=False)
    except Exception as error:  # of whichever operation the converter does not know
        raise UserError(f"torch.onnx cannot convert this program: {cut(' '.join(str(error).split()), 150)}") from None
    names = list(program.call_spec.out_spec.unflatten(range(program.call_spec.out_spec.num_leaves)))
    return lambda *images: dict(zip(names, model(*images)))


def require_onnx() -> None:
    """UserError unless the packages are here that `write_onnx` needs."""
    if missing := [name for name in ONNX if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"format=onnx needs {' and '.join(missing)}, which are no part of requirements.txt: install them "
            f"(pip install {' '.join(ONNX)}), or take format=pt2"
        )
