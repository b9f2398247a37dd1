"""One pass over all images of a split, each decoded once; what is kept are numbers and a fingerprint of each.

Sums are whole numbers (of floating-point files: summed exactly later, by math.fsum), so nothing depends on how many
threads and processes there are.

Letters: N images of a split, h and w an image's original height and width, C its channels.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data.dataset import Dataset
from data.depth import WHITE, deep_values, is_deep, to_8_bit, white_is_zero
from data.duplicates import SIDE, Fingerprints, print_of
from data.images import in_threads, upright
from data.opening import REMEDY
from runtime.distributed import gather_objects, gather_rows, rank, world_size
from runtime.errors import UserError

ROW = np.dtype(
    [
        *(("readable", "?"), ("height", "i4"), ("width", "i4"), ("bytes", "i8"), ("mode", "S8"), ("format", "S12")),
        ("gray", "?"),  # all channels are equal
        ("sums", "i8", (3,)),  # of the 8-bit values of red, green and blue
        ("squares", "i8", (3,)),
        *(("edges", "i8"), ("edges_squared", "i8")),  # of the gray image's edges
        ("entropy", "f8"),  # bits
        ("deep", "?"),  # more than 8 bits a channel: the fields below are of the stored values
        *(("whole", "i8", (2, 3)), ("real", "f8", (2, 3))),  # sums and squares; of files with up to 16 bits, of others
        *(("low", "f8"), ("high", "f8")),
        ("digest", "u8", (2,)),  # of the decoded pixels
        *(("hashes", "u1", (8, 16)), ("cells", "u1", (16, 16))),
    ]
)
ROWS = 2**20  # values of a deep image that are looked at together


@dataclass
class Inspected:
    """A split and what is known of its images.

    Attributes:
        rows: a `ROW` of each image, (N,), zeros where it is broken.
        broken: {position: reason} of the images that cannot be read.
    """

    dataset: Dataset
    rows: np.ndarray
    broken: dict[int, str]

    @cached_property
    def kinds(self) -> list[str]:
        """Of each image its class, of anomaly sets `good` or its defect."""
        return self.dataset.kinds

    @cached_property
    def names(self) -> list[str]:
        return self.dataset.names

    @cached_property
    def readable(self) -> np.ndarray:
        """Positions of the images that can be read, ascending."""
        return np.flatnonzero(self.rows["readable"])

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """Of the readable images."""
        rows = self.rows[self.readable]
        return Fingerprints(*(torch.from_numpy(rows[name].copy()) for name in ("hashes", "cells")))


def inspect(dataset: Dataset, device: torch.device) -> Inspected:
    """All processes call it, each looks at its part, and all get the whole result; device: to exchange it by."""
    positions = torch.arange(len(dataset)).tensor_split(world_size())[rank()].tolist()
    rows, broken = np.zeros(len(positions), ROW), {}
    looks = in_threads(partial(_look, dataset), positions, f"looking at {dataset.split}")
    for k, (position, look) in enumerate(zip(positions, looks)):
        if isinstance(look, str):
            broken[position] = look
        else:
            rows[k] = look
    if world_size() > 1:
        raw = torch.from_numpy(rows.view(np.uint8).reshape(len(rows), ROW.itemsize))
        rows = gather_rows(raw.to(device)).cpu().numpy().reshape(-1).view(ROW)
        broken = {position: reason for part in gather_objects(broken) for position, reason in part.items()}
    return Inspected(dataset, rows, broken)


def tile(dataset: Dataset, index: int, side: int) -> Tensor:
    """An image in a square of `side` pixels, its proportions kept: uint8 (3, h, w); a small one is enlarged by a whole
    factor, so that its pixels can be seen."""
    with dataset.stored(index) as stored:
        if stored.format == "JPEG" and dataset.box(index) is None:
            stored.draft("RGB", (side, side))
        image = _eight_bits(dataset, index, stored).convert("RGB")
    factor = side // max(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    return pil_to_tensor(image)


def _look(dataset: Dataset, index: int) -> np.void | str:
    """The `ROW` of an image, or why it cannot be read (here and now: MemoryError)."""
    row, path = np.zeros((), ROW), dataset.paths[index]
    try:
        with dataset.stored(index) as stored:
            row["mode"], row["format"] = stored.mode.encode(), (stored.format or "array").encode()
            row["bytes"] = os.path.getsize(path) if stored.format else 0
            deep = is_deep(stored)  # of a file whose pixels are not yet loaded
            image = _eight_bits(dataset, index, stored)
            values = _deep(row, stored, dataset.box(index)) if deep else image
            pixels = hashlib.md5(f"{image.mode} {image.size}".encode(), usedforsecurity=False)
            pixels.update(values.tobytes())
            row["digest"] = np.frombuffer(pixels.digest(), np.uint64)
            _measure(row, image)
    except (UserError, MemoryError) as error:  # of one image for which there is no memory the others are still told
        return bare_reason(str(error), path)
    row["readable"] = True
    return row[()]


def bare_reason(text: str, path: str) -> str:
    """What a `UserError` about an image says, without the path and what to do."""
    return text.removesuffix(REMEDY).removeprefix(f"cannot read image {path}: ")


def _eight_bits(dataset: Dataset, index: int, stored: Image.Image) -> Image.Image:
    """L or RGB, upright, in the original size; of a file of which the image is a part, that part."""
    geometry, box = dataset.geometry, dataset.box(index)
    image = upright(stored, partial(to_8_bit, white=geometry.white, black=geometry.black))
    return image if box is None else image.crop((box[1], box[0], box[1] + box[3], box[0] + box[2]))


def _measure(row: np.ndarray, image: Image.Image) -> None:
    """What the 8-bit image (L or RGB) says, most of it from histograms."""
    row["width"], row["height"] = image.size
    counts = np.array(image.histogram(), np.int64).reshape(-1, 256)  # (C, 256)
    row["sums"], row["squares"] = counts @ np.arange(256), counts @ np.arange(256) ** 2  # of one channel: three times
    gray = image.convert("L")
    row["gray"] = len(counts) == 1 or _all_equal(image, counts)
    different = counts[:1] if row["gray"] else counts
    shares = different[different > 0] / different.sum()
    row["entropy"] = -(shares * np.log2(shares)).sum()
    edges = np.array(gray.filter(ImageFilter.FIND_EDGES).histogram(), np.int64)
    row["edges"], row["edges_squared"] = edges @ np.arange(256), edges @ np.arange(256) ** 2
    small = print_of(np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    prints = Fingerprints.of([small])
    row["hashes"], row["cells"] = prints.hashes[0].numpy(), prints.cells[0].numpy()


def _all_equal(image: Image.Image, counts: np.ndarray) -> bool:
    if (counts != counts[0]).any():
        return False
    red, *others = image.split()
    return all(red.tobytes() == other.tobytes() for other in others)


def _deep(row: np.ndarray, stored: Image.Image, box: list[int] | None) -> np.ndarray:
    """The stored values (h, w) or (h, w, 3), those of the box, and into the row their sums; of what counts from white,
    from black."""
    values = deep_values(stored)
    values = WHITE - values if white_is_zero(stored) else values
    if box is not None:
        values = np.ascontiguousarray(values[box[0] : box[0] + box[2], box[1] : box[1] + box[3]])
    flat = values.reshape(len(values) * values.shape[1], -1)  # (h * w, C)
    whole, real = np.zeros((2, 3), np.int64), np.zeros((2, 3))
    for part in np.array_split(flat, -(-len(flat) // ROWS)):
        if values.dtype == np.uint16:
            numbers = part.astype(np.int64)
            whole += np.stack([numbers.sum(0), (numbers**2).sum(0)])  # (2, C), of one channel three times
        else:
            reals = part.astype(np.float64)
            real += np.stack([reals.sum(0), (reals**2).sum(0)])
    row["deep"], row["whole"], row["real"] = True, whole, real
    row["low"], row["high"] = values.min(), values.max()
    return values
