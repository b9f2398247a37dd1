"""Points of a plane as an image: dots in the colors of their classes, or the images themselves where the points lie."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import GAP, MARGIN, to_pil
from plots.style import GRID, INK, PAPER, SOFT, category, font, lettered, write

PANEL, TOP, LEGEND, FINE = 520, 128, 30, 2  # pixels of a plot, above it, of a line of the legend; FINE: drawn larger
NAMED = 24  # classes in the legend
CELLS, TILE = 26, 40  # thumbnails in a row, pixels of each


@dataclass
class Cloud:
    """One plot: points (N, 2), x and y, and what stands above it in two lines."""

    title: str
    note: str
    points: Tensor


def scatter_image(clouds: list[Cloud], labels: Tensor, names: list[str], title: str) -> Image.Image:
    """Plots beside each other, of the same N images; labels (N,) are places in `names`, which stand at the median of
    their points and in the legend. Axes have no numbers, as they mean nothing."""
    present = labels.unique().tolist()
    columns = max(1, len(clouds))
    width = 2 * MARGIN + columns * (PANEL + 2 * MARGIN) - 2 * MARGIN
    each = max(1, (width - 2 * MARGIN) // 260)  # names in a line of the legend
    shown = present[:NAMED] if len(present) > 1 else []
    lines = -(-(len(shown) + (len(present) > NAMED)) // each)
    paper = Image.new("RGB", (width, TOP + PANEL + MARGIN + lines * LEGEND + MARGIN), PAPER)
    for number, cloud in enumerate(clouds):
        left = MARGIN + number * (PANEL + 2 * MARGIN)
        plot = _plot(cloud.points, labels, [names[i] for i in present] if len(present) > 1 else [], present)
        paper.paste(plot, (left, TOP))
        pen = ImageDraw.Draw(paper)
        pen.rectangle((left, TOP, left + PANEL, TOP + PANEL), outline=GRID)
        write(pen, (left, TOP - 62), cloud.title, INK, 20, width=PANEL)
        write(pen, (left, TOP - 32), cloud.note, SOFT, 16, width=PANEL)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 16), title, INK, 24, width=width - 2 * MARGIN)
    counts = labels.bincount(minlength=len(names)).tolist()
    for place, label in enumerate(shown):
        x, y = MARGIN + place % each * 260, TOP + PANEL + MARGIN + place // each * LEGEND
        pen.ellipse((x, y + 3, x + 14, y + 17), category(label))
        write(pen, (x + 22, y), f"{names[label]} ({counts[label]:,})", INK, 16, width=260 - 22 - GAP)
    if len(present) > NAMED:
        x, y = MARGIN + NAMED % each * 260, TOP + PANEL + MARGIN + NAMED // each * LEGEND
        pen.text((x, y), f"and {len(present) - NAMED:,} more classes", SOFT, font(16))
    return paper


def _plot(points: Tensor, labels: Tensor, names: list[str], present: list[int]) -> Image.Image:
    """Dots from back to front in the order of the images, and the names on top; of one class without any name."""
    side = FINE * PANEL
    plot = Image.new("RGB", (side, side), PAPER)
    pen, at = ImageDraw.Draw(plot), fitted_points(points) * (side - 1)
    radius = FINE * (5 if len(points) <= 300 else 4 if len(points) <= 1500 else 3)
    for (x, y), label in zip(at.tolist(), labels.tolist()):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), category(label), PAPER, 1)
    for name, label in zip(names, present):
        x, y = at[labels == label].median(0).values.tolist()
        shown, face = lettered(name, FINE * 15, FINE * 180)
        half = face.getlength(shown) / 2
        x = min(max(x, half + FINE), side - half - FINE)
        y = min(max(y, FINE * 10), side - FINE * 10)
        pen.text((x, y), shown, INK, face, anchor="mm", stroke_width=FINE * 2, stroke_fill=PAPER)
    return plot.resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def thumbnail_map(points: Tensor, thumbnails: Tensor, title: str) -> Image.Image:
    """Images uint8 (N, 3, s, s) where their points (N, 2) lie, on a grid: in each cell the image nearest to its
    center."""
    side = CELLS * TILE
    paper = Image.new("RGB", (side + 2 * MARGIN, side + 62 + MARGIN), PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 18), title, INK, 22, width=side)
    place = fitted_points(points) * CELLS  # (N, 2)
    cells = place.long().clamp(max=CELLS - 1)
    distance = (place - cells - 0.5).square().sum(1)
    shown: dict[tuple[int, int], int] = {}
    for i in distance.argsort(descending=True, stable=True).tolist():
        shown[tuple(cells[i].tolist())] = i  # the nearest comes last
    for (column, row), i in shown.items():
        image = to_pil(thumbnails[i]).resize((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
        paper.paste(image, (MARGIN + column * TILE + 1, 62 + row * TILE + 1))
    return paper


def fitted_points(points: Tensor, border: float = 0.04) -> Tensor:
    """Points (N, 2) in the unit square with one scale for both axes, centered, y downwards."""
    points = points.double()
    low, high = points.amin(0), points.amax(0)
    extent = (high - low).amax().clamp(min=torch.finfo(points.dtype).tiny)
    inside = (points - (low + high) / 2) / extent * (1 - 2 * border) + 0.5
    return torch.stack([inside[:, 0], 1 - inside[:, 1]], 1)
