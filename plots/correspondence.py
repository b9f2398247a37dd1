"""Two images side by side: lines between patches that correspond, and where the second looks like a point of the
first."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import MARGIN, colorize, mark_peak, overlay, to_pil
from plots.style import INK, PAPER, RIM, SOFT, category, font, write

SIDE, BETWEEN, TOP = 400, 60, 126  # pixels: longer side of an image, between two, and above them


@dataclass
class Likeness:
    """The cosines of all patches of the second image with one of the first; places are y, x in pixels."""

    point: tuple[float, float]
    cosines: Tensor  # (h, w)
    peak: tuple[float, float]  # where they are largest


def match_image(
    first: Tensor, second: Tensor, lines: Tensor, *, names: list[str], title: str, note: str
) -> Image.Image:
    """Images uint8 (3, H, W) beside each other, and a line for each of `lines` (M, 4): y, x in the first, then in the
    second. Colors only tell lines apart."""
    paper, pen, scale, right = _beside(first, second, names, title, note)
    for number, (y0, x0, y1, x1) in enumerate((lines * scale).tolist()):
        ends = (MARGIN + x0, TOP + y0), (right + x1, TOP + y1)
        pen.line(ends, RIM, 4)
        pen.line(ends, category(number % 6), 2)  # black, the seventh, is the rim
        for x, y in ends:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), category(number % 6), RIM)
    return paper


def likeness_image(first: Tensor, second: Tensor, likeness: Likeness, *, names: list[str], title: str) -> Image.Image:
    """The point in the first image, and over the second the cosines, from the lowest to the highest."""
    low, high = float(likeness.cosines.min()), float(likeness.cosines.max())
    note = f"cosine with the patch at the cross: {low:.3f} (bare) to {high:.3f} (bright)"
    heat = F.interpolate(likeness.cosines[None, None].float(), second.shape[1:], mode="bilinear")[0, 0]
    drawn = overlay(second, heat, low, max(high, low + 1e-6))
    paper, pen, scale, right = _beside(first, drawn, names, title, note)
    for left, (y, x) in ((MARGIN, likeness.point), (right, likeness.peak)):
        mark_peak(pen, (TOP + y * scale, left + x * scale), 18)
    ramp = to_pil(colorize(torch.linspace(0, 1, 120).expand(12, -1)))
    paper.paste(ramp, (paper.width - MARGIN - 120, TOP - 58))
    return paper


def _beside(
    first: Tensor, second: Tensor, names: list[str], title: str, note: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, float, int]:
    """Both on paper; the pen, how much they are enlarged, and where the second begins."""
    scale = SIDE / max(first.shape[1:])
    high, wide = (round(side * scale) for side in first.shape[1:])
    right = MARGIN + wide + BETWEEN
    paper = Image.new("RGB", (right + wide + MARGIN, TOP + high + MARGIN), PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 16), title, INK, 22, width=paper.width - 2 * MARGIN)
    pen.text((MARGIN, 50), note, SOFT, font(16))
    for left, image, name in ((MARGIN, first, names[0]), (right, second, names[1])):
        write(pen, (left, TOP - 28), name, SOFT, 16, width=wide)
        paper.paste(to_pil(image.cpu()).resize((wide, high), Image.Resampling.BICUBIC), (left, TOP))
    return paper, pen, scale, right
