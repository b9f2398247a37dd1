"""Which mask belongs to which image, and what is wrong with masks that can be read.

Letters: N images, h and w the original height and width.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.image_files import find_images
from data.images import image_sizes, in_threads, mask_values
from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.text import first_few, say_once

Masks = Literal["all", "some"]


def masks_of(images: list[str], folder: Path, truth: Path, needed: Masks) -> list[str | None]:
    """The mask of each image `<folder>/<defect>/[...]/<stem>.<any>`: the file `<stem>_mask.<any>` or `<stem>.<any>`
    at the same place below `truth`, None without one (`needed="some"`).

    Names are compared after Unicode normalization (NFC): copied from a Mac, "ü" is two characters.

    Raises:
        UserError: an image with two masks, or with none (`needed="all"`).
    """
    start, root = len(str(folder)) + 1, str(truth)
    found = defaultdict(list)
    for path in find_images(root):
        found[_key(path[len(root) + 1 :])].append(path)
    masks = []
    for image in images:
        key = _key(image[start:])
        own = found[f"{key}_mask"] + found[key]
        if len(own) > 1:
            raise UserError(f"{image} has {len(own)} masks, {' and '.join(own)}: remove all but one")
        if not own and needed == "all":
            raise UserError(
                f"{image} has no mask {os.path.join(root, key)}_mask.png: add it, or set data.masks=some to leave such "
                f"images out of the pixel metrics, or remove the folder {root} to go without pixel metrics"
            )
        masks.append(own[0] if own else None)
    unused = sorted({path for paths in found.values() for path in paths} - {*masks})
    if None in masks and is_main():
        without = [image for image, mask in zip(images, masks) if mask is None]
        line = f"{_count(without)} of {len(images)} defective images have no mask: left out of the pixel metrics"
        _warn(line + (f"; masks that belong to no image: {_count(unused)}" if unused else ""))
    return masks


def names_with_sizes(masks: Sequence[Sequence[str] | None], root: str) -> list[str]:
    """Each file as `<path below root>, <n> bytes`: what tells that the ground truth of a finished run has changed."""
    files = [file for mask in masks for file in mask or ()]
    return [f"{os.path.relpath(file, root)}, {os.path.getsize(file)} bytes" for file in files]


def check_sizes(pairs: list[tuple[str, str]]) -> None:
    """Every mask must be as high and wide as its image; read from the headers."""
    sizes = image_sizes([image for image, _ in pairs]).tolist()
    mask_sizes = image_sizes([mask for _, mask in pairs]).tolist()
    for (image, mask), (height, width), (mask_height, mask_width) in zip(pairs, sizes, mask_sizes):
        if (height, width) != (mask_height, mask_width):
            raise UserError(
                f"mask {mask} is {mask_height} x {mask_width} (height x width), but its image {image} is "
                f"{height} x {width}: make them equal"
            )


class _Marked(NamedTuple):
    """Of one mask: pixels that are not 0, pixels above half of the largest value, and whether these values differ."""

    any: int
    upper: int
    graded: bool


def warn_of_values(masks: Iterable[str], *, numbered: bool = False) -> None:
    """Rank 0 decodes all masks and warns, in a line each, of blank ones and of those with more than two values.

    Every value but 0 marks a defect, as in MVTec's evaluation code; JPEG and smooth resizing put a rim of small
    values around each defect, and nothing in the file says so. `numbered`: the values are numbers of defects.
    """
    masks = list(masks)
    if not is_main():
        return
    marked = dict(zip(masks, in_threads(_marked, masks, "checking masks")))
    if blank := [path for path, values in marked.items() if values.any == 0]:
        _warn(
            f"{_count(blank)} of {len(masks)} masks mark no pixel, so pixel metrics take these defects for normal: "
            "mark them, or remove the masks and set data.masks=some"
        )
    if graded := [path for path, values in marked.items() if values.graded and not numbered]:
        area = sum(marked[path].any for path in graded) / sum(marked[path].upper for path in graded)
        _warn(
            f"{_count(graded)} of {len(masks)} masks have more than two values; all but 0 count as defect, which marks "
            f"{area:.2f} times the pixels above half of the largest value: if the masks were saved as JPEG or resized, "
            "set their pixels to 0 or 255 and save them as PNG"
        )


def _marked(path: str) -> _Marked:
    values = mask_values(path)  # (h, w)
    marked = np.abs(values[values != 0])
    if not marked.size:
        return _Marked(0, 0, False)
    return _Marked(marked.size, int((marked > marked.max() / 2).sum()), bool(marked.min() != marked.max()))


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(path)[0])


def _count(paths: list[str]) -> str:
    """Their number and the first few."""
    return f"{len(paths)} ({first_few(paths)})"


def _warn(line: str) -> None:
    say_once(f"warning: {line}")
