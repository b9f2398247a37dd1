"""The layout of MVTec AD, with one category a folder; MPDD and many private sets have it too."""

import os
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.geometry import Geometry
from data.image_files import find_images, is_folder, is_junk, refuse_shared_folders
from data.images import OnError
from data.masks import Masks, masks_of
from runtime.errors import UserError
from runtime.values import PathText

GOOD = {"good", "normal", "normals", "ok", "okay", "io", "nominal", "healthy", "pass", "defect_free", "no_defect"}


class MVTec(Dataset):
    """One category: good images to learn from, good and defective ones to test on.

    Masks belong to images by name (`data.masks.masks_of`), never by position. Without any folder `ground_truth`
    `has_masks` is False. A test set may lack good or defective images. `defects` are the names of the folders.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder of the categories.
        category: folder below `root`, for example bottle; several as bottle,cable, or all.
        masks: `all` defective test images must have one where there is a folder `ground_truth`; `some`: those without
            are left out of the pixel metrics, and only there.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a missing or unreadable folder, good images under another name, a defective image with two masks
            or (masks=all) none, a mask of another size than its image, training images linked into the test.
    """

    layout = (
        "expected <root>/<category>/train/good/*, <root>/<category>/test/<good or a defect>/* "
        "and <root>/<category>/ground_truth/<defect>/<stem>_mask.png"
    )
    good, tested, truth = "good", "test", "ground_truth"  # names of folders

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        masks: Masks = "all",
        on_error: OnError = "fail",
    ):
        top = Path(root) / category
        if not is_folder(top):
            raise UserError(self._no_category(Path(root), category))
        folder, truth = top / self.tested if split == "test" else top / split / self.good, top / self.truth
        paths, found = [path for path in find_images(folder) if not path.startswith(f"{truth}{os.sep}")], None
        if not paths:
            renamed = self._renamed_good(folder.parent) if split != "test" else ""
            raise UserError(f"there are no images in {folder}: {self.layout}{renamed}")
        if split != "test":
            defects = ["good"] * len(paths)
        else:
            places = [path[len(str(folder)) + 1 :].partition(os.sep) for path in paths]
            for path, (_, _, below) in zip(paths, places):
                if not below:
                    raise UserError(
                        f"{path} lies in no folder {self.good} or <defect>, so it has no label: {self.layout}"
                    )
            defects = ["good" if defect == self.good else defect for defect, _, _ in places]
            if "good" not in defects and (renamed := self._renamed_good(folder)):
                raise UserError(f"{folder} has no folder {self.good}{renamed}, or its images count as defects")
            refuse_shared_folders(find_images(top / "train" / self.good), paths)
            if is_folder(truth):
                defective = [path for path, defect in zip(paths, defects) if defect != "good"]
                mask_of = dict(zip(defective, self.find_masks(defective, folder, truth, masks)))
                found = [mask_of.get(path) for path in paths]
        super().__init__(split, size, root, paths, defects=defects, masks=found, on_error=on_error)

    def find_masks(self, images: list[str], folder: Path, truth: Path, needed: Masks) -> list[Any]:
        """The mask of each defective image of `folder`, or the files of its regions, or None."""
        return masks_of(images, folder, truth, needed)

    @classmethod
    def categories(cls, **options) -> list[str]:
        root = Path(options["root"])
        there = [entry for entry in root.iterdir() if not is_junk(entry.name)] if is_folder(root) else []
        return sorted(entry.name for entry in there if is_folder(entry / "train" / cls.good))

    def _renamed_good(self, folder: Path) -> str:
        """What to do about a folder of good images in `folder` that is not called so; empty if there is none."""
        for name in sorted(os.listdir(folder)) if is_folder(folder) else []:
            if name != self.good and name.lower().replace("-", "_").replace(" ", "_") in GOOD:
                return f", but {folder / name}: rename it to {self.good}"
        return ""

    def _no_category(self, root: Path, category: str) -> str:
        if not is_folder(root):
            return f"data.root={root} is not a folder: {self.layout}"
        found = ", ".join(self.categories(root=root)) or "none"
        return f"data.category={category} is not in {root}; categories there: {found}; {self.layout}"


class BTAD(MVTec):
    """beanTech's set (Mishra et al. 2021): the same with good images in `ok` and defective ones in `ko`.

    Images are .bmp or .png. A mask is found by its stem, whatever its suffix, for both kinds are in circulation.

    Args:
        root: folder BTech_Dataset_transformed, which holds 01, 02 and 03.
        category: 01, 02 or 03; in a YAML file between quotes; several as 01,02, or all.
    """

    layout = (
        "expected <root>/<category>/train/ok/*, <root>/<category>/test/<ok or ko>/* "
        "and <root>/<category>/ground_truth/ko/<stem>.png"
    )
    good = "ok"
