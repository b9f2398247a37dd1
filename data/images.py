"""Reading image files: pixels as uint8 inputs, masks, sizes from the headers; what happens to broken files.

Letters: H and W height and width of the input, N images, h and w the original height and width.
"""

from runtime.threads import Threads, cpu_count

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from data.depth import largest_channel, not_black, to_8_bit
from data.geometry import Geometry, as_geometry
from data.opening import memory_for, opened
from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.text import say_once

OnError = Literal["fail", "skip"]

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


def decode(path: str | Path, geometry: int | Geometry, box: list[int] | None = None) -> Tensor:
    """The image upright, in 8-bit RGB, fitted into the input: uint8 (3, H, W); an int is the side of a square.

    With a `box` (top, left, height and width in the upright image's pixels) this part of it alone.

    Grey becomes three equal channels; of more than 8 bits the geometry's range becomes 0 to 255 (`depth.to_8_bit`);
    transparency lies on black; of several frames or pages the first counts. Resized by Pillow's filters, which
    antialias.

    Raises:
        UserError: an empty, truncated or otherwise unreadable file, by its name and with the reason.
        MemoryError: there is too little memory now, which is no fault of the file.
    """
    geometry = as_geometry(geometry)
    with opened(path) as stored, memory_for(stored, geometry):
        image = upright(stored, partial(to_8_bit, white=geometry.white, black=geometry.black))
        if box is not None:
            top, left, height, width = box
            image = image.crop((left, top, left + width, top + height))
        return fitted(image, geometry)


def fitted(image: Image.Image, geometry: int | Geometry) -> Tensor:
    """An 8-bit Pillow image as uint8 (3, H, W); of a `gray` geometry the three channels are one in memory."""
    geometry = as_geometry(geometry)
    if geometry.gray:
        return torch.from_numpy(np.array(geometry.apply(image.convert("L")))).expand(3, -1, -1)
    pixels = np.array(geometry.apply(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


def decode_mask(path: str | Path, geometry: int | Geometry | None) -> Tensor:
    """The mask as bool (H, W), NEAREST: true where any color of the stored pixel is not 0 (16-bit 1 counts too).

    Without a geometry as large as it is stored, (h, w).

    Raises:
        UserError: as `decode`.
    """
    with opened(path) as stored, memory_for(stored, None if geometry is None else as_geometry(geometry)):
        mask = upright(stored, not_black)
        if geometry is not None:
            mask = as_geometry(geometry).apply(mask, Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(mask) != 0)


def thumbnail(path: str | Path, side: int, geometry: int | Geometry) -> np.ndarray:
    """The image upright, gray and squashed: uint8 (side, side). Of a large JPEG file only an eighth to the whole is
    decoded, as much as is needed; the geometry gives the range of deep files.

    Raises:
        UserError: as `decode`.
    """
    geometry = as_geometry(geometry)
    with opened(path) as stored, memory_for(stored):
        stored.draft("L", (side, side))
        image = upright(stored, partial(to_8_bit, white=geometry.white, black=geometry.black))
        return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))


def mask_values(path: str | Path) -> np.ndarray:
    """The stored values of a mask, (h, w) as stored: the largest of its color channels; not turned upright.

    Raises:
        UserError: as `decode`.
    """
    with opened(path) as stored, memory_for(stored):
        return largest_channel(stored)


def image_size(path: str | Path) -> tuple[int, int]:
    """(h, w) of the upright image, from the file's header: the pixels are not decoded."""
    with opened(path) as stored:
        width, height = stored.size
        return (width, height) if _orientation(stored) >= 5 else (height, width)


def image_sizes(paths: list[str]) -> Tensor:
    """`image_size` of each: int64 (N, 2)."""
    return torch.tensor(list(in_threads(image_size, paths, "reading sizes")), dtype=torch.int64).reshape(-1, 2)


def readable(
    load: Callable[[int], object], paths: list[str], on_error: OnError, reasons: dict[str, str] | None = None
) -> list[int]:
    """Positions of the images to keep; `reasons` is filled with {path: why it cannot be read} of the others.

    Args:
        load: decodes the image at a position; its `UserError` means that the image is broken. A `MemoryError` says
            nothing about the image and is raised.
        on_error: `fail`: keep all and read none; the first decoding of a broken one raises, naming it.
            `skip`: load every one now and leave out the broken ones, named in one warning line on stderr.
    """
    positions = range(len(paths))
    if on_error == "fail":
        return list(positions)

    reasons = {} if reasons is None else reasons

    def loads(position: int) -> bool:
        try:
            load(position)
        except UserError as error:
            reasons[paths[position]] = str(error)
            return False
        return True

    good = list(in_threads(loads, positions, "checking images"))
    broken = [path for path, is_good in zip(paths, good) if not is_good]
    if paths and len(broken) == len(paths):
        raise UserError(f"none of the {len(paths)} images can be read, the first is {paths[0]}: check the files")
    if broken and is_main():
        names = ", ".join(broken)
        say_once(f"warning: left out {len(broken)} of {len(paths)} images, not readable: {names}")
    return [position for position, is_good in zip(positions, good) if is_good]


def in_threads(function: Callable, items: Iterable, title: str) -> Iterator:
    """function(item) of each item, in order, by one thread per processor (Pillow decodes without Python's lock).

    After two seconds rank 0 shows a bar on stderr; it goes when the work is done.
    """
    items = list(items)
    threads = max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    bar = tqdm(total=len(items), desc=title, unit="image", delay=2, leave=False, disable=not is_main())
    with bar, Threads(threads) as pool:
        for start in range(0, len(items), 256):  # parts: a result nobody has taken yet is an image in memory
            for result in pool.map(function, items[start : start + 256]):
                bar.update()
                yield result


def _orientation(stored: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from the header; 1 for TIFF, which Pillow turns by itself while it loads."""
    if stored.format == "TIFF":
        return 1
    # PNG's own getexif decodes the whole image to find a chunk behind the pixels; nobody writes it there
    try:
        orientation = Image.Image.getexif(stored).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a malformed block, of PNG and WebP: SyntaxError, struct.error; of JPEG Pillow says nothing
        return 1
    return orientation if orientation in _UPRIGHT else 1


def upright(stored: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The stored image, converted and then turned as its EXIF orientation says."""
    orientation = _orientation(stored)
    image = convert(stored)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
