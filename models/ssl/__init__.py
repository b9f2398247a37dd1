"""Pretraining methods by name: a new one is a file here, a row below and a YAML."""

from dataclasses import dataclass, field
from typing import Any

from models.ssl.barlow_twins import BarlowTwins
from models.ssl.byol import BYOL
from models.ssl.dino import DINO
from models.ssl.moco_v2 import MoCoV2
from models.ssl.moco_v3 import MoCoV3
from models.ssl.patch_position import PatchPosition
from models.ssl.psco import PsCo
from models.ssl.revd import RevD
from models.ssl.simclr import SimCLR
from models.ssl.simsiam import SimSiam
from models.ssl.supcon import SupCon
from models.ssl.triplet import Triplet
from models.ssl.vicreg import VICReg
from runtime.schema import choice

SSL_METHODS: dict[str, Any] = {  # classes of SSLMethod, each with its own options
    "simclr": SimCLR,
    "dino": DINO,
    "revd": RevD,
    "supcon": SupCon,
    "triplet": Triplet,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "patch_position": PatchPosition,
    "psco": PsCo,
}


@dataclass(kw_only=True)
class MethodConfig:
    name: str = choice(SSL_METHODS)
    options: dict = field(default_factory=dict)
