"""Charts as SVG, for pages: histograms with a limit, bars of counts, and lines. Colors: plots/style.py."""

import math

import numpy as np

from plots.curves import bar_edges, ticks
from plots.page import safe
from plots.style import ALARM, GRID, INK, SOFT, USUAL

WIDTH, NAMES, NOTES, ROW, TOP = 760, 150, 130, 46, 44  # pixels: of a chart, its names and notes, a group, the title
SHADES = ((95, 105, 115), (0, 130, 200), (170, 120, 190), (60, 160, 120), (210, 140, 60))  # of splits, in their order
LINES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (170, 90, 150), (95, 105, 115), (60, 170, 230), (120, 80, 40))
DASHES = ("", "7 3", "2 3")  # of lines: when all colors are used, they come again with the next
SIDES, PLOT, LEGEND = (250, 190), (48, 34), 330  # pixels of a plot of lines: its sides, its corner, where names begin


def histogram_svg(
    title: str, groups: dict[str, np.ndarray], *, low: float | None = None, high: float | None = None
) -> str:
    """Histograms of `groups` {name: (N_i,) finite} in rows over one axis, each scaled to its fullest bar.

    Bars below `low` or above `high` are orange, and the number of such values stands on the right.
    """
    limits = [limit for limit in (low, high) if limit is not None]
    edges = bar_edges(np.concatenate([np.empty(0), *groups.values(), limits]), limits[0] if limits else None)
    first, last = float(edges[0]), float(edges[-1])
    left, right, bottom = NAMES, WIDTH - NOTES, TOP + ROW * len(groups)

    def x(value: float) -> float:
        return left + (value - first) / (last - first) * (right - left)

    def is_odd(value: np.ndarray) -> np.ndarray:
        return (value < (-np.inf if low is None else low)) | (value > (np.inf if high is None else high))

    marks = [_text(0, 18, title, 15, INK)]
    for value, text in ticks(first, last):
        marks.append(_line(x(value), TOP - 6, x(value), bottom + 4, GRID))
        marks.append(_text(x(value), bottom + 18, text, 12, SOFT, "middle"))
    for number, (name, values) in enumerate(groups.items()):
        base = TOP + ROW * (number + 1)
        counts, odd = np.histogram(values, edges)[0], is_odd((edges[:-1] + edges[1:]) / 2)
        for i in np.flatnonzero(counts).tolist():
            height = max(2.0, (ROW - 10) * counts[i] / counts.max())
            a, b = x(float(edges[i])), x(float(edges[i + 1]))
            marks.append(_box(a + 0.5, base - height, b - a - 1, height, ALARM if odd[i] else USUAL))
        note = f"{int(is_odd(values).sum()):,} of {len(values):,}" if limits else f"{len(values):,} images"
        marks.append(_line(left, base, right, base, SOFT))
        marks.append(_text(0, base - 12, _short(name), 13, INK))
        marks.append(_text(right + 10, base - 12, note, 13, SOFT))
    marks += [_line(x(limit), TOP - 6, x(limit), bottom, INK, dashed=True) for limit in limits]
    return _svg(WIDTH, bottom + 26, marks, title)


def bars_svg(title: str, counts: dict[str, list[int]], groups: list[str]) -> str:
    """A bar for each of the counts {name: one per group}, with its number; names may be of any script."""
    thick = 14 if len(groups) < 3 else 9
    most = max([1, *(number for numbers in counts.values() for number in numbers)])
    marks, y, x = [_text(0, 18, title, 15, INK)], 42, 0
    for i, name in enumerate(groups):
        marks += [_box(x, y - 10, 12, 12, SHADES[i % len(SHADES)]), _text(x + 18, y, name, 13, INK)]
        x += 40 + 8 * len(name)
    y += 16
    for name, numbers in counts.items():
        marks.append(_text(0, y + thick * len(numbers) / 2 + 4, _short(name), 13, INK))
        for i, number in enumerate(numbers):
            length = (WIDTH - NAMES - 70) * number / most
            marks += [_box(NAMES, y, max(length, 1), thick - 2, SHADES[i % len(SHADES)])] * (number > 0)
            marks.append(_text(NAMES + length + 6, y + thick - 3, f"{number:,}", min(12, thick + 1), SOFT))
            y += thick
        y += 8
    return _svg(WIDTH, y + 4, marks, title)


def lines_svg(
    title: str,
    lines: dict[str, list[tuple[float, float]]],
    x_name: str,
    y_name: str,
    *,
    notes: dict[str, str] | None = None,
    unit: bool = False,
) -> str:
    """Lines {name: [(x, y), ...]} in one plot, their names on the right, in this order, a note behind each.

    `unit`: both axes from 0 to 1, with a dashed diagonal; else they hold all finite points.
    """
    points = {name: [(x, y) for x, y in its if math.isfinite(x) and math.isfinite(y)] for name, its in lines.items()}
    ends = [(0.0, 1.0), (0.0, 1.0)]
    if not unit:
        ends = [_ends([point[axis] for its in points.values() for point in its]) for axis in (0, 1)]
    (width, height), (left, top) = SIDES, PLOT

    def at(x: float, y: float) -> tuple[float, float]:
        share = [(value - low) / (high - low) for value, (low, high) in zip((x, y), ends)]
        return left + share[0] * width, top + (1 - share[1]) * height

    marks = [_text(0, 16, title, 15, INK)]
    for value, text in ticks(*ends[0])[::2]:
        x, _ = at(value, ends[1][0])
        marks += [_line(x, top, x, top + height, GRID), _text(x, top + height + 15, text, 11, SOFT, "middle")]
    for value, text in ticks(*ends[1]):
        _, y = at(ends[0][0], value)
        marks += [_line(left, y, left + width, y, GRID), _text(left - 6, y + 4, text, 11, SOFT, "end")]
    marks.append(_text(left + width / 2, top + height + 30, x_name, 12, SOFT, "middle"))
    marks.append(_text(left, top - 4, y_name, 12, SOFT))
    if unit:
        marks.append(_line(*at(0, 0), *at(1, 1), SOFT, dashed=True))
    for number, (name, its) in enumerate(points.items()):
        color, dash = _hex(LINES[number % len(LINES)]), DASHES[number // len(LINES) % len(DASHES)]
        look = f'fill="none" stroke="{color}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in its))
        y = top + 10 + 19 * number
        marks.append(f'<polyline points="{path}" {look}/>')
        if len(its) == 1:
            center = 'cx="{:.1f}" cy="{:.1f}"'.format(*at(*its[0]))
            marks.append(f'<circle {center} r="3" fill="{color}"/>')  # a line of one point is not seen
        marks.append(f'<polyline points="{LEGEND - 16:g},{y - 4:g} {LEGEND:g},{y - 4:g}" {look}/>')
        note = (notes or {}).get(name, "") if its else "(none)"
        marks.append(_text(LEGEND + 6, y, f"{_short(name)} {note}".strip(), 12, INK))
    return _svg(LEGEND + 210, max(top + height, top + 19 * len(points)) + 38, marks, title)


def _ends(values: list[float]) -> tuple[float, float]:
    """Of an axis."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.04 * (high - low) or 0.1 * max(abs(low), 1.0)
    return low - margin, high + margin


def _svg(width: float, height: float, marks: list[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
    return f'{head} aria-label="{safe(title)}" font-family="sans-serif">{"".join(marks)}</svg>'


def _text(x: float, y: float, text: str, size: int, color: tuple, anchor: str = "start") -> str:
    about = f'font-size="{size}" fill="{_hex(color)}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {about}>{safe(text)}</text>'


def _box(x: float, y: float, width: float, height: float, color: tuple) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{_hex(color)}"/>'


def _line(x0: float, y0: float, x1: float, y1: float, color: tuple, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{_hex(color)}"{dash}/>'


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:9]}...{name[-8:]}"


def _hex(color: tuple) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
