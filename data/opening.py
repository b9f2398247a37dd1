"""Opening image files: regular files only, known formats only, and decoded only where there is memory for it.

    with opened(path) as stored, memory_for(stored, geometry):
        ...  # decode `stored`

Letters: h and w the stored height and width, H and W those of the input.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import get_worker_info

from data.depth import is_deep
from data.geometry import Geometry
from data.image_files import formats
from runtime.errors import UserError, cut, lacks_memory
from runtime.files import open_regular
from runtime.memory import free_memory, gib, total_memory

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit has fewer pixels than line cameras deliver; here the memory counts
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, which are named when they cannot be decoded
REMEDY = "; fix or remove the file (data.on_error=skip leaves such files out of a set)"
SHARE = 1 / 2  # of the memory: what decoding may take
SMALL = 2**26  # bytes: what takes less is decoded without a look at the memory, which takes up to half a millisecond

# Bytes per pixel that decoding takes at most, conversion to 8 bits and turning upright included; a color has 4.
GREY, COLOR, TRANSPARENT, DEEP_GREY, DEEP = 6, 16, 20, 12, 36
OF_FORMAT = {"WEBP": 10, "AVIF": 10, "JPEG2000": 20, "TIFF": 4, "JPEG": 6}  # and what the decoder takes besides


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image of which only the header has been read.

    Raises:
        UserError: the file cannot be opened, or what is done with the image inside fails, by name and with the reason.
        MemoryError: memory is lacking, which is no fault of the file, by its name.
    """
    try:
        with open_regular(path) as file:
            _require_readable_size(file)
            with Image.open(file, formats=formats()) as stored:
                stored.filename = os.fspath(path)
                yield stored
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
        if lacks_memory(error):
            what = f"too little memory for image {path}: {cut(str(error)) or 'it is full'}"
            raise MemoryError(f"{what}; close other programs, lower data.workers or make the image smaller") from error
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif os.path.isfile(path) and os.path.getsize(path) == 0:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "it is not an image of a known format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = cut(str(error), 97) or type(error).__name__
        raise UserError(f"cannot read image {path}: {reason}{REMEDY}") from error


def _require_readable_size(file: BinaryIO) -> None:
    """Pillow reads files of many formats whole before it knows how many pixels they have; of TIFF it reads one page."""
    size = os.fstat(file.fileno()).st_size
    if size > SMALL and size > (total := total_memory()) * SHARE and file.peek(2)[:2] not in (b"II", b"MM"):
        raise ValueError(f"the file has {gib(size)}, over half of all {gib(total)} of memory")


@contextmanager
def memory_for(stored: Image.Image, geometry: Geometry | None = None) -> Iterator[None]:
    """Waits until there is memory to decode an opened image (and to fit it into an input) beside what other threads
    decode, and keeps it while inside.

    Raises:
        ValueError: it takes more than half of all memory, so the file can never be decoded here.
        MemoryError: it takes more than half of what is free, though no other thread decodes.
    """
    needed = bytes_to_decode(stored, geometry)
    if needed < SMALL:
        yield
        return
    claim = f"{stored.width} x {stored.height} pixels take {gib(needed)} to decode"
    if needed > (total := total_memory()) * SHARE:
        raise ValueError(f"{claim}, over half of all {gib(total)} of memory")
    with memory_kept(needed, claim):
        yield


def bytes_to_decode(stored: Image.Image, geometry: Geometry | None = None) -> int:
    """What it takes at most to decode an opened image and to fit it into an input, from its header alone."""
    if stored.mode in ("I", "F") or (is_deep(stored) and not stored.mode.startswith("I")):
        each = DEEP
    elif stored.mode.startswith("I"):
        each = DEEP_GREY
    elif stored.has_transparency_data:
        each = TRANSPARENT
    else:
        each = GREY if stored.mode in ("1", "L") else COLOR
    needed = stored.width * stored.height * (each + OF_FORMAT.get(stored.format, 0))
    if geometry is not None:
        needed += 16 * geometry.height * geometry.width
        if {geometry.height, geometry.width} != {*stored.size}:  # Pillow resizes the width first
            needed += 4 * max(geometry.height, geometry.width, geometry.resize or 0) * max(stored.size)
    return needed


class _Kept:
    """What threads of this process keep of its memory."""

    def __init__(self):
        self.bytes, self.changed = 0, threading.Condition()


_KEPT = _Kept()
os.register_at_fork(after_in_child=_KEPT.__init__)  # a worker has none of the threads that keep something


@contextmanager
def memory_kept(needed: int, claim: str) -> Iterator[None]:
    """Waits until so many bytes fit into half of what is free, beside what other threads keep, and keeps them while
    inside. A thread that keeps some must not ask for more.

    Raises:
        MemoryError: they do not fit though no other thread keeps any; `claim` says what they are for.
    """
    with _KEPT.changed:
        while needed > (free := _free()) * SHARE - _KEPT.bytes:
            if not _KEPT.bytes:
                raise MemoryError(f"{claim}, {gib(free)} are free")
            _KEPT.changed.wait()
        _KEPT.bytes += needed
    try:
        yield
    finally:
        with _KEPT.changed:
            _KEPT.bytes -= needed
            _KEPT.changed.notify_all()


def _free() -> int:
    """Free bytes for this process, which may be one of several workers."""
    worker = get_worker_info()
    return free_memory(torch.device("cpu")) // (worker.num_workers if worker else 1)
