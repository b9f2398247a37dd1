"""Magnetic tiles in the layout in which they are published."""

import os
import re
from pathlib import Path

import torch

from data.dataset import Dataset
from data.datasets.folder import SPLIT_SEED
from data.geometry import Geometry
from data.image_files import find_images, is_folder
from data.images import OnError
from data.splits import stratified_split
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
        test_fraction: in [0, 1), of the good tiles; the others are trained on.
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
        test_fraction: BelowOne = 0.25,
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
        tested = self._tested_tiles(found, test_fraction)
        chosen = [row for row in found if (row[1] != "good" or tile(row[0]) in tested) == (split == "test")]
        if not chosen:
            raise UserError(f"{root} has no image for {split} with data.test_fraction={test_fraction}: change that")
        paths, defects, masks = (list(column) for column in zip(*chosen))
        masks = masks if split == "test" else None
        super().__init__(split, size, root, paths, defects=defects, masks=masks, on_error=on_error)
        other = "testing" if split == "train" else "training"
        self.left_out[f"kept for {other} (data.test_fraction={test_fraction})"] = len(found) - len(chosen)

    @staticmethod
    def _tested_tiles(found: list[tuple], test_fraction: float) -> set[str]:
        defective = {tile(path) for path, defect, _ in found if defect != "good"}
        good = sorted({tile(path) for path, *_ in found} - defective)
        _, test = stratified_split(torch.zeros(len(good)), test_fraction, SPLIT_SEED)
        return defective | {good[i] for i in test.tolist()}


def tile(path: str) -> str:
    """What names of images of one tile have in common: the number in `exp1_num_108719.jpg`, or else the whole name."""
    numbered = re.search(r"num_(\d+)", os.path.basename(path))
    return numbered[1] if numbered else os.path.basename(path)
