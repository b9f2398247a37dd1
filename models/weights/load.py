"""Load a backbone's weights from other people's checkpoints and from ours, and report what was used and left over.

A checkpoint is a state_dict, plain or under "model", "state_dict" or "model_state_dict", or has one for each network,
as DINO's has. Names lose DataParallel's `module.` and torch.compile's `_orig_mod.`; models/weights/names.py turns those
of other libraries into ours, and `PARTS` says where among them the backbone is.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backbones import BACKBONES
from models.backbones.convnext import ConvNeXt
from models.backbones.efficientnet import EfficientNet
from models.backbones.mobilenet import MobileNetV2
from models.backbones.mobilenet_v3 import MobileNetV3
from models.backbones.resnet import ResNet
from models.backbones.vit import ViT, resample
from models.backbones.vit_moco import ViTMoCo, sine_positions
from models.weights.names import rename
from models.weights.options import wrong_options
from models.weights.sources import open_weights, tensors_of
from runtime.errors import UserError, cut
from runtime.integrity import is_finite
from runtime.text import first_few

# part: what its backbone's names start with. part=auto takes the one that the file names under "part", as ours do, else
# the first of these that it has.
PARTS = {
    "target": "target.backbone.",  # ours, the moving average
    "online": "online.backbone.",  # ours, the trained network
    "teacher": "teacher.backbone.",  # DINO and DINOv2, likewise
    "student": "student.backbone.",
    "encoder_q": "encoder_q.",  # MoCo v1 and v2: the trained encoder,
    "encoder_k": "encoder_k.",  # and the one that makes the keys
    "base_encoder": "base_encoder.",  # MoCo v3: the trained encoder
    "teacher_backbone": "teacher_backbone.",  # lightly's DINO
    "student_backbone": "student_backbone.",
    "backbone": "backbone.",  # our detectors; SimCLR, Barlow Twins, VICReg, solo-learn, lightly
    "momentum_backbone": "momentum_backbone.",
    "backbone_momentum": "backbone_momentum.",  # lightly's MoCo and BYOL
    "encoder": "encoder.",  # SimSiam, SupContrast, solo-learn until 2021
    "momentum_encoder": "momentum_encoder.",  # MoCo v3, solo-learn until 2021
    "plain": "",  # torchvision, timm, SwAV; the released networks of DINO, DINOv2, Barlow Twins and VICReg
}
# What may follow a backbone inside its part
HEADS = ("fc", "classifier", "head", "projector", "projection_head", "predictor", "prototypes", "mask_token")


def load_weights(model: nn.Module, path: str | Path, *, part: str = "auto") -> str:
    """Copy one part of the checkpoint at `path` into `model`, a backbone, and return a report of one line.

    `path` is a file of torch.save or, if that package is installed, of safetensors; or the name of torchvision's
    weights for this backbone, IMAGENET1K_V1 for one, which torchvision downloads.

    Every parameter and buffer of the model must be in the file, except `num_batches_tracked` and modules that the
    model's `may_lack` names. Shapes must be the model's, except for axes of length 1 and for what is
    resized: the stem's input channels, from three to any number, and a ViT's position embedding. Options that no shape
    reveals must be those that the file was trained with, if it tells them (models/weights/options.py). The file may
    have more: anything outside the part, and inside it the `HEADS` that the model lacks. The report names it, the
    library whose names were translated, and when the file has several parts, the rule by which one was taken. After an
    error the model is as before.

    Raises:
        UserError: the file cannot be read, holds more than tensors and plain values (nothing in it is run), lacks the
            part, does not fit the model or has NaN; the message names up to three tensors at fault and what to try.
    """
    checkpoint = open_weights(model, path)
    tensors = tensors_of(checkpoint, path)
    renamed, layout = rename(tensors)
    original = {new: old for old, new in renamed.items()}
    tensors = {renamed[name]: tensor for name, tensor in tensors.items()}
    kept = checkpoint.get("part")  # ours say which of their networks counts
    ours = "version" in checkpoint and isinstance(checkpoint.get("config"), dict)
    part, choice = _choose(part, tensors, path, kept if isinstance(kept, str) else None)
    prefix = PARTS[part]
    translated = f" with the names of {layout}" if layout else ""
    wanted = model.state_dict()
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    fault = _other_heads(type(model), inside.get("pos_embed")) or wrong_options(model, checkpoint, tensors, layout)
    if fault:
        raise UserError(f"{path}{choice}: {fault}")
    given, resized = {}, []
    for name, tensor in inside.items():
        given[name], changed = _resize(model, name, tensor, wanted.get(name))
        resized += [f"{name} {list(tensor.shape)} to {list(given[name].shape)}"] if changed else []
    fresh = [name for name in wanted if name not in given and _may_lack(model, name, given)]

    faults = {
        name: f"{name} is {_form(given[name])} in the file, {_form(tensor)} in the model"
        for name, tensor in wanted.items()
        if name in given and not _fits(given[name], tensor, exactly=ours)
    }
    faults |= {
        name: f"{name} is missing"
        for name in wanted
        if name not in given and not _is_counter(name) and name not in fresh
    }
    faults |= {name: f"{name} is unknown" for name in given if name not in wanted and not _is_head(name)}
    if not faults:
        bad = [name for name in wanted if name in given and (given[name].is_meta or not is_finite(given[name]))]
        faults = {name: f"{name} has values that are NaN, infinite or not there" for name in bad}
    if faults:
        if all(_is_head(name) for name in faults):
            advice = "build the model without a classifier (num_classes=0)"
        else:
            advice = _identify(inside) or "try another backbone.name, stem, width, channel or part"
        shortened = [" ".join(cut(fault, 110).split()) for fault in faults.values()]
        raise UserError(
            f"{path}{choice}{translated} does not fit {type(model).__name__}: "
            f"{first_few(shortened, separator='; ')}; {advice}"
        )
    model.load_state_dict({name: given.get(name, tensor) for name, tensor in wanted.items()})

    used = {prefix + name for name in wanted if name in given}
    report = f"{Path(path).name}: {len(used)} tensors loaded{choice}{translated}"
    report += f"; resized: {', '.join(resized)}" if resized else ""
    report += f"; not in the file: {_summary(fresh, '')}" if fresh else ""
    left = _summary([original[name] for name in tensors if name not in used], prefix)
    return report + (f"; left over: {left}" if left else "")


def _resize(model: nn.Module, name: str, given: Tensor, wanted: Tensor | None) -> tuple[Tensor, bool]:
    """The tensor in the model's shape if it can have it, and whether its values changed for that.

    A 1x1 convolution's weights and a linear layer's are the same; so are factors with and without axes of length 1.
    Of a stem's three input channels the sum makes one, which sees g as the three see (g, g, g); more than one are the
    three, repeated, times 3 / channels (timm's rule). Positions of patches alone get zeros for the class token.
    """
    if name == "pos_embed" and given is not (padded := _with_class(given)):
        return _resize(model, name, padded, wanted)[0], True
    if wanted is None or given.shape == wanted.shape or not given.is_floating_point():
        return given, False
    if [n for n in given.shape if n > 1] == [n for n in wanted.shape if n > 1]:
        return given.reshape(wanted.shape), False
    if given.ndim == wanted.ndim == 4 and given.shape[1] == 3 and given[:, 0].shape == wanted[:, 0].shape:
        channels = wanted.shape[1]
        if channels == 1:
            return given.sum(dim=1, keepdim=True), True
        return given.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * 3 / channels, True  # (out, channels, k, k)
    sides = [(t.shape[1] - 1) ** 0.5 if t.ndim == 3 and t.shape[1] > 1 else 0.5 for t in (given, wanted)]
    if isinstance(model, ViT) and name == "pos_embed" and all(side % 1 == 0 for side in sides):
        return resample(given, int(sides[1]), int(sides[1]), model.interpolation), True
    return given, False


def _with_class(positions: Tensor) -> Tensor:
    """A ViT's positions with the class token's: zeros before (1, side^2, D), for timm adds it to the token itself."""
    if positions.ndim != 3 or not positions.shape[1] or positions.shape[1] ** 0.5 % 1:
        return positions
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)  # (1, 1 + side^2, D)


def _other_heads(model: type[nn.Module], positions: Tensor | None) -> str | None:
    """What is wrong if one is MoCo v3's ViT-S, of 12 heads, and the other not: names and shapes are the same. It has
    sine positions, and zeros for the class token, which otherwise learns its own."""
    if not issubclass(model, ViT) or model.width != 384 or positions is None or not positions.is_floating_point():
        return None
    if positions.ndim != 3 or positions.shape[1] < 2 or positions.shape[2] != 384:
        return None
    if issubclass(model, ViTMoCo):
        learned = "its positions are learned, not MoCo v3's, so it has 6 heads, not 12; set backbone.name=vit_small"
        return learned if positions[:, 0].any() else None
    fixed = sine_positions(round((positions.shape[1] - 1) ** 0.5), 384)
    if positions.shape == fixed.shape and torch.allclose(positions.float(), fixed, atol=1e-2):
        return "its positions are MoCo v3's sines, so it has 12 heads, not 6; set backbone.name=vit_moco_small"
    return None


def _may_lack(model: nn.Module, name: str, given: dict[str, Tensor]) -> bool:
    """Whether the tensor belongs to a module that may be absent from a file, and is, as a whole."""
    modules = [f"{module}." for module in getattr(model, "may_lack", ()) if name.startswith(f"{module}.")]
    return any(not any(other.startswith(module) for other in given) for module in modules)


def _choose(part: str, tensors: dict[str, Tensor], path: str | Path, kept: str | None) -> tuple[str, str]:
    """The part to load, and the choice in words; `kept` is the part that the file itself names."""
    there = [p for p, prefix in PARTS.items() if prefix and any(name.startswith(prefix) for name in tensors)]
    there = sorted(there, key=lambda p: p != kept) or ["plain"]  # the one that the file names comes first
    if part not in ("auto", *there):
        raise UserError(f"{path} has no part {part!r}; it has: {', '.join(there)}")
    if part != "auto" and len(there) > 1:
        return part, f" from part {part}, as asked"
    if len(there) > 1:
        return there[0], f" from part {there[0]} (auto prefers it to {', '.join(there[1:])})"
    return there[0], "" if there == ["plain"] else f" from part {there[0]}"


def _identify(given: dict[str, Tensor]) -> str | None:
    """The backbone that these tensors are the weights of, as advice to the user."""
    if "pos_embed" in given:
        given = given | {"pos_embed": _with_class(given["pos_embed"])}
    for name, build in BACKBONES.items():
        if _other_heads(build, given.get("pos_embed")):
            continue
        for options in _options(build, given):
            with torch.device("meta"):
                wanted = build(**options).state_dict()
            body = {n: tensor for n, tensor in given.items() if not _is_counter(n) and (n in wanted or not _is_head(n))}
            if body.keys() == {n for n in wanted if not _is_counter(n)} and all(
                [k for k in body[n].shape if k > 1] == [k for k in wanted[n].shape if k > 1] for n in body
            ):
                return "it fits " + " ".join(
                    f"backbone.{key}={value}" for key, value in ({"name": name} | options).items()
                )
    return None


def _options(build: type[nn.Module], given: dict[str, Tensor]) -> Iterator[dict]:
    """Arguments with which the backbone may fit the tensors."""
    if issubclass(build, ResNet):
        yield from ({"stem": "imagenet"}, {"stem": "cifar"})
    elif issubclass(build, MobileNetV2 | MobileNetV3):
        yield {"width": 1.0}
    elif issubclass(build, EfficientNet):
        yield {}
    elif issubclass(build, ConvNeXt) and "stem.0.weight" in given:
        yield {"patch": given["stem.0.weight"].shape[-1]}
    elif issubclass(build, ViT) and "patch_embed.proj.weight" in given and "pos_embed" in given:
        if given["pos_embed"].ndim != 3 or given["pos_embed"].shape[1] < 2:
            return
        patch = given["patch_embed.proj.weight"].shape[-1]
        options = {"patch": patch, "size": round((given["pos_embed"].shape[1] - 1) ** 0.5) * patch}
        options |= {"layer_scale": 1e-5} if "blocks.0.ls1.gamma" in given else {}
        options |= {"registers": given["register_tokens"].shape[1]} if "register_tokens" in given else {}
        yield options


def _fits(given: Tensor, wanted: Tensor, *, exactly: bool) -> bool:
    """Whether shape and type are the model's; other people's floats may be of another precision."""
    same = given.dtype == wanted.dtype if exactly else given.is_floating_point() == wanted.is_floating_point()
    return same and given.shape == wanted.shape


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # absent from files older than PyTorch 0.4.1; no output depends on it


def _is_head(name: str) -> bool:
    return name.split(".")[0] in HEADS and not name.startswith("head.norm.")  # ConvNeXt's own


def _summary(names: list[str], prefix: str) -> str:
    """Up to four names, or the modules they belong to, with the number of tensors in each."""
    if len(names) <= 4:
        return ", ".join(names)
    modules: dict[str, list[str]] = {}
    for name in names:
        depth = prefix.count(".") + name.startswith(prefix)  # `target.head`, but `target.backbone.fc`
        modules.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return ", ".join(f"{m} ({len(inside)} tensors)" if len(inside) > 1 else inside[0] for m, inside in modules.items())
