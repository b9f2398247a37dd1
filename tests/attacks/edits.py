"""Edits of checkpoint files by the seed: bytes, zip records, keys, types, shapes, values, with a checksum or without.

An edit turns the state of a checkpoint into the bytes of a file. `SIGNED` edits get the checksum of their contents, as
somebody would give them who means it; `UNSIGNED` ones have none, as old checkpoints; `STALE` ones keep the one before.
"""

import io
import os
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime import integrity

STALE, SIGNED, UNSIGNED = "stale", "signed", "unsigned"


class Edit(NamedTuple):
    kind: str
    signature: str  # of the state's checksum; empty where bytes are edited
    place: str  # key or position that is edited
    contents: bytes  # of the file


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def packed(state, *, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def signed(state: dict) -> dict:
    return state | {"checksum": integrity.checksum(state)}


def copied(value):
    """Containers anew, so that an edit leaves the original alone."""
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def made(state: dict, others: list[dict], rng: random.Random, *, ours: bool = True) -> Edit:
    """A random edit of a checkpoint; `others` are states of other runs. Other people's have no checksum."""
    kind = rng.choice([*BYTES, *BYTES, *STATES, *STATES, *STATES, *STRANGE])
    if kind in BYTES:
        contents, place = BYTES[kind](packed(signed(state) if ours else state), rng)
        return Edit(kind, "", place, contents)
    if kind == "other run":
        return Edit(kind, SIGNED, "", packed(signed(rng.choice(others))))
    signature = rng.choice([STALE, STALE, SIGNED, UNSIGNED]) if ours else UNSIGNED
    edited, place = copied(state), ""
    if kind in STATES:
        place = STATES[kind](edited, rng)
    else:
        edited[rng.choice([*state])] = STRANGE[kind]()
    try:
        check = {STALE: integrity.checksum(state), UNSIGNED: None}.get(signature) or integrity.checksum(edited)
    except Exception:  # nobody can compute it
        check, signature = integrity.checksum(state), STALE
    return Edit(kind, signature, place, packed(edited | ({} if signature == UNSIGNED else {"checksum": check})))


# -------------------------------------------------------------------- of the bytes


def flip_bit(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :], f"byte {at}"


def set_byte(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(len(whole))
    return whole[:at] + rng.randbytes(1) + whole[at + 1 :], f"byte {at}"


def flip_in_directory(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The zip file's directory and the pickled structure are small parts of a file, so they get edits of their own."""
    first = whole.rfind(b"PK\x01\x02", 0, -200)
    at = rng.randrange(max(first, 0), len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :], f"byte {at}"


def flip_in_pickle(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.randrange(64, max(65, whole.find(b"PK\x07\x08")))
    return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :], f"byte {at}"


def truncate(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = rng.choice([0, 1, 4, rng.randrange(len(whole)), rng.randrange(len(whole)), len(whole) - 1])
    return whole[:at], f"byte {at}"


def lose_a_block(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Zeros of a sector that was never written."""
    at = rng.randrange(0, len(whole), 512)
    return whole[:at] + bytes(len(whole[at : at + 512])) + whole[at + 512 :], f"byte {at}"


def append(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    return whole + rng.randbytes(rng.choice([1, 100, 5000])), "end"


def rezip(change: Callable[[dict[str, bytes], random.Random], str], method: int = zipfile.ZIP_STORED) -> Callable:
    """An edit of the zip file's records by their names, with right checksums of the zip format."""

    def edit(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        place, out = change(records, rng), io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, contents in records.items():
                archive.writestr(name, contents)
        return out.getvalue(), place

    return edit


def drop_record(records: dict[str, bytes], rng: random.Random) -> str:
    name = rng.choice([*records])
    del records[name]
    return name


def swap_records(records: dict[str, bytes], rng: random.Random) -> str:
    data = [name for name in records if "/data/" in name]
    one = rng.choice(data)
    other = rng.choice([name for name in data if len(records[name]) == len(records[one])])
    records[one], records[other] = records[other], records[one]
    return f"{one} and {other}"


def cut_record(records: dict[str, bytes], rng: random.Random) -> str:
    name = rng.choice([*records])
    records[name] = records[name][: len(records[name]) // 2]
    return name


def change_record(records: dict[str, bytes], rng: random.Random) -> str:
    name = rng.choice([name for name in records if records[name]])
    at = rng.randrange(len(records[name]))
    records[name] = records[name][:at] + bytes([records[name][at] ^ 1 << rng.randrange(8)]) + records[name][at + 1 :]
    return name


def same_records(records: dict[str, bytes], rng: random.Random) -> str:  # noqa: ARG001
    return ""


def claim_a_size(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The zip file's directory says that a record has 3 GB."""
    starts, at = [], whole.find(b"PK\x01\x02")
    while at >= 0:
        starts, at = [*starts, at], whole.find(b"PK\x01\x02", at + 4)
    at = rng.choice(starts)
    return whole[: at + 20] + struct.pack("<II", 3 * 10**9, 3 * 10**9) + whole[at + 28 :], f"byte {at}"


BYTES: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    "bit flipped": flip_bit,
    "byte set": set_byte,
    "bit flipped in the directory": flip_in_directory,
    "bit flipped in the pickle": flip_in_pickle,
    "truncated": truncate,
    "block lost": lose_a_block,
    "appended to": append,
    "record dropped": rezip(drop_record),
    "records swapped": rezip(swap_records),
    "record cut": rezip(cut_record),
    "record changed": rezip(change_record),
    "compressed": rezip(same_records, zipfile.ZIP_DEFLATED),
    "record claims 3 GB": claim_a_size,
}


# -------------------------------------------------------------------- of what it holds


def somewhere(state: dict, rng: random.Random) -> tuple[Any, Any, str]:
    """A container at a random depth, a key of it, and both in words."""
    container, words = state, []
    while True:
        key = rng.choice([*container] if isinstance(container, dict) else range(len(container)))
        words.append(str(key))
        inside = container[key]
        if not isinstance(inside, dict | list) or not inside or rng.random() < 0.2:
            return container, key, ".".join(words)
        container = inside


def a_tensor(state: dict, rng: random.Random) -> tuple[dict, str, str]:
    while True:
        container, key, place = somewhere(state, rng)
        if isinstance(container[key], Tensor):
            return container, key, place


def delete(state: dict, rng: random.Random) -> str:
    container, key, place = somewhere(state, rng)
    del container[key]
    return place


def rename(state: dict, rng: random.Random) -> str:
    container, key, place = somewhere(state, rng)
    while isinstance(container, list):
        container, key, place = somewhere(state, rng)
    container[key + 1000 if isinstance(key, int) else f"{key}x"] = container.pop(key)
    return place


def add(state: dict, rng: random.Random) -> str:
    container, _, place = somewhere(state, rng)
    value = rng.choice([0, "text", None, torch.ones(3), [1, 2], {"a": 1}])
    if isinstance(container, list):
        container.append(value)
    else:
        container[rng.choice(["extra", 7, None, ("a", 1), "\n" * 50 + "x" * 5000])] = value
    return place


def swap_type(state: dict, rng: random.Random) -> str:
    """Another kind of value, no other value of that kind."""
    container, key, place = somewhere(state, rng)
    value = container[key]
    kinds: list[Any] = ["text", [], {}, {"a": {"b": []}}, ["x", 1], torch.ones(2), (1, 2), b"bytes", 10**400]
    kinds += [float("nan")] * 3 if isinstance(value, float) else []
    kinds = [kind for kind in kinds if isinstance(kind, float) or type(kind) is not type(value)]
    container[key] = rng.choice(kinds)
    return place


def reshape(state: dict, rng: random.Random) -> str:
    container, key, place = a_tensor(state, rng)
    value = container[key]
    shapes = [value.flatten(), value[None], value.new_zeros((*value.shape, 2)), value.new_zeros(0)]
    shapes += [value[1:], torch.cat([value, value])] if value.ndim else []
    shapes += [value.T.contiguous()] if value.ndim == 2 else []
    container[key] = rng.choice([shape for shape in shapes if shape.shape != value.shape] or [value[None]])
    return place


def retype(state: dict, rng: random.Random) -> str:
    container, key, place = a_tensor(state, rng)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64]
    container[key] = container[key].to(rng.choice([kind for kind in kinds if kind != container[key].dtype]))
    return place


def spoil(state: dict, rng: random.Random) -> str:
    container, key, place = a_tensor(state, rng)
    while not container[key].is_floating_point() or not container[key].numel():
        container, key, place = a_tensor(state, rng)
    container[key] = container[key].clone(memory_format=torch.contiguous_format)
    container[key].view(-1)[rng.randrange(container[key].numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return place


def claim(state: dict, rng: random.Random) -> str:
    """One value that says it is a million millions."""
    container, key, place = a_tensor(state, rng)
    value = container[key]
    container[key] = torch.zeros((), dtype=value.dtype).expand(10**12, *[1] * (value.ndim - 1))
    return place


def make_sparse(state: dict, rng: random.Random) -> str:
    container, key, place = a_tensor(state, rng)
    value = container[key]
    container[key] = value.to_sparse() if value.ndim else value.to("meta")
    return place


STATES: dict[str, Callable[[dict, random.Random], str]] = {
    "deleted": delete,
    "renamed": rename,
    "added": add,
    "type swapped": swap_type,
    "shape": reshape,
    "dtype": retype,
    "not finite": spoil,
    "claims 10^12 values": claim,
    "sparse": make_sparse,
}


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def bomb() -> list:
    value: list = ["boom"]
    for _ in range(40):
        value = [value] * 10
    return value


def circle() -> list:
    value: list = []
    value.append(value)
    return value


STRANGE: dict[str, Callable] = {
    "other run": dict,
    "code": Trap,
    "nested 300 times": lambda: nested(300),
    "a list in itself": circle,
    "10^40 texts": bomb,
}
