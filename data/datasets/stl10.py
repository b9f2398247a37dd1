"""STL-10 from its published binary files."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torchvision

from data.dataset import ArrayDataset
from data.dataset import download as download_by
from data.geometry import Geometry
from runtime.errors import UserError
from runtime.values import PathText, Range

SIDE = 96  # pixels
Fold = Annotated[int, Range(least=0, most=9)]


class STL10(ArrayDataset):
    """96 x 96 images of ten classes, 5,000 to train on and 8,000 to test on, and 100,000 without labels.

    `<root>/stl10_binary/` holds `train_X.bin`, `train_y.bin`, `test_X.bin`, `test_y.bin`, `unlabeled_X.bin`,
    `class_names.txt` and `fold_indices.txt` (Coates et al. 2011). The files are mapped, not read.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with stl10_binary.
        part: what to train on: the `labelled` images, the `unlabelled` ones, or `all` of both without their labels.
        fold: 0 to 9, one of the published folds of 1,000 labelled training images; none: all.
        download: fetch the published files into `root` if they are not there.

    Raises:
        UserError: a file is missing or of an odd size; a fold or a test set of unlabelled images.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry = SIDE,
        *,
        root: PathText,
        part: Literal["labelled", "unlabelled", "all"] = "labelled",
        fold: Fold | None = None,
        download: bool = False,
    ):
        if download:
            download_by(lambda: torchvision.datasets.STL10(root, download=True), root)
        folder = Path(root) / torchvision.datasets.STL10.base_folder
        if part != "labelled" and (split == "test" or fold is not None):
            raise UserError(f"data.part={part} has no labels to test with, nor folds: set data.part=labelled")
        if split == "train" and part != "labelled":
            files = ["train_X.bin", "unlabeled_X.bin"] if part == "all" else ["unlabeled_X.bin"]
            arrays = {str(folder / file): _pixels(folder / file) for file in files}
            labels, classes = np.zeros(sum(map(len, arrays.values()))), ["unlabelled"]
        else:
            file = folder / f"{split}_X.bin"
            arrays, labels = {str(file): _pixels(file)}, _bytes(folder / f"{split}_y.bin").astype(np.int64) - 1
            classes = _text(folder / "class_names.txt").split()
            if len(labels) != len(arrays[str(file)]) or not np.isin(labels, range(len(classes))).all():
                counts = f"{len(labels)} labels of {len(classes)} classes for {len(arrays[str(file)])} images"
                raise UserError(f"{folder}: {split} has {counts}: unpack stl10_binary.tar.gz again")
        super().__init__(split, size, root, arrays, torch.from_numpy(labels).long(), classes)
        if fold is not None and split == "train":
            lines = _text(folder / "fold_indices.txt").splitlines()
            if not 0 <= fold < len(lines):
                raise UserError(f"data.fold={fold} must be 0 to {len(lines) - 1}, or none for all training images")
            self.keep(sorted(map(int, lines[fold].split())), f"not in data.fold={fold}")


def _pixels(file: Path) -> np.ndarray:
    """uint8 (n, 96, 96, 3), a view of the mapped file, where an image lies channel by channel, column by column."""
    flat = _bytes(file)
    if not len(flat) or len(flat) % (3 * SIDE * SIDE):
        raise UserError(f"{file} has {len(flat)} bytes, no multiple of {3 * SIDE * SIDE}: unpack it again")
    return flat.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)  # (n, 3, column, row) -> (n, row, column, 3)


def _bytes(file: Path) -> np.ndarray:
    _check(file)
    return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)


def _text(file: Path) -> str:
    _check(file)
    return file.read_text()


def _check(file: Path) -> None:
    if not file.is_file():
        found = sorted(path.name for path in file.parent.glob("*")) if file.parent.is_dir() else []
        raise UserError(
            f"there is no {file}: expected train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin, "
            f"class_names.txt and fold_indices.txt of STL-10, found {', '.join(found[:8]) or 'nothing'}"
        )
