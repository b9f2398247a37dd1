"""Anomaly detectors by name; each file shows one method. A new one is a file, a row here and a YAML."""

from dataclasses import dataclass, field

from models.anomaly.cdo import CDO
from models.anomaly.embedding import Embedding
from models.anomaly.padim import PaDiM
from models.anomaly.patchcore import PatchCore
from models.anomaly.rd4ad import RD4AD
from training.config import choice

DETECTORS = {"cdo": CDO, "embedding": Embedding, "padim": PaDiM, "patchcore": PatchCore, "rd4ad": RD4AD}


@dataclass(kw_only=True)
class DetectorConfig:
    """`detector.*`: the detector's name and its keyword-only arguments."""

    name: str = choice(DETECTORS)
    options: dict = field(default_factory=dict)
