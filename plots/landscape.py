"""Loss landscapes: contours and curves as images, and surfaces as triangles. Pillow draws.

Dark is low, pale is high. Where the highest loss is ten times the lowest, or more, colors and heights are logarithms.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from plots.bars import SHADES
from plots.curves import Box, dashed, place, ticks
from plots.heatmaps import MARGIN, colorize
from plots.style import GRID, INK, PAPER, RIM, SOFT, font, write

PLOT, LEFT, TOP, BELOW, FINE = 408, 56, 96, 62, 2  # pixels: side of a plot, around it; drawn so many times as large
BAR, BAR_ROOM, ROW = 22, 110, 3  # pixels of the color bar, and it with its numbers; plots in a row
WIDE, HIGH = 760, 380  # pixels of the curves
MOST = 255  # points of a surface along an axis
UNKNOWN = (150, 190, 190)  # where the loss is no number


@dataclass(kw_only=True)
class Landscape:
    """What is drawn of one run."""

    name: str
    note: str  # below the name: its numbers
    x: Tensor  # (X,) rising
    y: Tensor | None  # (Y,) rising; None: a curve
    loss: Tensor  # (Y, X), of a curve (X,)
    marks: list[tuple[float, float, str]]  # x, y and name of a network


class Scale:
    """Losses as shares of the way from the lowest to the highest finite one of all landscapes."""

    def __init__(self, losses: list[Tensor]):
        values = torch.cat([loss.flatten() for loss in losses]).double()
        values = values[values.isfinite()]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        self.is_log = low > 0 and high >= 10 * low
        if not self.is_log and high - low <= 1e-9 * abs(low):  # flat: in the middle
            low, high = low - max(abs(low), 1.0) * 0.1, high + max(abs(low), 1.0) * 0.1
        self.low, self.high = low, high

    def share(self, loss: Tensor) -> Tensor:
        """In [0, 1]; NaN of what is no number."""
        loss = torch.where(loss.isfinite(), loss.double(), torch.nan)
        if self.is_log:
            return (loss / self.low).log() / math.log(self.high / self.low)
        return (loss - self.low) / (self.high - self.low)

    def levels(self) -> list[tuple[float, str]]:
        """Round losses, and how they are written."""
        if not self.is_log:
            return ticks(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 4 else (1, 3) if len(decades) <= 7 else (1,)
        values = [factor * 10.0**decade for decade in decades for factor in factors]
        return [(value, f"{value:g}") for value in values if self.low <= value <= self.high]


def contour_image(landscapes: list[Landscape], x_name: str, y_name: str) -> Image.Image:
    """A plot of each, side by side on one scale, with lines of equal loss and a color bar."""
    scale = Scale([each.loss for each in landscapes])
    columns = min(ROW, len(landscapes))
    rows = -(-len(landscapes) // columns)
    width, height = LEFT + PLOT + MARGIN, TOP + PLOT + BELOW
    paper = Image.new("RGB", (columns * width + MARGIN + BAR_ROOM, rows * height), PAPER)
    draw = ImageDraw.Draw(paper)
    for number, each in enumerate(landscapes):
        box = (number % columns * width + LEFT, number // columns * height + TOP, PLOT, PLOT)
        _contours(paper, draw, box, each, scale)
        left, top, _, _ = box
        draw.text((left + PLOT / 2, top + PLOT + 30), x_name, INK, font(16), anchor="ma")
        draw.text((left, top - 8), y_name, SOFT, font(15), anchor="ls")
    _color_bar(paper, draw, (columns * width + MARGIN, TOP, BAR, PLOT), scale)
    return paper


def _contours(paper: Image.Image, draw: ImageDraw.ImageDraw, box: Box, each: Landscape, scale: Scale) -> None:
    assert each.y is not None
    left, top, width, height = box
    write(draw, (left, top - 86), each.name, INK, 20, width=width)
    write(draw, (left, top - 58), each.note, SOFT, 15, width=width)
    shares = scale.share(each.loss).flip(0)  # the first row is on top, where y is highest
    size = (height * FINE, width * FINE)
    known = shares.isfinite()
    fine = F.interpolate(shares.nan_to_num(1.0)[None, None].float(), size, mode="bilinear", align_corners=True)[0, 0]
    is_known = F.interpolate(known[None, None].float(), size, mode="nearest-exact")[0, 0] > 0.5
    image = torch.where(is_known, colorize(fine), torch.tensor(UNKNOWN, dtype=torch.uint8)[:, None, None])
    levels = scale.share(torch.tensor([value for value, _ in scale.levels()], dtype=torch.float64)).float()
    bands = torch.bucketize(fine, levels)
    edge = torch.zeros_like(is_known)
    edge[:, 1:] |= bands[:, 1:] != bands[:, :-1]
    edge[1:] |= bands[1:] != bands[:-1]
    lines = torch.where(fine > 0.5, 0, 255).to(torch.uint8)  # black on pale, white on dark
    image = torch.where(edge & is_known, lines.expand(3, -1, -1), image)
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BOX)  # (h, w, 3)
    paper.paste(pixels, (left, top))
    draw.rectangle((left, top, left + width, top + height), outline=SOFT)
    spans = [(float(axis[0]), float(axis[-1])) for axis in (each.x, each.y)]
    for (low, high), across in zip(spans, (True, False)):
        for value, text in ticks(low, high):
            share = (value - low) / (high - low)
            x, y = place(box, share, 0) if across else place(box, 0, share)
            draw.line((x, y, x, y + 5) if across else (x - 5, y, x, y), SOFT)
            at, anchor = ((x, y + 8), "ma") if across else ((x - 8, y), "rm")
            draw.text(at, text, INK, font(14), anchor=anchor)
    for x, y, name in each.marks:
        at = [(value - low) / (high - low) for value, (low, high) in zip((x, y), spans)]
        if all(0 <= share <= 1 for share in at):
            _cross(draw, place(box, *at))
            across, down = place(box, *at)
            write(draw, (across + 10, down - 20), name, PAPER, 14)


def _cross(draw: ImageDraw.ImageDraw, center: tuple[int, int]) -> None:
    """White with a black rim, which shows on every color."""
    x, y = center
    for color, wide in ((RIM, 5), (PAPER, 2)):
        draw.line((x - 8, y, x + 8, y), color, wide)
        draw.line((x, y - 8, x, y + 8), color, wide)


def _color_bar(paper: Image.Image, draw: ImageDraw.ImageDraw, box: Box, scale: Scale) -> None:
    left, top, width, height = box
    ramp = colorize(torch.linspace(1, 0, height)[:, None].expand(-1, width))  # (3, h, w)
    paper.paste(Image.fromarray(ramp.permute(1, 2, 0).numpy()), (left, top))  # (h, w, 3)
    draw.rectangle((left, top, left + width, top + height), outline=SOFT)
    draw.text((left, top - 8), "loss", INK, font(16), anchor="ls")
    for value, text in scale.levels():
        _, y = place(box, 0, float(scale.share(torch.tensor(value))))
        draw.line((left + width, y, left + width + 5, y), SOFT)
        draw.text((left + width + 9, y), text, INK, font(14), anchor="lm")


def curve_image(landscapes: list[Landscape], x_name: str) -> Image.Image:
    """One curve of each over the shift, with a key; a curve ends where the loss is no number."""
    scale, x = Scale([each.loss for each in landscapes]), torch.cat([each.x for each in landscapes])
    low, high = float(x.min()), float(x.max())
    top = 40 + 26 * len(landscapes)
    box = (LEFT + MARGIN, top, WIDE, HIGH)
    paper = Image.new("RGB", (LEFT + WIDE + 3 * MARGIN, top + HIGH + BELOW), PAPER)
    draw = ImageDraw.Draw(paper)
    for value, text in ticks(low, high):
        across, down = place(box, (value - low) / (high - low), 0)
        draw.line((across, top, across, down + 5), GRID)
        draw.text((across, down + 8), text, INK, font(14), anchor="ma")
    for value, text in scale.levels():
        across, down = place(box, 0, float(scale.share(torch.tensor(value))))
        draw.line((across - 5, down, across + WIDE, down), GRID)
        draw.text((across - 9, down), text, INK, font(14), anchor="rm")
    draw.rectangle((box[0], top, box[0] + WIDE, top + HIGH), outline=SOFT)
    draw.text((box[0] + WIDE / 2, top + HIGH + 30), x_name, INK, font(16), anchor="ma")
    draw.text((box[0], top - 8), "loss", INK, font(16), anchor="ls")
    for number, each in enumerate(landscapes):
        color = SHADES[number % len(SHADES)]
        write(draw, (box[0] + 28, 16 + 26 * number), f"{each.name}: {each.note}", INK, 16, width=WIDE - 28)
        draw.line((box[0], 26 + 26 * number, box[0] + 20, 26 + 26 * number), color, 3)
        shares, points = scale.share(each.loss), []
        for at, share in zip(((each.x - low) / (high - low)).tolist(), shares.tolist()):
            if math.isfinite(share):
                points.append(place(box, at, share))
            elif points:
                draw.line(points, color, 3, joint="curve")
                points = []
        draw.line(points, color, 3, joint="curve")
        for mark, _, name in each.marks:
            across, down = place(box, (mark - low) / (high - low), 0)
            dashed(draw, [(across, top), (across, down)])
            if number == 0:
                write(draw, (across + 5, top + 4), name, SOFT, 14)
    return paper


def surface(each: Landscape, scale: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices (N, 3) in a box of side 2, x to the right, the loss upwards, y away; their colors uint8 (N, 3);
    triangles int32 (F, 3). Of larger grids every second point, or fewer: TensorBoard numbers vertices in 16 bits."""
    assert each.y is not None
    loss = each.loss[:: -(-len(each.y) // MOST), :: -(-len(each.x) // MOST)]
    rows, columns = loss.shape
    share = scale.share(loss).nan_to_num(1.0)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (rows, columns)), indexing="ij")
    vertices = torch.stack([x, share * 1.4 - 0.7, -y], dim=-1).reshape(-1, 3)  # (N, 3)
    colors = colorize(share).permute(1, 2, 0).reshape(-1, 3)  # (N, 3)
    corner = (torch.arange(rows - 1)[:, None] * columns + torch.arange(columns - 1)).flatten()  # (F / 2,)
    halves = [torch.stack([corner, corner + columns, corner + 1], 1)]
    halves += [torch.stack([corner + 1, corner + columns, corner + columns + 1], 1)]
    return vertices, colors, torch.cat(halves).to(torch.int32)
