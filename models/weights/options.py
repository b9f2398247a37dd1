"""Options of a backbone that change what it computes and the shape of no tensor: what a checkpoint says about them.

With a wrong one, weights load without an error and the features are off, by a third for the wrong padding of a CIFAR
stem. Where the checkpoint tells which option it needs, the model must have it.
"""

from torch import Tensor, nn

from data.normalize import Normalization, normalization_of
from models.backbones import BACKBONES

OPTIONS = ("stem", "bn_eps", "padding", "interpolation")  # attributes of the models that have them
TIMM = {  # its constructors, and converted TensorFlow weights'
    "timm's own weights": {"bn_eps": 1e-5, "padding": "torch"},
    "its tf_ ones": {"bn_eps": 1e-3, "padding": "tensorflow"},
}


def wrong_options(model: nn.Module, checkpoint, tensors: dict[str, Tensor], layout: str | None) -> str | None:
    """What is wrong, and the options to set, if the weights were trained with others than the model's.

    Args:
        checkpoint: what the file holds. tensors: all of them, by the names that `rename` gave them.
        layout: the library whose names they had.
    """
    about, needed = _needed(model, checkpoint, tensors, layout)
    needed = {whose: options for whose, options in needed.items() if _knows(model, options)}
    if not needed or any(_has(model, options) for options in needed.values()):
        return None
    ways = [" ".join(_setting(*option) for option in options.items()) + whose for whose, options in needed.items()]
    return about.format(", or ".join(ways))


def _needed(
    model: nn.Module, checkpoint, tensors: dict[str, Tensor], layout: str | None
) -> tuple[str, dict[str, dict]]:
    """A message with a place for what to set, and {for which weights: their options}."""
    ours = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if isinstance(ours, dict) and isinstance(backbone := ours.get("backbone"), dict):
        options = {key: backbone[key] for key in OPTIONS if key in backbone}
        options |= _normalization(model, backbone)
        return "this run's backbone had other options: set {}", {"": options} if options else {}
    if layout and layout.startswith("timm's EfficientNet") and _counted_nothing(tensors):
        return (
            "its BatchNorms have counted no batch, so it was converted from TensorFlow (timm's tf_): set {}; "
            "if it was not, remove num_batches_tracked from the file",
            {"": TIMM["its tf_ ones"]},
        )
    if layout and layout.startswith(("timm's MobileNetV3", "timm's EfficientNet")):
        needed = {f" for {whose}": options for whose, options in TIMM.items()}
        return f"{layout} has another epsilon or padding than torchvision's: set {{}}", needed
    if layout == "SupContrast's ResNet":
        return "SupContrast's ResNets have the plain CIFAR stem: set {}", {"": {"stem": "cifar"}}
    if _is_solo_learns(checkpoint, tensors):
        return (
            "solo-learn's CIFAR ResNets pad their first convolution by 2: set {}; if another program trained this one, "
            "remove its classifier.* from the file",
            {"": {"stem": "cifar_solo"}},
        )
    return "", {}


def _counted_nothing(tensors: dict[str, Tensor]) -> bool:
    """Whether torch has not trained these BatchNorms, of which it counts the batches."""
    counts = [tensor for name, tensor in tensors.items() if name.endswith("num_batches_tracked")]
    return len(counts) > 0 and not any(count.any() for count in counts)


def _is_solo_learns(checkpoint: dict, tensors: dict[str, Tensor]) -> bool:
    """Whether it is a ResNet of solo-learn's for CIFAR. All its methods have the online `classifier` beside a backbone
    (`encoder` until 2021); what others have that is not enough, so a checkpoint of Lightning, or SSL's other parts."""
    stems = [tensors[f"{part}.conv1.weight"] for part in ("backbone", "encoder") if f"{part}.conv1.weight" in tensors]
    if "classifier.weight" not in tensors or not any(stem.shape[2:] == (3, 3) for stem in stems):
        return False
    parts = ("projector.", "prototypes.", "momentum_")
    return "pytorch-lightning_version" in checkpoint or any(name.startswith(parts) for name in tensors)


def _normalization(model: nn.Module, backbone: dict) -> dict:
    """What the model has not of the mean and deviation that a run's backbone had, given or its family's.

    Of another family's run nothing: it does not fit anyway.
    """
    name, missing = backbone.get("name"), {}
    if not isinstance(name, str) or BACKBONES.get(name) is not type(model):
        return missing
    for key, own in normalization_of(type(model))._asdict().items():
        given = backbone.get(key)
        had = tuple(given) if isinstance(given, list | tuple) else own
        if had != getattr(normalization_of(model), key):
            missing[key] = had
    return missing


def _knows(model: nn.Module, options: dict) -> bool:
    return all(hasattr(model, key) or key in Normalization._fields for key in options)


def _has(model: nn.Module, options: dict) -> bool:
    return all(getattr(model, key, None) == value for key, value in options.items())


def _setting(key: str, value) -> str:
    return f"backbone.{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
