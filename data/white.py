"""What is black and white in files of more than 8 bits: found from the training set for `auto`, or doubted."""

import os
import struct

import numpy as np
from PIL import Image

from data.depth import WHITE, deep_values, is_deep
from data.images import in_threads
from data.opening import memory_for, opened
from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.files import open_regular
from runtime.text import say_once

MAY_BE_DEEP = {".png", ".tif", ".tiff", ".pgm", ".pnm", ".jp2"}
CAMERAS = (255, 1023, 4095, 16383)  # white of 8, 10, 12 and 14 bits
BITS_PER_SAMPLE, MAX_SAMPLE, S_MAX_SAMPLE = 258, 281, 341  # TIFF tags
LOOKED_AT = 100  # images, for the warning


def find_range(paths: list[str], percentiles: tuple[float, float] = (0, 100)) -> tuple[float, float]:
    """Black and white of a training set's deep files; those of 16 bits if there are none. 8-bit files do not count.

    They are these percentiles of all values: the smallest value that so large a share of the pixels does not exceed. Of
    files of 16 bits they are exact; of others each image's 1,001 quantiles stand for its values.

    White at 100 is the largest that the files declare (PNG's sBIT, TIFF's SMaxSampleValue, MaxSampleValue or a
    BitsPerSample below 16), unless a value lies above it: PNG's standard has sBIT beside values that were scaled up to
    16 bits. Else it is the largest value.

    Raises:
        UserError: a file that cannot be read.
    """
    paths = [path for path in paths if _may_be_deep(path)]
    declared, histogram, others = 0, np.zeros(WHITE + 1), [np.zeros((2, 0))]
    for found in in_threads(_declared_and_values, paths, "looking for black and white"):
        if found is not None:
            declared, values, counts = max(declared, found[0]), *found[1:]
            if values.dtype == np.uint16:
                histogram[values] += counts
            else:
                others.append(np.stack([values, counts]))
    values, counts = np.concatenate([np.stack([np.arange(WHITE + 1), histogram])[:, histogram > 0], *others], axis=1)
    if not len(values):
        return 0, WHITE
    order = values.argsort()
    values, reached = values[order], counts[order].cumsum() / counts.sum()
    low, high = (values[min(np.searchsorted(reached, p / 100 - 1e-12), len(values) - 1)].item() for p in percentiles)
    if percentiles[1] == 100:
        high = max(declared, high)
    return low, high if high > low else low + 1


def warn_if_dark(paths: list[str], white: float) -> None:
    """One line on stderr when the deep ones of the first hundred images have no value above a quarter of the range."""
    if not is_main():
        return
    paths = [path for path in paths if _may_be_deep(path)][:LOOKED_AT]
    deep = (path for path, is_so in zip(paths, in_threads(_is_deep, paths, "reading depths")) if is_so)
    largest = list(in_threads(_largest, deep, "looking for white"))
    most = max(largest, default=white)
    if 0 < most < white / 4:
        likely = next((camera for camera in CAMERAS if most <= camera), most)
        say_once(
            f"warning: no value of the first {len(largest)} images of 16 bits is above {most}, so that at "
            f"data.white={white:.10g} they are nearly black: set data.white={likely} if that is the camera's white, or "
            "data.white=auto"
        )


def _may_be_deep(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in MAY_BE_DEEP


def _is_deep(path: str) -> bool:
    """From the header, but for floating point, which needs a range; a broken file is none, for decoding names it."""
    try:
        with opened(path) as image:
            return is_deep(image) and image.mode != "F"
    except UserError:
        return False


def _largest(path: str) -> int:
    """The largest value of a deep file; 0 of one that cannot be decoded."""
    try:
        with opened(path) as image, memory_for(image):
            return int(deep_values(image).max())
    except UserError:
        return 0


def _declared_and_values(path: str) -> tuple[int, np.ndarray, np.ndarray] | None:
    """The white that a deep file declares, 0 if none; its values and how many pixels have each. None of 8 bits."""
    with opened(path) as image:
        if not is_deep(image):
            return None
        declared = _significant_white(path) if image.format == "PNG" else _tagged_white(image)
        with memory_for(image):
            values = deep_values(image)
            if values.dtype == np.uint16:
                return declared, *np.unique(values, return_counts=True)
            steps = np.quantile(values.astype(float), np.linspace(0, 1, 1001), method="inverted_cdf")
            return declared, steps, np.full(1001, values.size / 1001)


def _tagged_white(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", {})
    for tag in (S_MAX_SAMPLE, MAX_SAMPLE):
        if tag in tags:
            value = tags[tag]
            return int(max(value) if isinstance(value, tuple) else value)
    bits = max(tags.get(BITS_PER_SAMPLE, (16,)))
    return 2**bits - 1 if bits < 16 else 0


def _significant_white(path: str) -> int:
    """Of PNG's chunk sBIT, which Pillow does not read: the color channels' significant bits."""
    with open_regular(path) as file:
        file.seek(8)  # the signature
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"sBIT":
                return 2 ** max(file.read(min(length, 3))) - 1
            if kind in (b"IDAT", b"IEND"):
                break
            file.seek(length + 4, os.SEEK_CUR)  # and the checksum
    return 0
