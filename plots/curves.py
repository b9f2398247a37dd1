"""Scores of a test set as images: ROC and precision-recall curves, and histograms above each other. Pillow draws.

Grey is usual, orange is what the threshold calls anomalous.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import MARGIN
from plots.style import ALARM, GRID, INK, PAPER, SOFT, USUAL, font, write
from runtime.errors import UserError

PANEL, LEFT, TOP, DOT = 400, 44, 134, 7  # pixels: side of a plot, room for its numbers, above it, radius of the dot
ROW, BAR, NAMES, PLOT, NOTES, BINS = 48, 38, 250, 640, 160, 60  # pixels of the histograms, and how many bars

Box = tuple[int, int, int, int]  # left, top, width, height of a plot, pixels


@dataclass(kw_only=True)
class RankingCurves:
    """What ROC and precision-recall curves are drawn from, at each distinct score from the highest on."""

    false_alarm_rate: np.ndarray  # (P,) share of the normal images that score at least as high
    recall: np.ndarray  # (P,) share of the anomalous images that do
    precision: np.ndarray  # (P,) share of anomalous ones among the images that do
    auroc: float | None  # None without an image of either class
    ap: float | None  # likewise
    n_normal: int
    n_anomalous: int
    threshold: float | None
    hits: int  # anomalous images above the threshold
    false_alarms: int  # normal images above it


def roc_pr_image(curves: RankingCurves, title: str) -> Image.Image:
    """ROC and precision-recall curve side by side, 1008 x 640, AUROC and AP in words, a dot where the threshold is.

    The ROC is straight between distinct scores, precision is a step as in AP. Without an image of either class the
    plots say so and stay empty.
    """
    boxes = [(MARGIN + LEFT + i * (PANEL + LEFT + 2 * MARGIN), TOP, PANEL, PANEL) for i in (0, 1)]
    paper = Image.new("RGB", (boxes[1][0] + PANEL + 2 * MARGIN, TOP + PANEL + 106), PAPER)
    draw = ImageDraw.Draw(paper)
    write(draw, (MARGIN, 18), title, INK, 24, width=paper.width - 2 * MARGIN)
    headings = [
        f"{name} undefined" if value is None else f"{name} {value:.3f}"
        for name, value in (("ROC: AUROC", curves.auroc), ("Precision-recall: AP", curves.ap))
    ]
    unit_axes(draw, boxes[0], headings[0], "false-alarm rate (normal images)", "detection rate (anomalous images)")
    unit_axes(draw, boxes[1], headings[1], "recall (detection rate)", "precision (share of alarms that are right)")
    normal, anomalous = curves.n_normal, curves.n_anomalous
    if not (normal and anomalous):
        missing = "no image" if not (normal or anomalous) else f"no {'anomalous' if normal else 'normal'} image"
        for left, top, width, height in boxes:
            draw.text((left + width / 2, top + height / 2), missing, SOFT, font(20), anchor="mm")
        return paper

    share = anomalous / (normal + anomalous)
    dashed(draw, [place(boxes[0], x, x) for x in (0, 1)])
    dashed(draw, [place(boxes[1], x, share) for x in (0, 1)])
    points = [(0, 0), *zip(curves.false_alarm_rate, curves.recall)]
    draw.line([place(boxes[0], x, y) for x, y in points], USUAL, 3, joint="curve")
    starts = np.append(0, curves.recall[:-1])
    steps = [point for a, b, y in zip(starts, curves.recall, curves.precision) for point in ((a, y), (b, y))]
    draw.line([place(boxes[1], x, y) for x, y in steps], USUAL, 3, joint="curve")
    y = TOP + PANEL + 78
    dashed(draw, [(MARGIN + LEFT - 12, y), (MARGIN + LEFT + 12, y)])
    draw.text((MARGIN + LEFT + 22, y), "chance", INK, font(16), anchor="lm")
    if curves.threshold is not None:
        hits, false = curves.hits, curves.false_alarms
        counts = f"finds {hits} of {anomalous} anomalous, calls {false} of {normal} normal anomalous"
        x = MARGIN + LEFT + 120
        dot(draw, (x, y))
        draw.text((x + 16, y), f"threshold {curves.threshold:.6g}: {counts}", INK, font(16), anchor="lm")
        dot(draw, place(boxes[0], false / normal, hits / anomalous))
        if hits + false:  # without an alarm there is no precision
            dot(draw, place(boxes[1], hits / anomalous, hits / (hits + false)))
    return paper


def histogram_image(groups: dict[str, np.ndarray | Tensor], threshold: float | None) -> Image.Image:
    """Score histograms of `groups` {name: (N_i,)} in rows over one axis, 1098 x (164 + 48 per group) pixels.

    The threshold is a line between two bars: what is above it is orange. Each row is as high as its fullest bar. On the
    right stands how many images of the group are above the threshold. Infinite scores are drawn at the ends.

    Raises:
        UserError: a score is NaN.
    """
    scores = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    if wrong := [name for name, values in scores.items() if np.isnan(values).any()]:
        raise UserError(f"some scores of {', '.join(wrong)} are not a number: look for a loss that diverged")
    edges = bar_edges(np.concatenate([np.empty(0), *scores.values()]), threshold)
    left, top, bottom = MARGIN + NAMES, 104, 104 + ROW * len(scores)
    box = (left, top, PLOT, bottom - top)
    paper = Image.new("RGB", (left + PLOT + NOTES + MARGIN, bottom + 60), PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((MARGIN, 18), "Image scores", INK, font(24))
    x, key = MARGIN, [(USUAL, "not above the threshold"), (ALARM, "above it: called anomalous")]
    for color, text in [(USUAL, "images")] if threshold is None else key:
        draw.rectangle((x, 64, x + 16, 80), color)
        draw.text((x + 24, 72), text, INK, font(16), anchor="lm")
        x += 54 + round(font(16).getlength(text))
    if threshold is not None:
        dashed(draw, [(x + 8, 62), (x + 8, 82)], INK)
        draw.text((x + 20, 72), f"threshold {threshold:.6g}", INK, font(16), anchor="lm")

    span = edges[-1] - edges[0]
    for value, text in ticks(edges[0], edges[-1]):
        x, _ = place(box, (value - edges[0]) / span, 0)
        draw.line((x, top, x, bottom + 5), GRID)
        draw.text((x, bottom + 8), text, INK, font(15), anchor="ma")
    about = "image score; each row is scaled to its fullest bar"
    draw.text((left + PLOT, bottom + 32), about, SOFT, font(15), anchor="ra")
    for number, (name, values) in enumerate(scores.items()):
        base = top + ROW * (number + 1)
        draw.line((left, base, left + PLOT, base), SOFT)
        write(draw, (MARGIN, base - 14), name, INK, 17, anchor="lm", width=NAMES - 20)
        above = None if threshold is None else int((values > threshold).sum())
        note = f"n = {len(values)}" if above is None else f"{above} of {len(values)} above"
        note = note if len(values) else "no image"
        draw.text((left + PLOT + 14, base - 14), note, SOFT, font(16), anchor="lm")
        bins = np.searchsorted(edges, values.clip(edges[1], edges[-1]), "left") - 1  # bars (a, b], as "above" is strict
        counts = np.bincount(bins, minlength=len(edges) - 1)
        for i in np.flatnonzero(counts):
            sides = [place(box, (edge - edges[0]) / span, 0)[0] for edge in edges[i : i + 2]]
            height = max(3, round(BAR * counts[i] / counts.max()))
            above = threshold is not None and edges[i] >= threshold
            draw.rectangle((sides[0] + 1, base - height, sides[1] - 1, base - 1), ALARM if above else USUAL)
    if threshold is not None:
        x, _ = place(box, (threshold - edges[0]) / span, 0)
        dashed(draw, [(x, top), (x, bottom)], INK)
    return paper


def bar_edges(values: np.ndarray, threshold: float | None) -> np.ndarray:
    """About BINS equal bars that hold the finite `values` and the threshold, which is an edge: (E,) ascending."""
    values = values[np.isfinite(values)]
    values = values if threshold is None else np.append(values, threshold)
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    width = (high - low) / BINS
    if width <= abs(low) * 1e-9:  # one value: in the middle
        width = max(abs(low), 1.0) * 0.1 / BINS
        low, high = low - BINS / 2 * width, high + BINS / 2 * width
    anchor = low if threshold is None else threshold
    return anchor + width * np.arange(math.floor((low - anchor) / width) - 1, math.ceil((high - anchor) / width) + 2)


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About six round numbers in [low, high], and how to write them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power * 6.5 >= high - low)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    plain = decimals <= 5 and max(abs(low), abs(high)) < 1e6
    return [(value, f"{value:.{decimals}f}" if plain else f"{value:.3g}") for value in values]


def unit_axes(draw: ImageDraw.ImageDraw, box: Box, heading: str, x_name: str, y_name: str) -> None:
    """A frame from 0 to 1 with a grid, numbers and names; the name of y stands on top, to be read."""
    left, top, width, height = box
    draw.text((left, top - 70), heading, INK, font(20))
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = place(box, value, value)
        draw.line((x, top, x, top + height + 5), GRID)
        draw.line((left - 5, y, left + width, y), GRID)
        draw.text((x, top + height + 8), f"{value:g}", INK, font(15), anchor="ma")
        draw.text((left - 9, y), f"{value:g}", INK, font(15), anchor="rm")
    draw.rectangle((left, top, left + width, top + height), outline=SOFT)
    draw.text((left + width / 2, top + height + 30), x_name, INK, font(16), anchor="ma")
    draw.text((left, top - 12), y_name, INK, font(16), anchor="ls")


def place(box: Box, x: float, y: float) -> tuple[int, int]:
    """Pixel of (x, y) in [0, 1], y upwards."""
    left, top, width, height = box
    return round(left + x * width), round(top + (1 - y) * height)


def dot(draw: ImageDraw.ImageDraw, center: tuple[int, int]) -> None:
    x, y = center
    draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), ALARM, PAPER, 2)


def dashed(draw: ImageDraw.ImageDraw, ends: list[tuple[int, int]], color: tuple[int, int, int] = SOFT) -> None:
    """A line of dashes 6 pixels long between two pixels."""
    (x0, y0), (x1, y1) = ends
    length = max(1.0, math.hypot(x1 - x0, y1 - y0))
    for start in np.arange(0, length, 10):
        a, b = start / length, min(1.0, (start + 6) / length)
        draw.line((x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0)), color, 2)
