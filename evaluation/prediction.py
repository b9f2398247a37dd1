"""What predict.py does with files: threads that work ahead, full-size pictures, heat maps over them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.depth import WHITE
from data.geometry import Geometry
from data.images import decode, picture_size
from evaluation.heatmaps import outline, overlay, save


def ahead(function: Callable, items: Iterable, pool: Executor, count: int) -> Iterator:
    """function(item) of each item, in order, by the pool's threads; at most `count` results lie ready at a time."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def decode_whole(path: str, white: int = WHITE) -> Tensor:
    """The upright picture with all its pixels, uint8 (3, h, w); errors as data.images.decode."""
    return decode(path, Geometry(*picture_size(path), white=white))


def write_heatmap(path: str, heat: Tensor, target: Path, calibration: dict, white: int = WHITE) -> None:
    """Write the picture at `path` with its anomaly map `heat` (h, w) over it, and what lies above the pixel threshold
    outlined, as a PNG. The picture is read again, so that no more than those being drawn are held at full size."""
    image, low, high = decode_whole(path, white), calibration["low"], calibration["high"]
    # in strips, because an overlay needs 60 bytes a pixel while it is made
    strips = [overlay(some, own, low, high) for some, own in zip(image.split(256, dim=1), heat.split(256))]
    drawn = torch.cat(strips, dim=1)  # (3, h, w)
    if calibration["pixel_threshold"] is not None:
        drawn = outline(drawn, heat > calibration["pixel_threshold"])
    save(Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()), target)  # (h, w, 3)
