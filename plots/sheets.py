"""Sheets of what a network is trained on, readable at once: images beside their views, and synthetic defects."""

import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from plots.heatmaps import GAP, MARGIN, TILE, outline, to_pil
from plots.style import INK, PAPER, SOFT, TRUE_DEFECT, font, write

IMAGES, VIEWS, TOP = 4, 3, 88  # rows of a sheet, its columns without the image, pixels of its title
SIDE = 150  # pixels of a defect sheet's column of names


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


def defect_sheet(images: Tensor, kinds: dict[str, tuple[Tensor, Tensor]], title: str) -> Image.Image:
    """Images (N, 3, H, W) uint8 as they are, then for every kind its images and, below, the same with outlines.

    `kinds`: name -> defective images (N, 3, H, W) uint8, masks bool (N, H, W). Tiles are 208 x 208; under the name
    stands the share of pixels in the masks.
    """
    rows = 1 + 2 * len(kinds)
    top, block = 92, TILE + GAP
    size = 2 * MARGIN + SIDE + len(images) * block - GAP, top + rows * block + len(kinds) * 2 * GAP + MARGIN
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 18), title, INK, 24)
    pen.rectangle((MARGIN, 60, MARGIN + 22, 76), outline=TRUE_DEFECT, width=3)
    pen.text((MARGIN + 30, 58), "where the image may have changed: the mask", INK, font(16))
    _row(paper, top, _tiles(images))
    pen.text((MARGIN, top), "as it is", INK, font(19))
    y = top + block
    for name, (made, masks) in kinds.items():
        y += GAP
        pen.line((MARGIN, y - GAP, size[0] - MARGIN, y - GAP), SOFT)
        _row(paper, y, tiles := _tiles(made))
        large = F.interpolate(masks[:, None].float().cpu(), (TILE, TILE), mode="nearest-exact")[:, 0] > 0  # (N, T, T)
        _row(paper, y + block, [outline(tile, mask) for tile, mask in zip(tiles, large)])
        write(pen, (MARGIN, y), name, INK, 19, width=SIDE - GAP)
        pen.text((MARGIN, y + 30), f"{masks.float().mean():.1%} of pixels", SOFT, font(16))
        y += 2 * block + GAP
    return paper


def contact_sheet(tiles: list[tuple[str, Tensor]], title: str, columns: int = 6) -> Image.Image:
    """Captions and images uint8 (3, h, w) of any sizes in rows under a title, each caption in up to two lines."""
    columns = max(1, min(columns, len(tiles)))
    width = max([120, *(image.shape[2] for _, image in tiles)])
    height = max([1, *(image.shape[1] for _, image in tiles)])
    block, top = height + 42, 62
    paper_width = max(2 * MARGIN + columns * (width + GAP) - GAP, 480)
    paper = Image.new("RGB", (paper_width, top + -(-len(tiles) // columns) * block + MARGIN), PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 18), title, INK, 22, width=paper_width - 2 * MARGIN)
    for number, (caption, image) in enumerate(tiles):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (width + GAP), top + row * block
        paper.paste(to_pil(image), (x, y))
        for line, text in enumerate(caption.split("\n")[:2]):
            write(pen, (x, y + height + 3 + 16 * line), text, SOFT, 13, width=width)
    return paper


def _tiles(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, TILE, TILE) uint8 on the CPU."""
    tiles = F.interpolate(images.cpu().float(), (TILE, TILE), mode="bilinear", antialias=True, align_corners=False)
    return tiles.round().clamp(0, 255).byte()


def _row(paper: Image.Image, y: int, tiles: Tensor | list[Tensor]) -> None:
    for column, tile in enumerate(tiles):
        image = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())  # (TILE, TILE, 3)
        paper.paste(image, (MARGIN + SIDE + column * (TILE + GAP), y))
