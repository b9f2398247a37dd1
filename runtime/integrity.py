"""Whether a checkpoint is what was saved: its checksum, the zip file around it, the form of what it holds.

torch.load checks nothing of this: a flipped bit in a weight loads as another weight.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import cut
from runtime.text import first_few

PLAIN = {str, int, float, bool, type(None)}


def checksum(state) -> str:
    """SHA-256 of tensors and plain values, nested: keys in their order, types, shapes, values and bytes.

    The same before `torch.save` and after `torch.load`. Memory layout and device do not count.

    Raises:
        ValueError, RecursionError: what `torch.save` can hold and no checkpoint of ours does.
    """
    return _digest(state, {}).hex()


def is_checksum(stored, state) -> bool:
    """Whether this is the checksum of what a file holds, which may be anything."""
    try:
        return stored == checksum(state)
    except Exception:  # no file of ours can be that strange
        return False


def _digest(value, known: dict[int, bytes]) -> bytes:
    """Of a value in a file; `known` has those of containers met before, which a file can repeat without end."""
    if isinstance(value, Tensor):
        digest = hashlib.sha256(f"{form_of(value)} ".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()
    if not isinstance(value, dict | list | tuple):
        return f"{value!r}".encode()
    if id(value) not in known:
        known[id(value)] = b"itself"
        entries = [part for entry in value.items() for part in entry] if isinstance(value, dict) else value
        kind = next(kind for kind in (dict, list, tuple) if isinstance(value, kind))
        if not {*map(type, entries)} <= PLAIN:
            entries = [_digest(entry, known) for entry in entries]
        known[id(value)] = hashlib.sha256(f"{kind.__name__} {list(entries)!r}".encode()).digest()
    return known[id(value)]


def damage(path: str | Path, *, contents: bool) -> str | None:
    """What is wrong with the zip file that torch.save wrote, None if nothing is, or if it is in torch's older format.

    Args:
        contents: compare every byte with the checksums of the zip file. Without, only what its directory claims.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), os.path.getsize(path)
            if sum(entry.file_size for entry in entries) > size:  # torch.save does not compress
                return f"claims more than its {size:,} bytes"
            for entry in entries if contents else ():
                if entry.CRC:  # 0 where torch was told to leave it out
                    with archive.open(entry) as record:
                        while record.read(2**20):
                            pass
    except Exception as error:  # of a damaged file, zipfile raises many types
        return f"is damaged ({cut(str(error))})"
    return None


def size_of(state) -> int:
    """Bytes of all tensors in what a file holds, which may be many times those of the file: views of one storage."""
    total, met, waiting = 0, set(), [state]
    while waiting:
        value = waiting.pop()
        if id(value) in met:
            continue
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple):
            waiting += value.values() if isinstance(value, dict) else value
        met.add(id(value))
    return total


def faults_of_part(part, given, where: str) -> list[str]:
    """How the state of a module, optimizer or scaler in a file differs in form from that of `part`; what else has a
    state_dict must look after itself."""
    if isinstance(part, torch.optim.Optimizer):
        return list(faults_of_optimizer(part, given, where))
    if isinstance(part, torch.nn.Module | torch.amp.GradScaler):
        return list(faults(part.state_dict(), given, where))
    return []


def first_two(faults: list[str]) -> str:
    """Of many faults the first two, each one short line."""
    return first_few([" ".join(cut(fault, 110).split()) for fault in faults], 2, "; ")


def faults(wanted, given, where: str) -> Iterator[str]:
    """How the form of `given`, of a file, differs from `wanted`, of this program: keys, types, shapes, NaN.

    Tensors and plain values, nested. A tensor that is wanted without elements stands for all with as many axes: what a
    detector has fitted.
    """
    if isinstance(wanted, Tensor):
        yield from _faults_of_tensor(wanted, given, where)
    elif isinstance(wanted, dict):
        if not isinstance(given, dict):
            yield f"{where} is {form_of(given)}, not a dict"
            return
        below = f"{where}." if where else ""
        for key, value in wanted.items():
            if key not in given:
                yield f"{below}{key} is missing"
            else:
                yield from faults(value, given[key], f"{below}{key}")
        yield from (f"{below}{cut(str(key))} is unknown" for key in given if key not in wanted)
    elif isinstance(wanted, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(wanted):
            yield f"{where} is {form_of(given)}, not {form_of(wanted)}"
            return
        for number, (one, other) in enumerate(zip(wanted, given)):
            yield from faults(one, other, f"{where}.{number}")
    elif form_of(given) != form_of(wanted):
        yield f"{where} is {form_of(given)}, not {form_of(wanted)}"
    elif given != given:
        yield f"{where} is NaN"


def _faults_of_tensor(wanted: Tensor, given, where: str) -> Iterator[str]:
    if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_meta:
        yield f"{where} is {form_of(given)}, not a tensor"
    elif given.dtype != wanted.dtype or given.ndim != wanted.ndim or (wanted.numel() and given.shape != wanted.shape):
        yield f"{where} is {form_of(given)}, not {form_of(wanted)}"
    elif not is_finite(given):
        yield f"{where} has values that are not finite"


def faults_of_optimizer(optimizer: torch.optim.Optimizer, given, where: str) -> Iterator[str]:
    """The same of an optimizer, whose state_dict has no state before the first step: every parameter's must have the
    keys and types of the others', and its shape. One that had no gradient yet has none."""
    wanted, state = optimizer.state_dict() | {"state": {}}, None
    if isinstance(given, dict) and isinstance(given.get("state"), dict):
        state, given = given["state"], given | {"state": {}}
    yield from faults(wanted, given, where)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first: dict[str, str] = {}
    for number, entry in (state or {}).items():
        place = f"{where}.state.{cut(str(number))}"
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(entry, dict):
            yield f"{place} is unknown"
            continue
        found = {cut(str(key)): _likeness(value, parameters[number]) for key, value in entry.items()}
        first = first or found
        for key in {**first, **found}:
            one, other = found.get(key, "missing"), first.get(key, "missing")
            if one != other and (parameters[number].ndim or "missing" in (one, other)):  # of a number all are alike
                yield f"{place}.{key} is {one}, another parameter's {other}"
        for key, value in entry.items():
            if isinstance(value, Tensor) and not is_finite(value):
                yield f"{place}.{key} has values that are not finite"


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity, which their sum would be; it may also overflow."""
    return not values.is_floating_point() or bool(values.sum().isfinite() or values.isfinite().all())


def _likeness(value, parameter: Tensor) -> str:
    """`form_of`, with the parameter's shape as such, so that the values of several parameters can be compared."""
    if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
        return f"{_dtype(value)} like it"
    return form_of(value)


def form_of(value) -> str:
    """In words: `float32[3, 4]` of a tensor, `list of 3`, `text`, `number`."""
    if isinstance(value, Tensor):
        kind = "" if value.layout == torch.strided and not value.is_meta else "no plain "
        return f"{kind}{_dtype(value)}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"list of {len(value)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return {str: "text", type(None): "none"}.get(type(value), type(value).__name__)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


KINDS = {  # what a checkpoint may have beside its parts, by kind
    "section": ("config", "calibration"),
    "count": ("step", "warnings", "keep_last"),
    "number": ("seconds", "seconds_fit", "best"),
    "numbers": ("curves", "metrics"),
    "bool": ("fitted",),
    "text": ("version", "part"),
    "texts": ("names", "elsewhere", "tested", "masks", "validation", "classes", "unlabelled"),
    "counts": ("learned",),
    "window": ("window",),
}


def is_a(kind: str, value) -> bool:
    """Whether a value in a checkpoint is of one of the kinds that `KINDS` has."""
    if kind in ("texts", "counts"):
        return isinstance(value, list) and all(is_a(kind[:-1], entry) for entry in value)
    if kind == "section":
        return is_plain(value)
    if kind == "numbers":
        return isinstance(value, dict) and all(entry is None or is_a("number", entry) for entry in value.values())
    if kind == "window":  # `runtime.run.Window.state`
        losses = value.get("loss") if isinstance(value, dict) else None
        some = isinstance(losses, list) and len(losses) > 0 and all(is_a("number", loss) for loss in losses)
        return some and is_a("count", value.get("losses"))
    if kind == "count":
        return type(value) is int and value >= 0
    if kind == "number" and isinstance(value, int):
        return abs(value) < 2**64
    return isinstance(value, {"text": str, "bool": bool, "number": float}[kind])


def is_plain(section) -> bool:
    """Whether this is a dict by names of texts, numbers, lists and dicts, no more of them than a config can have."""
    if not isinstance(section, dict):
        return False
    waiting, count = [(section, 0)], 0
    while waiting:
        (value, level), count = waiting.pop(), count + 1
        if isinstance(value, dict | list | tuple):
            inside = value.values() if isinstance(value, dict) else value
            waiting += [(entry, level + 1) for entry in inside]
        elif not (value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**64)):
            return False
        if level > 10 or count > 10_000 or (isinstance(value, dict) and not all(isinstance(key, str) for key in value)):
            return False
    return True
