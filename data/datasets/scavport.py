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
from data.splits import stratified_split
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import BelowOne, PathText, PositiveInt, Seed

FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}  # of each split
LAYOUT = "expected <root>/{train,val,test}/<class>/*.jpg (val may be missing) or <root>/<class>/*.jpg"
SWEEP = "configs/sweeps/scavport_one_vs_all.yaml takes each in turn"


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
        on_error: OnError = "fail",
    ):
        top = Path(root)
        shares = {"test_fraction": test_fraction, "validation_fraction": validation_fraction, "split_seed": split_seed}
        if not is_folder(top):
            raise UserError(f"data.root={root} is not a folder: {LAYOUT}")
        left_out = {}
        if is_folder(top / "train"):
            given = [f"data.{key}" for key, value in shares.items() if value is not None]
            if given:
                raise UserError(f"{root} is divided by its folder train, so leave out {', '.join(given)}")
            by_split = _of_folders(top)
        else:
            by_class = images_by_class(top)
            _check_classes({str(top): by_class}, n_classes)
            by_split = _drawn(by_class, test_fraction, validation_fraction, split_seed or 0)
            for other in by_split.keys() - {split}:
                left_out[f"kept for {other.replace('test', 'testing')}"] = sum(map(len, by_split[other].values()))
        _check_classes({f"split {name} of {root}": found for name, found in by_split.items()}, n_classes)
        if split not in by_split:
            raise UserError(f"{root} has no images for validation: add a folder val, or set data.validation_fraction")
        by_class = by_split[split]
        labels = [label for label, name in enumerate(sorted(by_class)) for _ in by_class[name]]
        paths = [path for name in sorted(by_class) for path in by_class[name]]
        super().__init__(split, size, root, paths, labels, sorted(by_class))
        self.splits, self.left_out = tuple(by_split), left_out
        self.drop_unreadable(on_error)


class ScavPortOneVsAll(OneAgainstAll):
    """One of the eight classes as normal against the other seven, from `ScavPortClass`'s folders.

    Args:
        normal: name of the normal class, or its number from 0 in the order of the names.
        root, n_classes, test_fraction, validation_fraction, split_seed, on_error: as for `scavport_class`.

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
        )
        names = dict(enumerate(every.classes))
        if normal not in every.classes and not (normal.isdecimal() and int(normal) in names):
            numbered = ", ".join(f"{number} {name}" for number, name in names.items())
            raise UserError(f"data.normal={normal} is no class of {root}: it has {numbered}; {SWEEP}")
        self._take(every, normal if normal in every.classes else names[int(normal)], on_error)
        self.splits = every.splits


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
        on_error: OnError = "fail",
    ):
        layout = (
            "expected <root>/train/inlier, <root>/test/inlier, <root>/test/outlier, or <root>/inlier, <root>/outlier"
        )
        if not is_folder(root):
            raise UserError(f"data.root={root} is not a folder: {layout}")
        found = good_and_others(Path(root), split, layout, test_fraction, split_seed)
        super().__init__(split, size, root, found.paths, defects=found.defects)
        self.left_out = found.left_out
        self.drop_unreadable(on_error)


def _of_folders(top: Path) -> dict[str, dict[str, list[str]]]:
    """{split: {class: paths}} of the folders that are there."""
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
    return by_split


def _drawn(
    by_class: dict[str, list[str]], test: float | None, validation: float | None, seed: int
) -> dict[str, dict[str, list[str]]]:
    """{split: {class: paths}}, of each class the same shares."""
    test, validation = 0.2 if test is None else test, validation or 0.0
    if not (test > 0 and validation >= 0 and test + validation < 1):
        raise UserError(
            f"data.test_fraction={test} must be above 0, data.validation_fraction={validation} at least 0, and "
            "together below 1"
        )
    paths = [path for its in by_class.values() for path in its]
    labels = torch.tensor([label for label, its in enumerate(by_class.values()) for _ in its])
    rest, tested = stratified_split(labels, test, seed)
    train, validated = stratified_split(labels[rest], validation / (1 - test), seed)
    positions = {"train": rest[train], "validation": rest[validated], "test": tested}
    by_split = {}
    for split, its in positions.items():
        if len(its):
            by_split[split] = {
                name: [paths[i] for i in its.tolist() if labels[i] == label] for label, name in enumerate(by_class)
            }
    return by_split


def _check_classes(found: dict[str, dict[str, list[str]]], expected: int) -> None:
    """Every folder or split must have the same classes, as many as expected, none empty."""
    where, by_class = next(iter(found.items()))
    if len(by_class) != expected:
        names = first_few(by_class, 8)
        raise UserError(f"{where} has {len(by_class)} classes ({names}), not data.n_classes={expected}: {LAYOUT}")
    for other, its in found.items():
        missing = [name for name in by_class if not its.get(name)]
        unknown = sorted(its.keys() - by_class.keys())
        if missing or unknown:
            words = [f"lacks {first_few(missing)}"] * bool(missing) + [f"has {first_few(unknown)} more"] * bool(unknown)
            raise UserError(f"{other} {' and '.join(words)}, unlike {where}: all splits need the same classes")
