"""A backbone from its section of the configuration."""

from dataclasses import dataclass, field

from torch import nn

from models.backbones import BACKBONES
from models.backbones.channels import Channel, OneChannel, take_channel
from models.weights.load import load_weights
from runtime.errors import UserError
from runtime.schema import choice
from runtime.values import PathText


@dataclass(kw_only=True)
class BackboneConfig:
    """`backbone.*`: these keys, and the keyword-only arguments of the chosen backbone."""

    name: str = choice(BACKBONES)
    weights: PathText | None = None  # a checkpoint: torchvision's, DINO's, MoCo's, ..., or ours; none: random weights
    part: str = "auto"  # which network of a checkpoint that holds several
    channel: Channel = "all"  # of the images; red, green or blue: that one alone
    one_channel: OneChannel = "copy"  # how one channel reaches a stem of three; not needed with in_channels=1
    options: dict = field(default_factory=dict)


def refuse_classifier(config: BackboneConfig) -> None:
    """UserError for a backbone that ends in a classifier, whose logits would be mistaken for features."""
    if config.options.get("num_classes"):
        raise UserError(
            f"backbone.num_classes={config.options['num_classes']}: pretraining has no use for a classifier; remove it"
        )


def build_backbone(config: BackboneConfig) -> tuple[nn.Module, str]:
    """The backbone with its weights loaded, and one line on where they come from.

    Raises:
        UserError: a stem whose channels do not match the images, or weights that do not fit.
    """
    stem = config.options.get("in_channels", 3)
    if stem not in ((3,) if config.channel == "all" else (1, 3)):
        raise UserError(
            f"backbone.in_channels={stem}, but images have three channels: set it to 3, "
            "or choose one of them with backbone.channel=green and backbone.in_channels=1 or 3"
        )
    if config.channel == "all" and config.one_channel != "copy":
        raise UserError(f"backbone.one_channel={config.one_channel} needs backbone.channel=red, green or blue")
    backbone = BACKBONES[config.name](**config.options)
    if config.channel != "all":
        take_channel(backbone, config.channel, config.one_channel)
    if config.weights is None:
        return backbone, "random weights"
    return backbone, load_weights(backbone, config.weights, part=config.part)
