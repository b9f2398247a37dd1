"""Curves over the severity of corruptions, a panel per corruption. Pillow draws."""

from PIL import Image, ImageDraw

from plots.curves import place
from plots.heatmaps import MARGIN
from plots.style import ALARM, GRID, INK, PAPER, SOFT, USUAL, font, write

COLUMNS, PLOT, LEFT, GAP, TOP, BELOW = 5, 150, 34, 26, 108, 56  # panels in a row; pixels
COLORS = (USUAL, ALARM)  # of the lines, in their order


def severity_image(
    panels: dict[str, dict[str, list[float | None]]], severities: list[int], title: str, note: str
) -> Image.Image:
    """Small plots of 0 to 1 over severities, side by side.

    Args:
        panels: {corruption: {line: a value of each of `severities`, None where it is not known}}; up to two lines.
        severities: ascending; 0 is the image as it is.
        note: below the title, in words.
    """
    lines = list(next(iter(panels.values()))) if panels else []
    columns = max(1, min(COLUMNS, len(panels)))
    width, height = LEFT + PLOT + GAP, PLOT + BELOW
    rows = -(-len(panels) // columns)
    paper_width = max(2 * MARGIN + columns * width, 640)
    paper = Image.new("RGB", (paper_width, TOP + rows * height + MARGIN), PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 16), title, INK, 22, width=paper_width - 2 * MARGIN)
    x = MARGIN
    for name, color in zip(lines, COLORS):
        pen.line((x, 62, x + 24, 62), color, 4)
        pen.text((x + 32, 62), name, INK, font(16), anchor="lm")
        x += 62 + round(font(16).getlength(name))
    write(pen, (x, 62), note, SOFT, 15, anchor="lm", width=paper_width - x - MARGIN)
    least, most = severities[0], max(severities[-1], severities[0] + 1)
    for number, (name, curves) in enumerate(panels.items()):
        row, column = divmod(number, columns)
        box = (MARGIN + LEFT + column * width, TOP + row * height, PLOT, PLOT)
        write(pen, (box[0], box[1] - 6), name.replace("_", " "), INK, 15, anchor="ls", width=PLOT)
        for value in (0, 0.5, 1):
            _, y = place(box, 0, value)
            pen.line((box[0] - 4, y, box[0] + PLOT, y), GRID)
            pen.text((box[0] - 8, y), f"{value:g}", SOFT, font(13), anchor="rm")
        for severity in severities:
            x, _ = place(box, (severity - least) / (most - least), 0)
            pen.text((x, box[1] + PLOT + 5), str(severity), SOFT, font(13), anchor="ma")
        pen.rectangle((box[0], box[1], box[0] + PLOT, box[1] + PLOT), outline=GRID)
        for values, color in zip(curves.values(), COLORS):
            points = [
                place(box, (severity - least) / (most - least), value)
                for severity, value in zip(severities, values)
                if value is not None
            ]
            pen.line(points, color, 3, joint="curve")
            for px, py in points:
                pen.ellipse((px - 3, py - 3, px + 3, py + 3), color)
    return paper
