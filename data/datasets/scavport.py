"""The ScavPort sets, photographs through the scavenge ports of ship engines: classes, one class against the others,
and inliers with outliers."""

from pathlib import Path

import torch

from data.dataset import Dataset
from data.datasets.condition import good_and_others
from data.datasets.folder import images_by_class
from data.datasets.one_against_all import OneAgainstAll
from data.geometry import Geometry
from data.image_files import is_folder, refuse_shared_folders
from data.images import OnError
from data.splits import Draw, require_same_classes
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import BelowOne, PathText, PositiveInt, Seed

FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}  # of each split
LAYOUT = "expected <root>/{train,val,test}/<class>/*.jpg (val may be missing) or <root>/<class>/*.jpg"
SWEEP = "configs/sweeps/sweep_scavport.yaml takes each in turn"


class ScavPortClass(Dataset):
    """Eight classes, the same ones in every split, which is checked.

    - `<root>/train/<class>/...`, `test/<class>/...`, perhaps `val/<class>/...`: the splits are as the folders say;
    - `<root>/<class>/...`: of each class the same shares, drawn by `split_seed` (`data.splits.stratified_split`).

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder with the classes, or with `train` and `test`.
        n_classes: how many class folders there must be.
        test_fraction: share of each class for testing, without a folder `train`; none: 0.2.
        validation_fraction: likewise for validation; none: 0, no such split.
        split_seed: of the shares; none: 0.
        splits, group: as for `folder`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: another number of classes, a split that lacks one, shares of a set that has folders for its splits,
            a split that there is not, one folder linked into two splits.
    """

    splits = ("train", "validation", "test")

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        n_classes: PositiveInt = 8,
        test_fraction: BelowOne | None = None,
        validation_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        top = Path(root)
        draw = Draw(
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            split_seed=split_seed,
            splits=splits,
            group=group,
        )
        if not is_folder(top):
            raise UserError(f"data.root={root} is not a folder: {LAYOUT}")
        if is_folder(top / "train"):
            draw.refuse(f"{root} is divided by its folder train")
            division, rows = None, _of_folders(top)
        else:
            by_class = images_by_class(top)
            _check_classes({str(top): {*by_class}}, n_classes)
            _check_shares(draw)
            every = [(path, name) for name, paths in by_class.items() for path in paths]
            labels = torch.tensor([label for label, paths in enumerate(by_class.values()) for _ in paths])
            division = draw.divide(root, [path for path, _ in every], labels)
            rows = [(*row, its) for row, its in zip(every, division.splits)]
        there = tuple(its for its in ScavPortClass.splits if any(row[2] == its for row in rows))
        found = {f"split {its} of {root}": {name for _, name, of in rows if of == its} for its in there}
        _check_classes(found, n_classes)
        if split not in there:
            advice = "add a folder val, or set data.validation_fraction" if splits is None else f"name some in {splits}"
            raise UserError(f"{root} has no images for {split}: {advice}")
        classes, mine = sorted({name for _, name, _ in rows}), [row for row in rows if row[2] == split]
        labels = [classes.index(name) for _, name, _ in mine]
        super().__init__(split, size, root, [path for path, _, _ in mine], labels, classes)
        self.splits, self.division = there, division
        self.left_out = division.left_out(split) if division else {}
        self.drop_unreadable(on_error)


class ScavPortOneVsAll(OneAgainstAll):
    """One of the eight classes as normal against the other seven, from `ScavPortClass`'s folders.

    Args:
        normal: name of the normal class, or its number from 0 in the order of the names.
        root, n_classes, test_fraction, validation_fraction, split_seed, splits, group, on_error: as for
            `scavport_class`.

    Raises:
        UserError: `normal` is no class, or as for `ScavPortClass`.
    """

    splits = ("train", "validation", "test")

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        normal: str,
        n_classes: PositiveInt = 8,
        test_fraction: BelowOne | None = None,
        validation_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        every = ScavPortClass(
            split,
            size,
            root=root,
            n_classes=n_classes,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            split_seed=split_seed,
            splits=splits,
            group=group,
        )
        names = dict(enumerate(every.classes))
        if normal not in every.classes and not (normal.isdecimal() and int(normal) in names):
            numbered = ", ".join(f"{number} {name}" for number, name in names.items())
            raise UserError(f"data.normal={normal} is no class of {root}: it has {numbered}; {SWEEP}")
        self._take(every, normal if normal in every.classes else names[int(normal)], on_error)


class ScavPortAnom(Dataset):
    """Images of the engine to learn from, and images that show something else to be told from them; no masks.

    - `<root>/train/inlier/...`, `<root>/test/inlier/...` and `<root>/test/outlier/...`;
    - `<root>/inlier/...` and `<root>/outlier/...`: a share of the inliers is tested on, and all outliers.

    Inliers may be called good or normal; every other folder holds outliers and names their kind.

    Args:
        size: how images become H x W; a number S squashes them to S x S.
        root: folder of the set.
        test_fraction: share of the inliers for testing, without a folder `train`; none: 0.2.
        split_seed: of that share; none: 0.
        splits, group: as for `folder`.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: no inliers or two folders of them, no outliers, shares of a set that has folders for its splits.
    """

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        test_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        group: str | None = None,
        on_error: OnError = "fail",
    ):
        layout = (
            "expected <root>/train/inlier, <root>/test/inlier, <root>/test/outlier, or <root>/inlier, <root>/outlier"
        )
        if not is_folder(root):
            raise UserError(f"data.root={root} is not a folder: {layout}")
        draw = Draw(test_fraction=test_fraction, split_seed=split_seed, splits=splits, group=group)
        found = good_and_others(root, Path(root), split, layout, draw)
        super().__init__(split, size, root, found.paths, defects=found.defects)
        self.left_out, self.division = found.left_out, found.division
        self.drop_unreadable(on_error)


def _of_folders(top: Path) -> list[tuple[str, str, str]]:
    """(path, class, split) of all images in the folders that are there."""
    by_split = {}
    for split, names in FOLDERS.items():
        there = [top / name for name in names if is_folder(top / name)]
        if len(there) > 1:
            raise UserError(f"{there[0]} and {there[1]} are both for {split}: remove or hide one (a leading dot)")
        if there:
            by_split[split] = images_by_class(there[0])
    if "test" not in by_split:
        raise UserError(f"there is no folder {top / 'test'}, but {', '.join(sorted(by_split))}: {LAYOUT}")
    before: list[str] = []
    for by_class in by_split.values():
        paths = [path for its in by_class.values() for path in its]
        refuse_shared_folders(before, paths)
        before += paths
    return [(path, name, split) for split in by_split for name in by_split[split] for path in by_split[split][name]]


def _check_shares(draw: Draw) -> None:
    test, validation = 0.2 if draw.test_fraction is None else draw.test_fraction, draw.validation_fraction or 0.0
    if not (test > 0 and validation >= 0 and test + validation < 1):
        raise UserError(
            f"data.test_fraction={test} must be above 0, data.validation_fraction={validation} at least 0, and "
            "together below 1"
        )


def _check_classes(found: dict[str, set[str]], expected: int) -> None:
    """Every folder or split must have the same classes, as many as expected."""
    where, classes = next(iter(found.items()))
    if len(classes) != expected:
        names = first_few(sorted(classes), 8)
        raise UserError(f"{where} has {len(classes)} classes ({names}), not data.n_classes={expected}: {LAYOUT}")
    require_same_classes(found)
