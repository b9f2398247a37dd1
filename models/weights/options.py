"""Options of a backbone that change what it computes and the shape of no tensor: what a checkpoint says about them.

With a wrong one, weights load without an error and the features are off, by a third for the wrong padding of a CIFAR
stem. Where the checkpoint tells which option it needs, the model must have it.
"""

from torch import Tensor, nn

OPTIONS = ("stem", "bn_eps", "padding", "interpolation")  # attributes of the models that have them
TIMM_V3 = {  # timm's constructors, and converted TensorFlow weights'
    "timm's own weights": {"bn_eps": 1e-5, "padding": "torch"},
    "its tf_ ones": {"bn_eps": 1e-3, "padding": "tensorflow"},
}


def wrong_options(model: nn.Module, checkpoint, tensors: dict[str, Tensor], layout: str | None) -> str | None:
    """What is wrong, and the options to set, if the weights were trained with others than the model's.

    Args:
        checkpoint: what the file holds. tensors: all of them, by the names that `rename` gave them.
        layout: the library whose names they had.
    """
    about, needed = _needed(checkpoint, tensors, layout)
    needed = {whose: options for whose, options in needed.items() if all(hasattr(model, key) for key in options)}
    if not needed or any(_has(model, options) for options in needed.values()):
        return None
    ways = [
        " ".join(f"backbone.{key}={value}" for key, value in options.items()) + whose
        for whose, options in needed.items()
    ]
    return about.format(", or ".join(ways))


def _needed(checkpoint, tensors: dict[str, Tensor], layout: str | None) -> tuple[str, dict[str, dict]]:
    """A message with a place for what to set, and {for which weights: their options}."""
    ours = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if isinstance(ours, dict) and isinstance(backbone := ours.get("backbone"), dict):
        options = {key: backbone[key] for key in OPTIONS if key in backbone}
        return "this run's backbone had other options: set {}", {"": options} if options else {}
    if layout and layout.startswith("timm's MobileNetV3"):
        needed = {f" for {whose}": options for whose, options in TIMM_V3.items()}
        return "timm's MobileNetV3 has another epsilon or padding than torchvision's: set {}", needed
    if layout == "SupContrast's ResNet":
        return "SupContrast's ResNets have the plain CIFAR stem: set {}", {"": {"stem": "cifar"}}
    if _is_solo_learns(checkpoint, tensors):
        return (
            "solo-learn's CIFAR ResNets pad their first convolution by 2: set {}; if another program trained this one, "
            "remove its classifier.* from the file",
            {"": {"stem": "cifar_solo"}},
        )
    return "", {}


def _is_solo_learns(checkpoint: dict, tensors: dict[str, Tensor]) -> bool:
    """Whether it is a ResNet of solo-learn's for CIFAR. All its methods have the online `classifier` beside a backbone
    (`encoder` until 2021); what others have that is not enough, so a checkpoint of Lightning, or SSL's other parts."""
    stems = [tensors[f"{part}.conv1.weight"] for part in ("backbone", "encoder") if f"{part}.conv1.weight" in tensors]
    if "classifier.weight" not in tensors or not any(stem.shape[2:] == (3, 3) for stem in stems):
        return False
    parts = ("projector.", "prototypes.", "momentum_")
    return "pytorch-lightning_version" in checkpoint or any(name.startswith(parts) for name in tensors)


def _has(model: nn.Module, options: dict) -> bool:
    return all(getattr(model, key) == value for key, value in options.items())
