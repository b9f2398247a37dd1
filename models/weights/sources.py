"""Where weights come from: a file of torch.save or of safetensors, or torchvision by name."""

import re
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.backbones import BACKBONES
from runtime.checkpoint import read
from runtime.errors import UserError, cut
from runtime.text import first_few

TORCHVISION = {"vit_base": "vit_b_16"}  # its names where they are not ours


def open_weights(model: nn.Module, path: str | Path):
    """What the file, or torchvision's weights of that name, hold."""
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path}: install safetensors to read it (pip install safetensors)") from None
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
    if not re.fullmatch(r"[A-Z0-9_]+", str(path)) or Path(path).exists():
        return read(path)
    ours = next((name for name, build in BACKBONES.items() if build is type(model)), None)
    try:
        choices = torchvision.models.get_model_weights(TORCHVISION.get(ours, ours or ""))
    except ValueError:
        raise UserError(f"there is no file {path}, and torchvision has no weights for {type(model).__name__}") from None
    if str(path) not in choices.__members__:
        raise UserError(f"torchvision has no weights {path} for {ours}; it has: {', '.join(choices.__members__)}")
    try:
        return choices[str(path)].get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: the hash is not the file's
        raise UserError(
            f"cannot download torchvision's {path} for {ours} ({error}): download "
            f"{choices[str(path)].url} on a machine with network access, and set backbone.weights to the file"
        ) from None


def tensors_of(checkpoint, path: str | Path) -> dict[str, Tensor]:
    """{name: tensor} of a checkpoint, nested one level at most; counters, optimizer states and the like are ignored."""
    tensors = {}
    for key, value in checkpoint.items() if isinstance(checkpoint, dict) else ():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.layout == torch.strided:
                name = re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", str(name))
                tensors[re.sub(r"^((model|state_dict|model_state_dict)\.)+", "", name)] = entry
    if not tensors:
        names = [" ".join(cut(str(key), 40).split()) for key in checkpoint] if isinstance(checkpoint, dict) else []
        keys = f" with the keys {first_few(names, 5)}" if isinstance(checkpoint, dict) else ""
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__}{keys} and no state_dict; "
            'save one with torch.save, plain or under "model", "state_dict" or "model_state_dict"'
        )
    return tensors
