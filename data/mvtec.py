"""The layout of MVTec AD, with one category a folder; MPDD and many private sets have it too."""

from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.geometry import Geometry, as_geometry
from data.images import OnError, decode, decode_mask, find_images, picture_sizes, readable
from training.errors import UserError
from training.values import PathText

LAYOUT = (
    "expected <root>/<category>/train/good/*, <root>/<category>/test/<good or a defect>/* "
    "and <root>/<category>/ground_truth/<defect>/<stem>_mask.png"
)


class MVTec:
    """One category: train items `(image, 0, index)`, test items `(image, mask, label, index)`.

    image uint8 (3, H, W); mask bool (H, W), true on the defect; label 0 normal (`test/good`), 1 anomalous. Masks belong
    to pictures by name, `ground_truth/<defect>/<stem>_mask.png` or `<stem>.png`, never by position. Without any
    `ground_truth` folder `has_masks` is False and masks are empty. A test set may lack good or defective pictures.

    `defects` says for each picture "good" or its defect's folder; `classes` are ["normal", "anomalous"].

    Args:
        size: how pictures (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        category: folder below `root`, for example bottle.
        on_error: `fail` names a broken picture when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a missing folder, a defective picture without mask beside others that have one, or a mask of
            another size than its picture.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        on_error: OnError = "fail",
    ):
        self.split, self.geometry = split, as_geometry(size)
        top = Path(root) / category
        if not top.is_dir():
            raise UserError(_no_category(Path(root), category))
        folder = top / "train" / "good" if split == "train" else top / "test"
        self.paths = find_images(folder)
        if not self.paths:
            raise UserError(f"there are no pictures in {folder}: {LAYOUT}")
        if split == "train":
            self.defects = ["good"] * len(self.paths)
        else:
            self.defects = [Path(path).relative_to(folder).parts[0] for path in self.paths]
            for path in self.paths:
                if Path(path).parent == folder:
                    raise UserError(f"{path} lies in no folder good or <defect>, so it has no label: {LAYOUT}")
        self.classes = ["normal", "anomalous"]
        self.labels = torch.tensor([int(defect != "good") for defect in self.defects])
        self.has_masks = split == "test" and (top / "ground_truth").is_dir()
        self._masks = [
            _mask_of(Path(path), top) if self.has_masks and defect != "good" else None
            for path, defect in zip(self.paths, self.defects)
        ]
        self._keep(readable(self.__getitem__, self.paths, on_error))
        _check_sizes([(path, mask) for path, mask in zip(self.paths, self._masks) if mask is not None])

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each original picture, upright: int64 (N, 2), read from the headers when first asked."""
        return picture_sizes(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | tuple[Tensor, Tensor, int, int]:
        image, label = decode(self.paths[index], self.geometry), int(self.labels[index])
        if self.split == "test":
            return image, self.mask(index), label, index
        return image, label, index

    def mask(self, index: int, *, original: bool = False) -> Tensor:
        """The true mask of a test picture: bool (H, W), or `original` (h, w) as it is stored; empty for a good one."""
        path = self._masks[index]
        if path is None:
            size = self.sizes[index].tolist() if original else (self.geometry.height, self.geometry.width)
            return torch.zeros(*size, dtype=torch.bool)
        return decode_mask(path, None if original else self.geometry)

    def _keep(self, positions: list[int]) -> None:
        self.paths = [self.paths[i] for i in positions]
        self.defects = [self.defects[i] for i in positions]
        self._masks = [self._masks[i] for i in positions]
        self.labels = self.labels[positions]


def _mask_of(picture: Path, top: Path) -> str:
    """test/<defect>/[...]/<stem>.<any> -> the mask of that stem at the same place below ground_truth."""
    place = (top / "ground_truth" / picture.relative_to(top / "test")).parent
    for name in (f"{picture.stem}_mask.png", f"{picture.stem}.png"):
        if (place / name).is_file():
            return str(place / name)
    raise UserError(
        f"{picture} has no mask {place / picture.stem}_mask.png: add it, or remove the whole folder "
        f"{top / 'ground_truth'} to go without pixel figures"
    )


def _check_sizes(pairs: list[tuple[str, str]]) -> None:
    """Every mask must be as high and wide as its picture; read from the headers."""
    sizes = picture_sizes([picture for picture, _ in pairs]).tolist()
    mask_sizes = picture_sizes([mask for _, mask in pairs]).tolist()
    for (picture, mask), (height, width), (mask_height, mask_width) in zip(pairs, sizes, mask_sizes):
        if (height, width) != (mask_height, mask_width):
            raise UserError(
                f"mask {mask} is {mask_height} x {mask_width} (height x width), but its picture {picture} is "
                f"{height} x {width}: make them equal"
            )


def _no_category(root: Path, category: str) -> str:
    if not root.is_dir():
        return f"data.root={root} is not a folder: {LAYOUT}"
    found = sorted(entry.name for entry in root.iterdir() if (entry / "train" / "good").is_dir())
    return f"data.category={category} is not in {root}; categories there: {', '.join(found) or 'none'}; {LAYOUT}"
