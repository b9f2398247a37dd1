"""Few normal images of one category, and the other categories to learn from: the protocol of RegAD."""

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.datasets.folder import ClassFolder
from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from data.image_files import is_folder, is_junk
from data.images import OnError
from data.masks import Masks
from runtime.errors import UserError
from runtime.values import PathText, PositiveInt, Seed


class FewShot(MVTec):
    """One category in MVTec's layout with few normal images, for any detector.

    `train`: `shots` images of `train/good`, the support set. They are the first of a permutation that
    RandomState(draw) makes of the sorted paths: the same on every machine, and those of 2 shots are among those of 4.
    `test`: all of the category's test images, as `MVTec` gives them.
    `others`: the good training images of all other categories below `root` (leave one category out), or all training
    images of `others`; labels number the categories, `classes` are their names.

    RegAD's own draws are files of images to be downloaded; the draws here only need the data set.

    Args:
        root: folder of the categories; all others are learned from, unless `others` is given.
        shots: size of the support set.
        draw: number of the support set; papers report the mean over several.
        others: another folder to learn from, in MVTec's layout or with class folders (`ClassFolder`).

    Raises:
        UserError: fewer images than shots, no other category or one with a single image, or as for `MVTec`.
    """

    splits = ("train", "test", "others")
    few = True
    same_classes = False  # the split others has other categories

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        category: str,
        shots: PositiveInt,
        draw: Seed = 0,
        others: PathText | None = None,
        masks: Masks = "all",
        on_error: OnError = "fail",
    ):
        if split == "others":
            by_category = _other_categories(Path(others or root), Path(root) / category, size, on_error)
            paths = [path for its in by_category.values() for path in its]
            labels = [label for label, its in enumerate(by_category.values()) for _ in its]
            Dataset.__init__(self, split, size, others or root, paths, labels, list(by_category))
            return
        super().__init__(split, size, root=root, category=category, masks=masks, on_error=on_error)
        if split == "train":
            if len(self) < shots:
                raise UserError(
                    f"data.shots={shots}, but {root}/{category}/train/good has {len(self)} images: lower it"
                )
            kept = sorted(np.random.RandomState(draw).permutation(len(self))[:shots].tolist())
            self.keep(kept, f"beyond data.shots={shots}")


def _other_categories(root: Path, target: Path, size: int | Geometry, on_error: OnError) -> dict[str, list[str]]:
    """{category: paths of its training images} of all categories below `root` but `target`."""
    if not is_folder(root):
        raise UserError(f"{root} is not a folder to take other categories from: check data.others")
    found = [good.parents[1] for good in sorted(root.glob("*/train/good")) if not is_junk(good.parents[1].name)]
    if found:
        chosen = [folder for folder in found if folder.resolve() != target.resolve()]
        if len({folder.resolve() for folder in chosen}) < len(chosen):
            raise UserError(f"a category of {root} is in it twice, by a link: remove the link")
        sets = [MVTec("train", size, root=str(root), category=c.name, on_error=on_error) for c in chosen]
        by_category = {folder.name: category.paths for folder, category in zip(chosen, sets)}
    else:
        share = None if is_folder(root / "train") else 0.0
        folders = ClassFolder("train", size, root=str(root), test_fraction=share, on_error=on_error)
        by_category = {name: [] for name in folders.classes}
        for path, label in zip(folders.paths, folders.labels.tolist()):
            by_category[folders.classes[label]].append(path)
    if not by_category:
        raise UserError(
            f"{root} has no category but {target.name} to learn from: set data.others to a folder that has some"
        )
    for name, paths in by_category.items():
        if len(paths) < 2:
            raise UserError(
                f"category {name} of {root} has {len(paths)} training image, and comparing needs two: add one, or "
                f"hide the folder (name it .{name})"
            )
    return by_category
