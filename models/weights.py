"""Load a backbone's weights from other people's checkpoints and from ours, and say what was used and what was left.

A checkpoint is a state_dict, plain or under "model" or "state_dict", or has one for each network, as DINO's has. Names
lose DataParallel's `module.` and torch.compile's `_orig_mod.`; `PARTS` says where among them the backbone is.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from models import BACKBONES
from models.resnet import ResNet
from training.checkpoint import read
from training.errors import UserError

# part: what its backbone's names start with. part=auto takes the one that the file names under "part", as ours do, else
# the first of these that it has.
PARTS = {
    "target": "target.backbone.",  # ours, the moving average
    "online": "online.backbone.",  # ours, the trained network
    "teacher": "teacher.backbone.",  # DINO, likewise
    "student": "student.backbone.",
    "encoder_q": "encoder_q.",  # MoCo v1 and v2: the trained encoder,
    "encoder_k": "encoder_k.",  # and the one that makes the keys
    "base_encoder": "base_encoder.",  # MoCo v3, likewise
    "momentum_encoder": "momentum_encoder.",
    "backbone": "backbone.",  # our detectors; SimCLR, Barlow Twins, VICReg, solo-learn
    "momentum_backbone": "momentum_backbone.",
    "encoder": "encoder.",  # SimSiam, SupContrast
    "plain": "",  # torchvision, timm, SwAV; the released ResNet-50 of DINO, Barlow Twins and VICReg
}
# What may follow a backbone inside its part
HEADS = ("fc", "classifier", "head", "projector", "projection_head", "predictor", "prototypes")


def load_weights(model: nn.Module, path: str | Path, *, part: str = "auto") -> str:
    """Copy one part of the checkpoint at `path` into `model`, a backbone, and return a report of one line.

    Every parameter and buffer of the model must be in the file, in its shape; only `num_batches_tracked` need not be.
    The file may have more: anything outside the part, and inside it the `HEADS` that the model lacks. The report names
    it, and when the file has several parts, the rule by which one was taken. After an error the model is as before.

    Raises:
        UserError: the file cannot be read, holds more than tensors and plain values (nothing in it is run), lacks the
            part, or does not fit the model; the message names up to three tensors at fault and what to try.
    """
    checkpoint = read(path)
    tensors = _tensors(checkpoint, path)
    kept = checkpoint.get("part")  # ours say which of their networks counts
    part, choice = _choose(part, tensors, path, kept if isinstance(kept, str) else None)
    prefix = PARTS[part]
    given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    wanted = model.state_dict()

    faults = {
        name: f"{name} is {_form(given[name])} in the file, {_form(tensor)} in the model"
        for name, tensor in wanted.items()
        if name in given and not _fits(given[name], tensor)
    }
    faults |= {name: f"{name} is missing" for name in wanted if name not in given and not _is_counter(name)}
    faults |= {name: f"{name} is unknown" for name in given if name not in wanted and not _is_head(name)}
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        if all(_is_head(name) for name in faults):
            advice = "build the model without a classifier (num_classes=0)"
        else:
            advice = _identify(given) or "try another backbone.name, stem, width or part"
        raise UserError(
            f"{path}{choice} does not fit {type(model).__name__}: "
            f"{'; '.join(list(faults.values())[:3])}{more}; {advice}"
        )
    model.load_state_dict({name: given.get(name, tensor) for name, tensor in wanted.items()})

    used = {prefix + name for name in wanted if name in given}
    left = _summary([name for name in tensors if name not in used], prefix)
    return f"{Path(path).name}: {len(used)} tensors loaded{choice}" + (f"; left over: {left}" if left else "")


def _tensors(checkpoint, path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of a checkpoint, nested one level at most; counters, optimizer states and the like are ignored."""
    tensors = {}
    for key, value in checkpoint.items() if isinstance(checkpoint, dict) else ():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        for name, entry in entries.items():
            if isinstance(entry, Tensor):
                name = re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", str(name))
                tensors[re.sub(r"^((model|state_dict)\.)+", "", name)] = entry
    if not tensors:
        keys = f" with the keys {', '.join(map(str, list(checkpoint)[:5]))}" if isinstance(checkpoint, dict) else ""
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__}{keys} and no state_dict; "
            'save one with torch.save, plain or under "model" or "state_dict"'
        )
    return tensors


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
    body = {name: tensor for name, tensor in given.items() if not _is_head(name) and not _is_counter(name)}
    for name, build in BACKBONES.items():
        for options in ({"stem": "imagenet"}, {"stem": "cifar"}) if issubclass(build, ResNet) else ({"width": 1.0},):
            with torch.device("meta"):
                state = build(**options).state_dict()
            wanted = {n: tensor for n, tensor in state.items() if not _is_counter(n)}
            if wanted.keys() == body.keys() and all(_fits(body[n], wanted[n]) for n in wanted):
                return "it fits " + " ".join(
                    f"backbone.{key}={value}" for key, value in ({"name": name} | options).items()
                )
    return None


def _fits(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")  # absent from files older than PyTorch 0.4.1; no output depends on it


def _is_head(name: str) -> bool:
    return name.split(".")[0] in HEADS


def _summary(names: list[str], prefix: str) -> str:
    """Up to four names, or the modules they belong to, with the number of tensors in each."""
    if len(names) <= 4:
        return ", ".join(names)
    modules: dict[str, list[str]] = {}
    for name in names:
        depth = prefix.count(".") + name.startswith(prefix)  # `target.head`, but `target.backbone.fc`
        modules.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return ", ".join(f"{m} ({len(inside)} tensors)" if len(inside) > 1 else inside[0] for m, inside in modules.items())
