"""Picture files: decoding to uint8 inputs, sizes from the header, masks, and what to do about broken ones.

Letters: H and W height and width of the input, N pictures, h and w the original height and width.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from data.geometry import Geometry, as_geometry
from training.distributed import is_main
from training.errors import UserError
from training.text import printable

Image.MAX_IMAGE_PIXELS = 2**30  # Pillow refuses twice as many; by default 179 million, fewer than line cameras deliver
OnError = Literal["fail", "skip"]
REMEDY = "; fix or remove the file (data.on_error=skip leaves such files out of a set)"

# EXIF orientation -> what brings the stored pixels upright (EXIF 2.3, tag 0x0112); 1 is upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: str | Path, geometry: int | Geometry) -> Tensor:
    """The picture upright, in 8-bit RGB, fitted into the input: uint8 (3, H, W); an int is the side of a square.

    Grey becomes three equal channels; 16-bit grey is divided by 257 (65535 -> 255, never clipped); transparency lies
    on black; of several frames or pages the first counts. Resized by Pillow's bilinear filter, which antialiases.

    Raises:
        UserError: an empty, truncated or otherwise unreadable file, by its name and with the reason.
    """
    with _naming(path), Image.open(path) as stored:
        return fitted(_upright(stored, _to_8_bit), geometry)


def fitted(image: Image.Image, geometry: int | Geometry) -> Tensor:
    """An 8-bit Pillow picture as uint8 (3, H, W)."""
    pixels = np.array(as_geometry(geometry).apply(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


def decode_mask(path: str | Path, geometry: int | Geometry | None) -> Tensor:
    """The mask as bool (H, W), NEAREST: true where any color of the stored pixel is not 0 (16-bit 1 counts too).

    Without a geometry as large as it is stored, (h, w).

    Raises:
        UserError: as `decode`.
    """
    with _naming(path), Image.open(path) as stored:
        mask = _upright(stored, _not_black)
        if geometry is not None:
            mask = as_geometry(geometry).apply(mask, Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(mask) != 0)


def mask_values(path: str | Path) -> np.ndarray:
    """The stored values of a mask, (h, w) as stored: the largest of its color channels; not turned upright.

    Raises:
        UserError: as `decode`.
    """
    with _naming(path), Image.open(path) as stored:
        return _mask_values(stored)


def picture_size(path: str | Path) -> tuple[int, int]:
    """(h, w) of the upright picture, from the file's header: the pixels are not decoded."""
    with _naming(path), Image.open(path) as stored:
        width, height = stored.size
        return (width, height) if _orientation(stored) >= 5 else (height, width)


def picture_sizes(paths: list[str]) -> Tensor:
    """`picture_size` of each: int64 (N, 2)."""
    return torch.tensor(list(in_threads(picture_size, paths, "reading sizes")), dtype=torch.int64).reshape(-1, 2)


def readable(load: Callable[[int], object], paths: list[str], on_error: OnError) -> list[int]:
    """Positions of the pictures to keep.

    Args:
        load: decodes the picture at a position; its `UserError` means that the picture is broken.
        on_error: `fail`: keep all and read none; the first decoding of a broken one raises, naming it.
            `skip`: load every one now and leave out the broken ones, named in one warning line on stderr.
    """
    if on_error not in ("fail", "skip"):
        raise UserError(f"data.on_error={on_error!r} is not known: choose fail or skip")
    positions = range(len(paths))
    if on_error == "fail":
        return list(positions)

    def loads(position: int) -> bool:
        try:
            load(position)
        except UserError:
            return False
        return True

    good = list(in_threads(loads, positions, "checking pictures"))
    broken = [path for path, is_good in zip(paths, good) if not is_good]
    if paths and len(broken) == len(paths):
        raise UserError(f"none of the {len(paths)} pictures can be read, the first is {paths[0]}: check the files")
    if broken and is_main():
        names = ", ".join(broken)
        line = f"warning: left out {len(broken)} of {len(paths)} pictures, not readable: {names}"
        print(printable(line), file=sys.stderr)
    return [position for position, is_good in zip(positions, good) if is_good]


def in_threads(function: Callable, items: Iterable, title: str) -> Iterator:
    """function(item) of each item, in order, by one thread a processor (Pillow decodes without Python's lock).

    After two seconds rank 0 shows a bar on stderr; it goes when the work is done.
    """
    items = list(items)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    bar = tqdm(total=len(items), desc=title, unit="picture", delay=2, leave=False, disable=not is_main())
    with bar, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), 256):  # parts: a result nobody has taken yet is a picture in memory
            for result in pool.map(function, items[start : start + 256]):
                bar.update()
                yield result


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `UserError` that names the file and the reason."""
    try:
        yield
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif os.path.isfile(path) and os.path.getsize(path) == 0:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "it is not a picture of a known format"
        else:
            reason = str(error) or type(error).__name__
        raise UserError(f"cannot read picture {path}: {reason}{REMEDY}") from error


def _orientation(stored: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from the header; 1 for TIFF, which Pillow turns by itself while it loads."""
    if stored.format == "TIFF":
        return 1
    # PNG's own getexif decodes the whole picture to find a chunk behind the pixels; nobody writes it there
    orientation = Image.Image.getexif(stored).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _UPRIGHT else 1


def _upright(stored: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The stored picture, converted and then turned as its EXIF orientation says."""
    orientation = _orientation(stored)
    image = convert(stored)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Any mode to L or RGB of the same look."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no declared range, convert it to 8 or 16 bit")
    if image.mode.startswith("I"):  # I;16, I;16B: 16-bit grey; I: Pillow's 32-bit container of the same
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values {grey.min()} to {grey.max()} do not fit 16 bit, convert it to 8 or 16 bit")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # to the nearest: 257 * 255 = 65535
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _not_black(image: Image.Image) -> Image.Image:
    """255 where a stored pixel is not 0 or black, else 0."""
    return Image.fromarray((_mask_values(image) != 0).astype(np.uint8) * 255)


def _mask_values(image: Image.Image) -> np.ndarray:
    """(h, w), the largest of the color channels; a palette counts by its colors, not by its numbers."""
    deep = image.mode == "F" or image.mode.startswith("I")  # 8 bits would turn a 16-bit 1 into 0
    pixels = np.asarray(image if deep else _to_8_bit(image))
    return pixels if pixels.ndim == 2 else pixels.max(2)
