"""Anomaly detectors by name; each file shows one method. A new one is a file, a row here and a YAML."""

from dataclasses import dataclass, field

from torch import nn

from models.anomaly.cdo import CDO
from models.anomaly.cflow import CFlow
from models.anomaly.cutpaste import CutPaste
from models.anomaly.detector import Detector
from models.anomaly.embedding import Embedding
from models.anomaly.nsa import NSA
from models.anomaly.padim import PaDiM
from models.anomaly.patchcore import PatchCore
from models.anomaly.rd4ad import RD4AD
from models.anomaly.regad import RegAD
from models.anomaly.subspace import Subspace
from models.weights.options import wrong_options
from runtime import checkpoint
from runtime.errors import UserError, cut
from runtime.schema import choice
from runtime.text import first_few
from runtime.values import PathText

DETECTORS: dict[str, type[Detector]] = {
    "cdo": CDO,
    "cflow": CFlow,
    "cutpaste": CutPaste,
    "embedding": Embedding,
    "nsa": NSA,
    "padim": PaDiM,
    "patchcore": PatchCore,
    "rd4ad": RD4AD,
    "regad": RegAD,
    "subspace": Subspace,
}


@dataclass(kw_only=True)
class DetectorConfig:
    """`detector.*`: these keys, and the keyword-only arguments of the chosen detector."""

    name: str = choice(DETECTORS)
    weights: PathText | None = None  # last.pt of a run of the same detector, or an official checkpoint
    options: dict = field(default_factory=dict)


def build_detector(config: DetectorConfig, backbone: nn.Module) -> tuple[Detector, str]:
    """The detector with its trained weights loaded, and where they come from, in words.

    Raises:
        UserError: the file cannot be read, is of another detector or does not fit.
    """
    detector = DETECTORS[config.name](backbone, **config.options)
    if config.weights is None:
        return detector, ""
    state = checkpoint.read(config.weights)
    if isinstance(state, dict) and {"config", "model"} <= state.keys():
        settings = state["config"].get("detector") if isinstance(state["config"], dict) else None
        settings = settings if isinstance(settings, dict) else {}
        if (name := settings.get("name")) != config.name:
            of = cut(str(name or "no detector"))
            raise UserError(f"detector.weights={config.weights} is a run of {of}, not {config.name}")
        if fault := wrong_options(backbone, state, {}, None):
            raise UserError(f"detector.weights={config.weights}: {fault}")
        for key in detector.trained_with:
            old = settings.get(key, getattr(detector, key))
            if old != getattr(detector, key):
                raise UserError(
                    f"detector.weights={config.weights} was trained with another {key}: "
                    f"set detector.{key}={cut(str(old).lower())}"
                )
        state = state["model"]
    if not isinstance(state, dict):
        raise UserError(f"detector.weights={config.weights} holds a {type(state).__name__}, not a state_dict")
    unused = detector.load_trained(state, config.weights)
    where = f" from {config.weights}"
    if unused:
        where += f" without {first_few(unused)}, which its code does not use either"
    return detector, where
