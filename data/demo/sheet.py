"""The demo set's contact sheet, as shown in the README: `python -m data.demo.sheet datasets/demo sheet.jpg`."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from data.demo.condition import CONDITIONS
from data.demo.parts import PARTS
from runtime.errors import UserError, run
from runtime.files import whole_file

COLUMNS, WIDTH, HEIGHT, MARGIN, LINE = 8, 122, 100, 2, 17  # tiles of the sheet in pixels; LINE: one label
OUTLINE = (0, 160, 255)  # of a defect's mask: TRUE_DEFECT in plots/style.py, which data/ must not import


def contact_sheet(root: str | Path) -> Image.Image:
    """Images from the set at `root`: parts by class, outliers, whole and defective parts with the mask's outline."""
    root = Path(root)
    names = sorted(PARTS)
    columns = [_images(root / "scavport" / "train" / name, 4) for name in names]
    blocks = [
        ([name.replace("_", " ") for name in names] if k == 0 else [], row) for k, row in enumerate(zip(*columns))
    ]
    blocks += [(["outliers: images that do not belong"], _images(root / "scavport_anom/test/outlier", COLUMNS))]
    for subset, defects in CONDITIONS.items():
        folder = root / "condition" / subset
        labels, row = [f"{subset}: good", ""], _images(folder / "test" / "good", 2)
        for defect in defects:
            labels += [defect, ""]
            row += _images(folder / "test" / defect, 2, masks=folder / "ground_truth" / defect)
        blocks.append((labels, row))
    height = sum(HEIGHT + MARGIN + (LINE if labels else 0) for labels, _ in blocks)
    sheet = Image.new("RGB", (COLUMNS * (WIDTH + MARGIN) - MARGIN, height), "white")
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(13), 0
    for labels, row in blocks:
        for k, label in enumerate(labels):
            pen.text((k * (WIDTH + MARGIN) + 2, top), label, fill="black", font=font)
        top += LINE if labels else 0
        for k, image in enumerate(row):
            sheet.paste(image, (k * (WIDTH + MARGIN), top))
        top += HEIGHT + MARGIN
    return sheet


def _images(folder: Path, count: int, *, masks: Path | None = None) -> list[Image.Image]:
    """The first `count` images of a folder as tiles, with their masks' outline when `masks` names their folder."""
    paths = sorted(folder.glob("*.*"))[:count]
    if not paths:
        raise UserError(f"no images in {folder}: draw the demo set first (python -m data.demo ROOT)")
    tiles = []
    for path in paths:
        with Image.open(path) as image:
            tile = np.array(image.convert("RGB").resize((WIDTH, HEIGHT)))
        if masks is not None:
            with Image.open(masks / f"{path.stem}_mask.png") as image:
                mask = np.array(image.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)) > 0
            tile[binary_dilation(mask, iterations=2) & ~binary_dilation(mask)] = OUTLINE
        tiles.append(Image.fromarray(tile))
    return tiles


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("usage: python -m data.demo.sheet ROOT SHEET.jpg")
    packed = io.BytesIO()  # Pillow does not notice when a full disk takes only a part of a JPEG file
    contact_sheet(argv[0]).save(packed, "JPEG", quality=72)
    with whole_file(argv[1], "wb") as file:
        file.write(packed.getvalue())


if __name__ == "__main__":
    run(main)
