"""What a network is trained on: images beside their views, in sheets that are readable at once."""

import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from evaluation.colors import INK, PAPER, SOFT
from evaluation.heatmaps import GAP, MARGIN, TILE, to_pil
from evaluation.lettering import font

IMAGES, VIEWS, TOP = 4, 3, 88  # rows of a sheet, its columns without the image, pixels of its title


def view_sheets(images: Tensor, views: list[Tensor]) -> dict[str, Image.Image]:
    """{name: sheet} of images uint8 (B, 3, H, W) and their views, V x (B, 3, h, w) in [0, 1].

    A sheet has a row for each of up to 4 images and a column for each of up to 3 views beside the image itself; over
    them stand the views' sizes, as all are drawn 208 x 208.
    """
    sheets = {}
    for first in range(0, len(images), IMAGES):
        for start in range(0, len(views), VIEWS):
            some, last = views[start : start + VIEWS], min(first + IMAGES, len(images))
            name = f"images {first + 1}-{last}, views {start + 1}-{start + len(some)} of {len(views)}"
            titles = ["image", *(f"view {start + i}: {v.shape[2]} x {v.shape[3]}" for i, v in enumerate(some, 1))]
            columns = [images[first:last].float() / 255, *(view[first:last].float() for view in some)]
            sheets[name] = _sheet(name, titles, columns)
    return sheets


def _sheet(name: str, titles: list[str], columns: list[Tensor]) -> Image.Image:
    block = TILE + GAP
    size = 2 * MARGIN + max(len(columns), 2) * block - GAP, TOP + len(columns[0]) * block - GAP + MARGIN
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((MARGIN, 14), f"Training {name}", INK, font(22))
    for x, (title, column) in enumerate(zip(titles, columns)):
        draw.text((MARGIN + x * block, TOP - 28), title, SOFT, font(17))
        shape = {"size": (TILE, TILE), "mode": "bilinear", "antialias": True, "align_corners": False}
        for y, tile in enumerate(F.interpolate(column.cpu(), **shape)):
            paper.paste(to_pil((255 * tile).round().clamp(0, 255).byte()), (MARGIN + x * block, TOP + y * block))
    return paper
