"""What predict.py does with files: threads that work ahead, full-size images, heat maps over them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data.depth import WHITE
from data.geometry import Geometry
from data.images import decode, image_size
from plots.heatmaps import legend, mark_peak, outline_above, overlay, save, to_pil
from plots.style import ALARM, GRID, INK, PAPER, font

NARROWEST = 420  # pixels: room for the widest line of a caption


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
    """The upright image with all its pixels, uint8 (3, h, w); errors as data.images.decode."""
    return decode(path, Geometry(*image_size(path), white=white))


def write_heatmap(
    path: str,
    heat: Tensor,
    target: Path,
    calibration: dict,
    white: int = WHITE,
    *,
    score: float,
    threshold: float | None,
    peak: tuple[int, int] | None,
) -> None:
    """Write the image at `path` with its anomaly map `heat` (h, w) over it, what lies above the pixel threshold
    outlined and the peak (y, x) marked, as a PNG; below it stand verdict, score, threshold and legend. Its pixels stay
    where they are. The image is read again, so that no more than those being drawn are held at full size."""
    image, low, high = decode_whole(path, white), calibration["low"], calibration["high"]
    # in strips, because an overlay needs 60 bytes per pixel while it is made
    strips = [overlay(some, own, low, high) for some, own in zip(image.split(256, dim=1), heat.split(256))]
    drawn = to_pil(outline_above(torch.cat(strips, dim=1), heat, calibration["pixel_threshold"]))
    if peak is not None:
        mark_peak(ImageDraw.Draw(drawn), peak, max(12, min(drawn.size) / 20))
    save(captioned(drawn, calibration, score, threshold, peaked=peak is not None), target)


def captioned(
    drawn: Image.Image, calibration: dict, score: float, threshold: float | None, *, peaked: bool = True
) -> Image.Image:
    """`drawn` with a band below it, of letters that grow with the image; one that is narrow gets white at its right."""
    size = min(max(16, round(drawn.width / 50)), 48)
    width, pad, low, high = max(drawn.width, NARROWEST), size // 2, calibration["low"], calibration["high"]
    paper = Image.new("RGB", (width, drawn.height + 10 * size), PAPER)
    paper.paste(drawn, (0, 0))
    draw, y = ImageDraw.Draw(paper), drawn.height + pad
    verdict, fill = ("ANOMALOUS", ALARM) if threshold is not None and score > threshold else ("NORMAL", GRID)
    limit = "no threshold" if threshold is None else f"threshold {threshold:.4g}"
    x = pad
    if threshold is not None:
        end = x + font(size).getlength(verdict) + 2 * pad
        draw.rectangle((x, y, end, y + 1.5 * size), fill)
        draw.text((x + pad, y + 0.75 * size), verdict, INK, font(size), anchor="lm")
        x = end + size
    draw.text((x, y + 0.75 * size), f"score {score:.4g}, {limit}", INK, font(size), anchor="lm")
    at, shown = (pad, y + 2 * size), calibration["pixel_threshold"]
    bottom = legend(paper, at, low, high, shown, masked=False, peaked=peaked, width=width - 2 * pad, size=size)
    return paper.crop((0, 0, width, min(bottom + pad, paper.height)))
