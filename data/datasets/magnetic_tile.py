"""Magnetic tiles in the layout in which they are published."""

import os
import re
from pathlib import Path

from data.dataset import Dataset
from data.geometry import Geometry
from data.image_files import find_images, is_folder
from data.images import OnError
from data.splits import Draw
from runtime.errors import UserError
from runtime.values import BelowOne, PathText

LAYOUT = "expected <root>/MT_Free/Imgs/*.jpg, and <root>/MT_<defect>/Imgs/*.jpg with a mask .png of the same name"


class MagneticTile(Dataset):
    """Surfaces of magnetic tiles (Huang et al. 2020): MT_Free are good, and of each defect there is a folder.

    There is no published split. `test` are all defective images and `test_fraction` of the good tiles, drawn by a fixed
    seed. A tile is on one side: files whose names agree in `num_<number>` show the same one, and what a defective image
    shows is not trained on. `defects` are blowhole, break, crack, fray and uneven, as far as they are there.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder of MT_Free, MT_Blowhole and so on.
        test_fraction: of the good tiles, the others are trained on; none: 0.25.
        splits: as for `folder`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: another layout, a defective image without a mask, no tile to train on.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        test_fraction: BelowOne | None = None,
        splits: PathText | None = None,
        on_error: OnError = "fail",
    ):
        top, found = Path(root), []
        folders = sorted(path for path in top.glob("MT_*") if is_folder(path / "Imgs"))
        names = [folder.name for folder in folders]
        if "MT_Free" not in names or len(names) < 2:
            there = sorted(os.listdir(top)) if is_folder(top) else []
            raise UserError(f"data.root={root}: {LAYOUT}, found {', '.join(there[:8]) or 'nothing'}")
        for folder in folders:
            defect = "good" if folder.name == "MT_Free" else folder.name.removeprefix("MT_").lower()
            files = find_images(folder / "Imgs")
            masks = {os.path.splitext(path)[0]: path for path in files if path.lower().endswith(".png")}
            for path in files:
                if path.lower().endswith(".png"):
                    continue
                mask = None if defect == "good" else masks.get(os.path.splitext(path)[0])
                if mask is None and defect != "good":
                    raise UserError(f"{path} has no mask {os.path.splitext(path)[0]}.png: {LAYOUT}")
                found.append((path, defect, mask))
        draw, share = Draw(test_fraction=test_fraction, splits=splits), 0.25 if test_fraction is None else test_fraction
        every, tested = [row[0] for row in found], [row[1] != "good" for row in found]
        tiles = [tile(path) for path in every]
        division = draw.divide(root, every, share=share, tested=tested, groups=tiles, splits=self.splits)
        chosen = [found[i] for i in division.of(split)]
        if not chosen:
            how = f"data.test_fraction={share}" if splits is None else f"data.splits={splits}"
            raise UserError(f"{root} has no image for {split} with {how}: change that")
        paths, defects, masks = (list(column) for column in zip(*chosen))
        masks = masks if split == "test" else None
        super().__init__(split, size, root, paths, defects=defects, masks=masks, on_error=on_error)
        self.left_out |= division.left_out(split, f" (data.test_fraction={share})")
        self.division = division


def tile(path: str) -> str:
    """What names of images of one tile have in common: the number in `exp1_num_108719.jpg`, or else the whole name."""
    numbered = re.search(r"num_(\d+)", os.path.basename(path))
    return numbered[1] if numbered else os.path.basename(path)
