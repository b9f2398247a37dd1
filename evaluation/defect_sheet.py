"""What synthetic defects look like: `eval.py task=defects` draws this sheet."""

import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from evaluation.colors import INK, PAPER, SOFT, TRUE_DEFECT
from evaluation.heatmaps import GAP, MARGIN, TILE, outline
from evaluation.lettering import font, write

SIDE = 150  # pixels of the column of names


def defect_sheet(images: Tensor, kinds: dict[str, tuple[Tensor, Tensor]], title: str) -> Image.Image:
    """Pictures (N, 3, H, W) uint8 as they are, then for every kind its pictures and, below, the same with outlines.

    `kinds`: name -> defective pictures (N, 3, H, W) uint8, masks bool (N, H, W). Tiles are 208 x 208; under the name
    stands the share of pixels in the masks.
    """
    rows = 1 + 2 * len(kinds)
    top, block = 92, TILE + GAP
    size = 2 * MARGIN + SIDE + len(images) * block - GAP, top + rows * block + len(kinds) * 2 * GAP + MARGIN
    paper = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (MARGIN, 18), title, INK, 24)
    pen.rectangle((MARGIN, 60, MARGIN + 22, 76), outline=TRUE_DEFECT, width=3)
    pen.text((MARGIN + 30, 58), "where the picture may have changed: the mask", INK, font(16))
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


def _tiles(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, TILE, TILE) uint8 on the CPU."""
    tiles = F.interpolate(images.cpu().float(), (TILE, TILE), mode="bilinear", antialias=True, align_corners=False)
    return tiles.round().clamp(0, 255).byte()


def _row(paper: Image.Image, y: int, tiles: Tensor | list[Tensor]) -> None:
    for column, tile in enumerate(tiles):
        picture = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())  # (TILE, TILE, 3)
        paper.paste(picture, (MARGIN + SIDE + column * (TILE + GAP), y))
