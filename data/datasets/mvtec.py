"""The layout of MVTec AD, with one category a folder; MPDD and many private sets have it too."""

import os
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.geometry import Geometry, as_geometry
from data.image_files import find_images, is_folder, refuse_shared_folders
from data.images import OnError, decode, decode_mask, image_sizes, readable
from data.masks import Masks, check_sizes, masks_of, warn_of_values
from runtime.errors import UserError
from runtime.values import PathText

LAYOUT = (
    "expected <root>/<category>/train/good/*, <root>/<category>/test/<good or a defect>/* "
    "and <root>/<category>/ground_truth/<defect>/<stem>_mask.png"
)
GOOD = {"good", "normal", "normals", "ok", "okay", "io", "nominal", "healthy", "pass", "defect_free", "no_defect"}


class MVTec:
    """One category: train items `(image, 0, index)`, test items `(image, mask, label, index)`.

    image uint8 (3, H, W); mask bool (H, W), true on the defect; label 0 normal (`test/good`), 1 anomalous. Masks belong
    to images by name (`data.masks.masks_of`), never by position. Without any `ground_truth` folder `has_masks` is
    False and masks are empty. A test set may lack good or defective images.

    `defects` says for each image "good" or its defect's folder; `classes` are ["normal", "anomalous"]. `mask_known`
    (N,) bool: whether it is known which pixels are defective, as it is of all good images where there are masks.
    `left_out` says how many images of the folder are not in the set, by the reason.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder of the categories.
        category: folder below `root`, for example bottle.
        masks: `all` defective test images must have one where there is a folder `ground_truth`; `some`: those without
            are left out of the pixel metrics, and only there.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a missing or unreadable folder, good images under another name, a defective image with two masks
            or (masks=all) none, a mask of another size than its image, training images linked into the test.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        masks: Masks = "all",
        on_error: OnError = "fail",
    ):
        if masks not in ("all", "some"):
            raise UserError(f"data.masks={masks!r} is not known: choose all or some")
        self.split, self.geometry = split, as_geometry(size)
        top = Path(root) / category
        if not is_folder(top):
            raise UserError(_no_category(Path(root), category))
        folder = top / "train" / "good" if split == "train" else top / "test"
        self.paths, self.left_out = find_images(folder), {}
        if not self.paths:
            renamed = _renamed_good(folder.parent) if split == "train" else ""
            raise UserError(f"there are no images in {folder}: {LAYOUT}{renamed}")
        if split == "train":
            self.defects = ["good"] * len(self.paths)
        else:
            places = [path[len(str(folder)) + 1 :].partition(os.sep) for path in self.paths]
            for path, (_, _, below) in zip(self.paths, places):
                if not below:
                    raise UserError(f"{path} lies in no folder good or <defect>, so it has no label: {LAYOUT}")
            self.defects = [defect for defect, _, _ in places]
            if "good" not in self.defects and (renamed := _renamed_good(folder)):
                raise UserError(f"{folder} has no folder good{renamed}, or its images count as defects")
            refuse_shared_folders(find_images(top / "train" / "good"), self.paths)
        self.classes = ["normal", "anomalous"]
        self.labels = torch.tensor([int(defect != "good") for defect in self.defects])
        self.has_masks = split == "test" and is_folder(top / "ground_truth")
        self.mask_paths: list[str | None] = [None] * len(self.paths)
        if self.has_masks:
            defective = self.labels.nonzero().flatten().tolist()
            for i, mask in zip(defective, masks_of([self.paths[i] for i in defective], top, masks)):
                self.mask_paths[i] = mask
        self._keep(readable(self.__getitem__, self.paths, on_error), "not readable")
        check_sizes([(path, mask) for path, mask in zip(self.paths, self.mask_paths) if mask is not None])
        warn_of_values(mask for mask in self.mask_paths if mask is not None)

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each original image, upright: int64 (N, 2), read from the headers when first asked."""
        return image_sizes(self.paths)

    @property
    def mask_known(self) -> Tensor:
        return torch.tensor([mask is not None for mask in self.mask_paths]) | (self.labels == 0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | tuple[Tensor, Tensor, int, int]:
        image, label = decode(self.paths[index], self.geometry), int(self.labels[index])
        if self.split == "test":
            return image, self.mask(index), label, index
        return image, label, index

    def mask(self, index: int, *, original: bool = False) -> Tensor:
        """The true mask of a test image: bool (H, W), or `original` (h, w) as it is stored; empty without one."""
        path = self.mask_paths[index]
        if path is None:
            size = self.sizes[index].tolist() if original else (self.geometry.height, self.geometry.width)
            return torch.zeros(*size, dtype=torch.bool)
        return decode_mask(path, None if original else self.geometry)

    def _keep(self, positions: list[int], why: str) -> None:
        if len(positions) < len(self.paths):
            self.left_out[why] = len(self.paths) - len(positions)
        self.paths = [self.paths[i] for i in positions]
        self.defects = [self.defects[i] for i in positions]
        self.mask_paths = [self.mask_paths[i] for i in positions]
        self.labels = self.labels[positions]


def _renamed_good(folder: Path) -> str:
    """What to do about a folder of good images in `folder` that is not called so; empty if there is none."""
    for name in sorted(os.listdir(folder)) if is_folder(folder) else []:
        if name != "good" and name.lower().replace("-", "_").replace(" ", "_") in GOOD:
            return f", but {folder / name}: rename it to good"
    return ""


def _no_category(root: Path, category: str) -> str:
    if not is_folder(root):
        return f"data.root={root} is not a folder: {LAYOUT}"
    found = sorted(entry.name for entry in root.iterdir() if is_folder(entry / "train" / "good"))
    return f"data.category={category} is not in {root}; categories there: {', '.join(found) or 'none'}; {LAYOUT}"
