"""A sheet of saliency maps: an image in each row, beside it its maps with their numbers."""

from dataclasses import dataclass

import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import GAP, MARGIN, outline, overlay, to_pil
from plots.style import ABOVE, INK, PAPER, SOFT, TRUE_DEFECT, write

SIDE, TOP, HEADING, CAPTION = 168, 100, 26, 58  # pixels: of a tile; room above all rows, above and below tiles
WIDE = 1130  # pixels that rows of few tiles fill side by side


@dataclass
class Panel:
    """A map that is drawn over the row's image."""

    heat: Tensor  # float (h, w) of any size, drawn from its smallest value (bare) to its largest (hottest)
    outlined: Tensor | None  # bool (h, w): a part of it that is outlined
    lines: list[str]  # at most three, below it


@dataclass
class Row:
    image: Tensor  # uint8 (3, H, W)
    mask: Tensor | None  # bool (H, W), the true defect
    name: str
    lines: list[str]  # at most three, below the image
    panels: list[Panel]


def saliency_sheet(rows: list[Row], title: str, lines: list[str]) -> Image.Image:
    """Under a title and up to two `lines` a row for each image: the image itself, then its maps over it, hot where they
    are largest. True defects are outlined in blue, a panel's own outline is white."""
    block, high = SIDE + GAP, HEADING + SIDE + CAPTION
    wide = (max(len(row.panels) for row in rows) + 1) * block + 2 * GAP  # of a row
    beside = min(max(1, WIDE // wide), len(rows))  # rows side by side
    size = max(2 * MARGIN + beside * wide, 900), TOP + -(-len(rows) // beside) * high + MARGIN
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 14), title, INK, 24, width=size[0] - 2 * MARGIN)
    for number, line in enumerate(lines[:2]):
        write(pen, (MARGIN, 48 + 20 * number), line, SOFT, 14, width=size[0] - 2 * MARGIN)
    for number, row in enumerate(rows):
        left, y = MARGIN + number % beside * wide, TOP + number // beside * high
        write(pen, (left, y + 4), row.name, INK, 15, width=wide - 3 * GAP if beside > 1 else size[0] - 2 * MARGIN)
        tile = _tile(row.image.float()).round().clamp(0, 255).byte()  # (3, SIDE, SIDE)
        mask = None if row.mask is None else _tile(row.mask[None].float(), "nearest-exact")[0] > 0
        drawn = [to_pil(_with_defect(tile, mask)), *(_drawn(tile, panel, mask) for panel in row.panels)]
        for column, (image, below) in enumerate(zip(drawn, [row.lines, *(panel.lines for panel in row.panels)])):
            x = left + column * block
            paper.paste(image, (x, y + HEADING))
            for line, text in enumerate(below[:3]):
                write(pen, (x, y + HEADING + SIDE + 2 + 16 * line), text, SOFT, 12, width=SIDE)
    return paper


def _drawn(tile: Tensor, panel: Panel, mask: Tensor | None) -> Image.Image:
    heat = panel.heat.cpu().float()
    low, high = heat.min().item(), heat.max().item()
    large = _tile(heat[None])[0]  # (SIDE, SIDE)
    image = overlay(tile, large, low, high if high > low else low + 1)
    if panel.outlined is not None:
        image = outline(image, _tile(panel.outlined[None].cpu().float(), "nearest-exact")[0] > 0, ABOVE, rim=1)
    return to_pil(_with_defect(image, mask))


def _with_defect(tile: Tensor, mask: Tensor | None) -> Tensor:
    return tile if mask is None else outline(tile, mask, TRUE_DEFECT)


def _tile(values: Tensor, mode: str = "bilinear") -> Tensor:
    """(C, H, W) -> (C, SIDE, SIDE)."""
    smooth = {"antialias": True, "align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(values[None].cpu(), (SIDE, SIDE), mode=mode, **smooth)[0]
