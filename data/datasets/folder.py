"""Images in class folders."""

import os
from pathlib import Path
from typing import Literal

import torch
import torchvision

from data.dataset import Dataset
from data.dataset import download as download_by
from data.geometry import Geometry
from data.image_files import is_folder, list_images, refuse_shared_folders
from data.images import OnError
from data.splits import Draw
from runtime.errors import UserError
from runtime.values import BelowOne, PathText

LAYOUT = (
    "expected <root>/<class>/*.jpg, or <root>/train/<class>/*.jpg and <root>/test/<class>/*.jpg, "
    "or images without classes in <root>"
)
WORDS = {  # of Imagenette
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


class ClassFolder(Dataset):
    """A folder in one of three layouts:

    - `<root>/train/<class>/...` and `<root>/test/<class>/...`: the split is as the folders say;
    - `<root>/<class>/...`: of each class the same `test_fraction` is tested on, drawn by a fixed seed over the sorted
      paths within the class (`data.splits.stratified_split`), so it depends on nothing but the files' names; or
      `splits` or `group` says more;
    - images directly in `<root>` (or `<root>/train`): one class, "unlabelled", enough for pretraining on all of them.

    Classes are numbered in the order of their sorted names; images may lie at any depth below a class folder.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with the classes, or with `train` and `test`, or of images without classes.
        test_fraction: in [0, 1), for the layouts without `train`; none: 0.2 of each class folder, 0 without classes.
        splits: file with the columns path (below `root`) and split, as `splits.csv` in the folder of a run; likewise.
        group: regular expression, as `ship[0-9]+`: images with the same match in their paths below `root`, or the same
            text for its part in parentheses, are never in two splits; likewise.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a missing, empty or unreadable folder, an unclear layout, MVTec's layout, a class in test that is not
            in train, one folder linked as two classes or into training and test, options of a split that there is.
    """

    splits = ("train", "validation", "test")

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        test_fraction: BelowOne | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        top = Path(root)
        if not is_folder(top):
            raise UserError(f"data.root={root} is not a folder: {LAYOUT}")
        divided, draw = (top / "train").is_dir(), Draw(test_fraction=test_fraction, splits=splits, group=group)
        if divided:
            draw.refuse(f"{root} is divided by its folder train")
        else:
            _refuse_mvtec(top)
        by_class = images_by_class(top / "train" if divided else top)
        classes = list(by_class)
        if divided and split == "validation":
            raise UserError(f"{root} is divided by its folders train and test, and has no split for validation")
        if divided and split == "test":
            train = [path for paths in by_class.values() for path in paths]
            by_class = images_by_class(top / "test")
            unknown = sorted(set(by_class) - set(classes))
            if unknown:
                raise UserError(f"{top / 'test'} has classes that {top / 'train'} has not: {', '.join(unknown)}")
            refuse_shared_folders(train, (path for paths in by_class.values() for path in paths))
        number = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([number[name] for name, paths in by_class.items() for _ in paths])
        paths = [path for its in by_class.values() for path in its]
        if divided:
            super().__init__(split, size, root, paths, labels, classes)
            self.splits = ("train", "test")
        else:
            share = test_fraction
            if share is None:
                share = 0.0 if classes == ["unlabelled"] else 0.2
            division = draw.divide(root, paths, labels, share=share)
            kept = division.of(split)
            if not kept:
                advice = f"data.splits={splits} has no {split} image: name some there"
                if splits is None:
                    advice = f"data.test_fraction={share} has no {split} image: raise it, or add images or classes"
                raise UserError(f"{root} with {advice}")
            super().__init__(split, size, root, [paths[i] for i in kept], labels[kept], classes)
            self.left_out = division.left_out(split, f" (data.test_fraction={share})")
            self.division, self.splits = division, division.there
        self.drop_unreadable(on_error)


class Imagenette(Dataset):
    """Ten classes of ImageNet (Howard 2019): `<root>/imagenette2/{train,val}/<WordNet number>/*.JPEG`.

    `test` are the images of `val`; `classes` are the words in `WORDS`.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with imagenette2, imagenette2-320 or imagenette2-160.
        version: which of them: `full`, or with a short side of `320` or `160` pixels.
        download: fetch the published files into `root` if they are not there.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: there is no such folder, or one with other classes.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        version: Literal["full", "320", "160"] = "full",
        download: bool = False,
        on_error: OnError = "fail",
    ):
        top = Path(root) / {"full": "imagenette2"}.get(version, f"imagenette2-{version}")
        if download and not is_folder(top):
            name = {"full": "full"}.get(version, f"{version}px")
            download_by(lambda: torchvision.datasets.Imagenette(root, size=name, download=True), root)
        folder = top / {"train": "train", "test": "val"}[split]
        if not is_folder(folder):
            raise UserError(f"there is no {folder}: expected <root>/{top.name}/{{train,val}}/<WordNet number>/*.JPEG")
        by_class = images_by_class(folder)
        if list(by_class) != list(WORDS):
            odd = ", ".join(sorted(by_class.keys() ^ WORDS.keys())[:4])
            raise UserError(
                f"{folder} has not the ten classes of Imagenette, {next(iter(WORDS))} and so on: {odd} differ"
            )
        paths = [path for paths in by_class.values() for path in paths]
        labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
        super().__init__(split, size, root, paths, labels, list(WORDS.values()), on_error=on_error)


def _refuse_mvtec(top: Path) -> None:
    """MVTec's categories would pass for classes, with defects and the masks of ground_truth among their images."""
    for good in sorted(top.glob("*/train/good")):
        raise UserError(
            f"data.root={top} is in MVTec layout ({good} exists): use data.name=mvtec "
            f"data.category={good.parent.parent.name}, or data.root={good.parent} for the good images alone"
        )


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """{class: sorted paths} in the order of the class names; {"unlabelled": paths} of a folder without classes."""
    if not is_folder(folder):
        raise UserError(
            f"there is no folder {folder}, yet {folder.parent}/train exists: make it, link another one to it "
            f"(ln -s val {folder}), or put the class folders directly into {folder.parent}: a part is kept for testing"
        )
    by_class: dict[str, list[str]] = {}
    listing, start = list_images(folder), len(str(folder)) + 1
    for path in listing.paths:
        name, _, below = path[start:].partition(os.sep)
        by_class.setdefault(name if below else "", []).append(path)
    if not by_class:
        raise UserError(f"{folder} holds no image: {LAYOUT}")
    loose = by_class.pop("", [])
    if not by_class:
        return {"unlabelled": loose}
    if loose:
        raise UserError(f"{folder} holds class folders and loose images such as {loose[0]}: move these into a class")
    of_runs = {path[start:].partition(os.sep)[0] for path in listing.runs}
    below = listing.folders[1:]  # the first is `folder` itself
    for name in sorted({path[start:].partition(os.sep)[0] for path in below} - of_runs - by_class.keys()):
        raise UserError(f"class folder {folder / name} holds no image: fill it, remove it or hide it (name it .{name})")
    for link, entered in listing.repeated.items():
        if os.path.dirname(link) == str(folder) and entered in below:
            raise UserError(f"class folder {link} is a link to {entered}, whose images are in already: remove it")
    return {name: by_class[name] for name in sorted(by_class)}
