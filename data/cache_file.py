"""Decoded images in a file that later runs map into memory: what the first pass decodes, nobody decodes again."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import temporary_name
from runtime.memory import gib
from runtime.text import say_once

FOLDER = Path("datasets", ".cache")  # below the working folder
FORMAT = 1  # counts changes of how a file's rows are laid out or made


def open_columns(dataset, example: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor], Callable[[], None]]:
    """The file's parts, mapped and shared by all processes of this machine; made when there is none.

    The file is called by what it holds: path below the root, size and time of change of every image and mask, the
    geometry, and Pillow's version. So a set that changed gets a new file. All of its bytes are reserved at once, for a
    disk that is full later would end the process without a word. It has its name only then; two processes that make
    the same one agree on the first.

    Args:
        example: one item's tensors: image[, mask].

    Returns:
        filled: uint8 (N,), 1 of rows that are there. columns: of each tensor of `example` (N, ...). sync: waits until
        the columns are on the disk; call it before a row is marked as filled, for power can fail in between.

    Raises:
        UserError: images that are not files of their own, or a disk without room.
    """
    shapes = [(len(dataset), *x.shape) for x in example]
    kinds = [np.dtype(str(x.dtype).removeprefix("torch.")) for x in example]
    sizes = [int(np.prod(shape)) * kind.itemsize for shape, kind in zip(shapes, kinds)]
    *starts, end = np.cumsum([len(dataset), *sizes]).tolist()
    path = FOLDER / f"{_key(dataset, shapes)}.bin"
    if not path.exists():
        _reserve(path, end)
        say_once(f"data.cache=file keeps decoded images in {path} ({gib(end)}): delete it whenever no run uses it")
    filled = np.memmap(path, np.uint8, "r+", 0, (len(dataset),))
    columns = [np.memmap(path, kind, "r+", start, shape) for kind, start, shape in zip(kinds, starts, shapes)]

    def sync() -> None:
        for column in columns:
            column.flush()

    return torch.from_numpy(filled), [torch.from_numpy(column) for column in columns], sync


def _key(dataset, shapes: list[tuple[int, ...]]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, PIL.__version__, str(dataset.geometry), shapes]).encode())
    masks = [mask for files in dataset.mask_paths for mask in files or ()]
    for name, path in [*zip(dataset.names, dataset.paths), *zip(masks, masks)]:
        try:
            about = os.stat(path)
        except OSError:
            raise UserError(f"data.cache=file is for images that are files of their own, and {path} is none") from None
        digest.update(os.fsencode(name) + f"\0{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _reserve(path: Path, size: int) -> None:
    """A file of so many zeros under this name, unless another process was faster."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        with open(temporary, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        with suppress(FileExistsError):
            os.link(temporary, path)
    except OSError as error:
        raise UserError(
            f"data.cache=file needs {gib(size)} in {path.parent}: {error.strerror}; make room, or use data.cache=none"
        ) from None
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
