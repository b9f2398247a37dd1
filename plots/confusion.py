"""A confusion matrix as an image."""

from PIL import Image, ImageDraw
from torch import Tensor

from plots.style import GRID, INK, RIGHT, WRONG, font, lettered, write


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


def _turned(text: str, size: int, length: int) -> Image.Image:
    """`text` written upwards on white, ending at the upper edge of an image `length` high."""
    line = Image.new("RGB", (length, size + 6), "white")
    write(ImageDraw.Draw(line), (length - 3, line.height / 2), text, INK, size, anchor="rm", width=12 * size)
    return line.rotate(90, expand=True)
