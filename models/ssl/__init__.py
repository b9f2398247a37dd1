"""Pretraining methods by name: a new one is a file here, a row below and a YAML."""

from dataclasses import dataclass, field

from models.ssl.dino import DINO
from models.ssl.revd import RevD
from models.ssl.simclr import SimCLR
from models.ssl.supcon import SupCon
from training.config import choice

SSL_METHODS = {
    "simclr": SimCLR,
    "dino": DINO,
    "revd": RevD,
    "supcon": SupCon,
}


@dataclass(kw_only=True)
class MethodConfig:
    name: str = choice(SSL_METHODS)
    options: dict = field(default_factory=dict)
