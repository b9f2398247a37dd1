"""A confusion matrix as an image, and test images of the most confused pairs of classes."""

import os
from dataclasses import dataclass

import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import GAP, MARGIN, to_pil
from plots.style import GRID, INK, PAPER, RIGHT, SOFT, WRONG, font, lettered, write

THUMBNAIL, NAMES = 140, 230  # pixels: longer side of an image, and the column of the classes' names


def confusion_image(matrix: Tensor, classes: list[str]) -> Image.Image:
    """The confusion matrix (C, C) of counts as an RGB image, rows the truth.

    A cell's color is its share of the row: blue on the diagonal, red off it, white for none. Counts stand in the cells,
    percentages below them up to 12 classes, and nothing beyond 40 classes, where only the colors are readable.
    """
    n_classes = len(classes)
    cell = 62 if n_classes <= 12 else 40 if n_classes <= 40 else 16
    size, small = min(15, cell - 3), font(11)
    margin = max(int(face.getlength(name)) for name, face in (lettered(name, size, 12 * size) for name in classes)) + 14
    left, top, side = 28 + margin, 34, cell * n_classes  # 28 for the word "truth"
    width = left + side + 16
    image = Image.new("RGB", (max(width, 330), top + side + margin + 28), "white")
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), "color: share of the row (truth)", INK, font=small)

    counts = matrix.tolist()
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            full = RIGHT if i == j else WRONG
            # The square root lets a share of a few per cent show.
            fill = tuple(round(255 + (channel - 255) * share**0.5) for channel in full)
            x, y = left + j * cell, top + i * cell
            draw.rectangle((x, y, x + cell, y + cell), fill, GRID)
            if count == 0 or n_classes > 40:
                continue
            ink = "white" if share > 0.3 else INK
            middle = (x + cell / 2, y + cell / 2)
            if n_classes <= 12:
                draw.text((middle[0], middle[1] - 8), str(count), ink, font=font(size), anchor="mm")
                percent = "<1 %" if share < 0.005 else f"{100 * share:.0f} %"
                draw.text((middle[0], middle[1] + 11), percent, ink, font=small, anchor="mm")
            else:
                draw.text(middle, str(count), ink, font=small, anchor="mm")

    for i, name in enumerate(classes):
        middle = (i + 0.5) * cell
        write(draw, (left - 7, top + middle), name, INK, size, anchor="rm", width=12 * size)
        upright = _turned(name, size, margin)
        image.paste(upright, (round(left + middle - upright.width / 2), top + side + 5))
    truth = _turned("truth", size, 60)
    image.paste(truth, (6, max(0, round(top + side / 2) - 30)))
    draw.text((left + side / 2, top + side + margin + 12), "predicted", INK, font=font(size), anchor="mm")
    return image


@dataclass
class Confused:
    """Test images of one class that were taken for another."""

    truth: str
    predicted: str
    count: int
    share: float  # of the truth's images
    images: list[tuple[str, Tensor]]  # some of them: path and uint8 (3, H, W)


def confused_sheet(pairs: list[Confused], n_test: int) -> Image.Image:
    """A row for each pair: truth and prediction, how many images, and some of them over their paths."""
    columns = max([len(pair.images) for pair in pairs], default=0)
    top, block, row = 92, THUMBNAIL + 2 * GAP, THUMBNAIL + 56
    size = max(2 * MARGIN + NAMES + columns * block, 620), top + len(pairs) * row + MARGIN
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((MARGIN, 18), "Most confused classes", INK, font(24))
    told = "truth -> prediction; images with the most certain mistake first"
    pen.text(
        (MARGIN, 54), told if pairs else f"none: the class of each of {n_test} test images is right", SOFT, font(16)
    )
    for number, pair in enumerate(pairs):
        y = top + number * row
        pen.line((MARGIN, y - GAP, size[0] - MARGIN, y - GAP), GRID)
        share = "<1 %" if pair.share < 0.005 else f"{100 * pair.share:.0f} %"
        counted = f"{pair.count} image{'s' * (pair.count > 1)}, {share} of the truth's"
        shown = f"{len(pair.images)} shown" if len(pair.images) < pair.count else ""
        lines = (pair.truth, INK, 19), (f"-> {pair.predicted}", WRONG, 19), (counted, SOFT, 14), (shown, SOFT, 14)
        for line, (text, ink, height) in enumerate(lines):
            write(pen, (MARGIN, y + 8 + 28 * line), text, ink, height, width=NAMES - 2 * GAP)
        for column, (path, image) in enumerate(pair.images):
            x, (high, wide) = MARGIN + NAMES + column * block, image.shape[1:]
            scale = THUMBNAIL / max(high, wide)
            sides = max(1, round(high * scale)), max(1, round(wide * scale))
            tile = F.interpolate(image[None].float(), sides, mode="bilinear", antialias=True, align_corners=False)[0]
            paper.paste(to_pil(tile.round().clamp(0, 255).byte()), (x, y))
            for line, part in enumerate(part for part in os.path.split(path) if part):
                write(pen, (x, y + THUMBNAIL + 4 + 16 * line), part, SOFT, 12, width=THUMBNAIL + GAP)
    return paper


def _turned(text: str, size: int, length: int) -> Image.Image:
    """`text` written upwards on white, ending at the upper edge of an image `length` high."""
    line = Image.new("RGB", (length, size + 6), "white")
    write(ImageDraw.Draw(line), (length - 3, line.height / 2), text, INK, size, anchor="rm", width=12 * size)
    return line.rotate(90, expand=True)
