"""Why an image was called anomalous: its most anomalous patch beside the training patch that comes nearest to it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import GAP, MARGIN, TILE, verdict_color
from plots.style import INK, PAPER, PEAK, RIM, SOFT, font, write

ZOOM = 0.25  # side of the patch that is shown enlarged, of the image's shorter side; a patch sees about as much


@dataclass
class Pair:
    """A test image and the training image that it was compared with; positions are (y, x) in their pixels, None
    for methods that compare whole images."""

    image: Tensor  # uint8 (3, H, W)
    peak: tuple[float, float] | None
    neighbor: Tensor  # uint8 (3, H', W')
    position: tuple[float, float] | None
    lines: list[str]  # the first is the heading
    correct: bool | None = None  # the verdict, for the heading's color


def neighbor_sheet(pairs: list[Pair], *, title: str) -> Image.Image:
    """A sheet with a row for each pair: the test image with its most anomalous position marked, that position
    enlarged, the nearest training patch enlarged, its image with the position marked, and a caption."""
    heads = ["test image", "its most anomalous patch", "nearest training patch", "training image"]
    top, block = 104, TILE + GAP
    paper = Image.new("RGB", (2 * MARGIN + 4 * block + 320, top + len(pairs) * block + MARGIN), PAPER)
    draw = ImageDraw.Draw(paper)
    write(draw, (MARGIN, 18), title, INK, 24, width=paper.width - 2 * MARGIN)
    for column, head in enumerate(heads):
        draw.text((MARGIN + column * block, 74), head, SOFT, font(16))
    for row, pair in enumerate(pairs):
        y = top + row * block
        tiles = [*_whole_and_part(pair.image, pair.peak), *_whole_and_part(pair.neighbor, pair.position)[::-1]]
        for column, tile in enumerate(tiles):
            paper.paste(tile, (MARGIN + column * block, y))
        x = MARGIN + 4 * block + 4
        draw.text((x, y + 4), pair.lines[0], verdict_color(pair.correct), font(19))
        for i, line in enumerate(pair.lines[1:]):
            write(draw, (x, y + 34 + 22 * i), line, INK, 16, width=paper.width - MARGIN - x)
    return paper


def _whole_and_part(image: Tensor, position: tuple[float, float] | None) -> tuple[Image.Image, Image.Image]:
    """The image (3, H, W) with a square around `position`, and what is in the square, both TILE x TILE."""
    if position is None:  # whole images were compared
        return _tile(image), _tile(image)
    height, width = image.shape[1:]
    side = max(8, round(ZOOM * min(height, width)))
    top, left = (round(min(max(p - side / 2, 0), n - side)) for p, n in zip(position, (height, width)))
    whole = _tile(image)
    corners = [left * TILE / width, top * TILE / height, (left + side) * TILE / width, (top + side) * TILE / height]
    for color, width in ((RIM, 5), (PEAK, 3)):
        ImageDraw.Draw(whole).rectangle(corners, outline=color, width=width)
    return whole, _tile(image[:, top : top + side, left : left + side])


def _tile(image: Tensor) -> Image.Image:
    resized = F.interpolate(image[None].float(), (TILE, TILE), mode="bilinear", antialias=True, align_corners=False)[0]
    return Image.fromarray(resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
