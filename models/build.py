"""A backbone from its section of the configuration."""

from dataclasses import dataclass, field

from torch import nn

from models import BACKBONES
from models.weights import load_weights
from training.config import choice


@dataclass(kw_only=True)
class BackboneConfig:
    """`backbone.*`: these keys, and the keyword-only arguments of the chosen backbone."""

    name: str = choice(BACKBONES)
    weights: str | None = None  # a checkpoint: torchvision's, DINO's, MoCo's, ..., or one of ours; none: random weights
    part: str = "auto"  # which network of a checkpoint that holds several
    options: dict = field(default_factory=dict)


def build_backbone(config: BackboneConfig) -> tuple[nn.Module, str]:
    """The backbone with its weights loaded, and one line on where they come from."""
    backbone = BACKBONES[config.name](**config.options)
    if config.weights is None:
        return backbone, "random weights"
    return backbone, load_weights(backbone, config.weights, part=config.part)
