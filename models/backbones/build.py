"""A backbone from its section of the configuration."""

from dataclasses import dataclass, field

from torch import nn

from data.normalize import Normalization, normalization_of
from models.backbones import BACKBONES
from models.backbones.channels import Channel, OneChannel, take_channel
from models.weights.load import load_weights
from runtime.config import build, read
from runtime.errors import UserError
from runtime.schema import choice
from runtime.values import PathText, PositiveFloat, UnitInterval


@dataclass(kw_only=True)
class BackboneConfig:
    """`backbone.*`: these keys, and the keyword-only arguments of the chosen backbone."""

    name: str = choice(BACKBONES)
    weights: PathText | None = None  # a checkpoint: torchvision's, DINO's, MoCo's, ..., or ours; none: random weights
    part: str = "auto"  # which network of a checkpoint that holds several
    mean: tuple[UnitInterval, UnitInterval, UnitInterval] | None = None  # of pixels in [0, 1], which the backbone gets
    # less mean and divided by std; none: its family's, ImageNet's or 0.5 of EfficientNet-Lite
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None  # likewise
    channel: Channel = "all"  # of the images; red, green or blue: that one alone
    one_channel: OneChannel = "copy"  # how one channel reaches a stem of three; not needed with in_channels=1
    options: dict = field(default_factory=dict)


def from_words(text: str, where: str) -> BackboneConfig:
    """The section that a text like `vit_small patch=8 weights=dino.pth` is short for: a name, and keys of `backbone`.

    Raises:
        UserError: a word that is not key=value, or what `where` stands before: a section with a mistake.
    """
    name, *keys = text.split() or [""]
    return build(BackboneConfig, read([f"name={name}", *keys])[-1], f"{where}.")


def refuse_classifier(config: BackboneConfig) -> None:
    """UserError for a backbone that ends in a classifier, whose logits would be mistaken for features."""
    if config.options.get("num_classes"):
        raise UserError(
            f"backbone.num_classes={config.options['num_classes']}: pretraining has no use for a classifier; remove it"
        )


def normalization_from(config: BackboneConfig) -> Normalization:
    """What its images are normalized by: `mean` and `std` as far as they are given, else the family's own."""
    own = normalization_of(BACKBONES[config.name])
    return Normalization(config.mean or own.mean, config.std or own.std)


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
    if (normalization := normalization_from(config)) != normalization_of(backbone):
        backbone.normalization = normalization
    if config.channel != "all":
        take_channel(backbone, config.channel, config.one_channel)
    if config.weights is None:
        return backbone, "random weights"
    return backbone, load_weights(backbone, config.weights, part=config.part)
