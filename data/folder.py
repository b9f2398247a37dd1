"""Pictures in class folders."""

import os
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.geometry import Geometry, as_geometry
from data.images import OnError, decode, find_images, picture_sizes, readable
from data.loading import stratified_split
from training.errors import UserError
from training.values import PathText

LAYOUT = (
    "expected <root>/<class>/*.jpg, or <root>/train/<class>/*.jpg and <root>/test/<class>/*.jpg, "
    "or pictures without classes in <root>"
)
SPLIT_SEED = 0  # of the split into training and test pictures; fixed, so that every run tests on the same ones


class ClassFolder:
    """Items `(image uint8 (3, H, W), label, index)` of a folder in one of three layouts:

    - `<root>/train/<class>/...` and `<root>/test/<class>/...`: the split is as the folders say;
    - `<root>/<class>/...`: of each class the same `test_fraction` is tested on, drawn by a fixed seed over the sorted
      paths within the class (`loading.stratified_split`), so it depends on nothing but the files' names;
    - pictures directly in `<root>` (or `<root>/train`): one class, "unlabelled", enough for pretraining.

    Classes are numbered in the order of their sorted names; pictures may lie at any depth below a class folder.

    Args:
        size: how pictures become H x W; a number S squashes them to S x S.
        test_fraction: in [0, 1), for the layouts without `train`; 0 leaves all pictures to training.
        on_error: `fail` names a broken picture when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a missing or empty folder, an unclear layout, MVTec's layout, a class in test that is not in train.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        size: int | Geometry,
        *,
        root: PathText,
        test_fraction: float = 0.2,
        on_error: OnError = "fail",
    ):
        self.geometry = as_geometry(size)
        top = Path(root)
        if not top.is_dir():
            raise UserError(f"data.root={root} is not a folder: {LAYOUT}")
        divided = (top / "train").is_dir()
        if not divided:
            _refuse_mvtec(top)
        by_class = _pictures_by_class(top / "train" if divided else top)
        self.classes = list(by_class)
        if divided and split == "test":
            by_class = _pictures_by_class(top / "test")
            unknown = sorted(set(by_class) - set(self.classes))
            if unknown:
                raise UserError(f"{top / 'test'} has classes that {top / 'train'} has not: {', '.join(unknown)}")
        self.paths = [path for paths in by_class.values() for path in paths]
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[name] for name, paths in by_class.items() for _ in paths])
        if not divided:
            train, test = stratified_split(self.labels, test_fraction, SPLIT_SEED)
            self.keep({"train": train, "test": test}[split].tolist())
            if not self.paths:
                raise UserError(
                    f"{root} with test_fraction={test_fraction} has no test picture: raise it or add pictures"
                )
        self.keep(readable(self.__getitem__, self.paths, on_error))

    @cached_property
    def sizes(self) -> Tensor:
        """Height and width of each original picture, upright: int64 (N, 2), read from the headers when first asked."""
        return picture_sizes(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return decode(self.paths[index], self.geometry), int(self.labels[index]), index

    def keep(self, positions: list[int]) -> None:
        """Leave out all pictures but these; they are numbered anew, the classes stay."""
        self.paths = [self.paths[i] for i in positions]
        self.labels = self.labels[positions]


def _refuse_mvtec(top: Path) -> None:
    """MVTec's categories would pass for classes, with defects and the masks of ground_truth among their pictures."""
    for good in sorted(top.glob("*/train/good")):
        raise UserError(
            f"data.root={top} is in MVTec layout ({good} exists): use data.name=mvtec "
            f"data.category={good.parent.parent.name}, or data.root={good.parent} for the good pictures alone"
        )


def _pictures_by_class(folder: Path) -> dict[str, list[str]]:
    """{class: sorted paths} in the order of the class names; {"unlabelled": paths} of a folder without classes."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}, yet {folder.parent}/train exists: make it, link another one to it "
            f"(ln -s val {folder}), or put the class folders directly into {folder.parent} to have a part tested on"
        )
    by_class: dict[str, list[str]] = {}
    for path in find_images(folder):
        name, _, below = path[len(str(folder)) + 1 :].partition(os.sep)
        by_class.setdefault(name if below else "", []).append(path)
    if not by_class:
        raise UserError(f"{folder} holds no picture: {LAYOUT}")
    loose = by_class.pop("", [])
    if not by_class:
        return {"unlabelled": loose}
    if loose:
        raise UserError(f"{folder} holds class folders and loose pictures such as {loose[0]}: move these into a class")
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    for name in sorted(set(folders) - set(by_class)):
        raise UserError(
            f"class folder {folder / name} holds no picture: fill it, remove it or hide it (name it .{name})"
        )
    return {name: by_class[name] for name in sorted(by_class)}
