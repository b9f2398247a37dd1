"""Images named in a table, CSV or TSV, whatever the folders look like."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import Dataset
from data.geometry import Geometry
from data.images import OnError
from data.masks import Masks
from data.splits import SPLITS, Division, Draw, read_rows
from runtime.errors import UserError
from runtime.text import first_few
from runtime.values import BelowOne, PathText, Seed


class Table(Dataset):
    """A row of column names, and a row per image; cells are separated by commas, semicolons or tabs.

    With a column of masks or `data.normal` it is a set to find anomalies in: it is learned from normal images only.
    Otherwise labels are classes; without labels there is one class, "unlabelled".

    The column of splits says train, test or validation (val). Without one, of each class a share is tested on: of whole
    groups if there are any, and of anomaly sets all anomalies and a share of the normal images, in groups of their own.

    Args:
        size: how images (bilinear) and masks (nearest) become H x W; a number S squashes them to S x S.
        root: folder that the paths in the table begin at, unless they are absolute.
        table: the file, below `root` unless absolute.
        path_column: of image files.
        label_column: of classes, or of the names of defects; none: `label` if there is one.
        split_column: none: `split` if there is one.
        mask_column: of mask files, empty for images without; none: `mask` if there is one.
        group_column: of part, scene or vessel, whose images are never on both sides; none: `group` if there is one.
        normal: label of normal images, all others are anomalies; none: `good` of a table with masks.
        masks: `all` anomalous test images must have one where there is a column, or `some`.
        test_fraction: share for testing, without a column of splits; none: 0.2, of unlabelled images 0.
        split_seed: of that share; none: 0.
        splits: as for `folder`, in place of a column of splits.
        on_error: `fail` names a broken image when it is decoded; `skip` looks for them now and leaves them out.

    Raises:
        UserError: a table that cannot be read, a missing column, cell or file, an unknown split, a file named twice, a
            group in two splits, classes that only the test has, no normal images, a share beside a column of splits.
    """

    splits = ("train", "validation", "test")

    def __init__(
        self,
        split: str,
        size: int | Geometry,
        *,
        root: PathText,
        table: PathText = "images.csv",
        path_column: str = "path",
        label_column: str | None = None,
        split_column: str | None = None,
        mask_column: str | None = None,
        group_column: str | None = None,
        normal: str | None = None,
        masks: Masks = "all",
        test_fraction: BelowOne | None = None,
        split_seed: Seed | None = None,
        splits: PathText | None = None,
        on_error: OnError = "fail",
    ):
        path = Path(root, table)
        columns = {"label": label_column, "split": split_column, "mask": mask_column, "group": group_column}
        rows, there = _rows(read_rows(path, "data.table"), path, root, {"path": path_column, **columns})
        if normal is None and "mask" in there:
            normal = "good"
        _refuse_normal(path, rows, normal)
        draw = Draw(test_fraction=test_fraction, split_seed=split_seed, splits=splits)
        if "split" in there:
            draw.refuse(f"{path} has a column of splits")
        else:
            share = 0.0 if {row.label for row in rows} == {"unlabelled"} else 0.2
            self.division = _divide(root, rows, normal, share, draw)
        _check_splits(path, rows, normal)
        mine = [row for row in rows if row.split == split]
        kept = [row for row in mine if split == "test" or normal in (None, row.label)]
        if not kept:
            raise UserError(f"{path} names no {'' if normal is None else 'normal '}image of the split '{split}'")
        _check_files(path, kept, normal, on_error, masks if split == "test" and "mask" in there else None)
        paths = [row.path for row in kept]
        if normal is None:
            classes = sorted({row.label for row in rows})
            super().__init__(split, size, root, paths, [classes.index(row.label) for row in kept], classes)
        else:
            defects = ["good" if row.label == normal else row.label for row in kept]
            files = [None if row.label == normal else row.mask for row in kept]
            tested = files if split == "test" and "mask" in there else None
            super().__init__(split, size, root, paths, defects=defects, masks=tested)
        self.splits = tuple(name for name in Table.splits if any(row.split == name for row in rows))
        if split == "train":
            self.left_out["anomalous, in the training split"] = len(mine) - len(kept)
            tested = sum(row.split == "test" for row in rows)
            self.left_out["kept for testing"] = 0 if "split" in there else tested
        if splits is not None:
            self.left_out[f"in no split of {splits}"] = sum(not row.split for row in rows)
        self.drop_unreadable(on_error)


@dataclass
class _Row:
    line: int  # in the file
    path: str
    label: str
    split: str  # empty: the table does not say
    mask: str | None
    group: str | None


def _rows(
    lines: list[tuple[int, list[str]]], table: Path, root: PathText, names: dict[str, str | None]
) -> tuple[list[_Row], set[str]]:
    """The rows, and which kinds of columns there are; a name of None is the kind's own, if there is such a column."""
    (_, columns), *rest = [(line, [cell.strip() for cell in cells]) for line, cells in lines]
    at: dict[str, int] = {}
    for kind, name in names.items():
        if name in columns or (name is None and kind in columns):
            at[kind] = columns.index(name or kind)
        elif name is not None:
            raise UserError(f"{table} has no column {name} (data.{kind}_column); there are {first_few(columns, 8)}")
    rows = []
    for line, cells in rest:
        cell = {kind: cells[i] for kind, i in at.items()}
        for kind in cell:
            if not cell[kind] and kind != "mask":
                raise UserError(f"line {line} of {table} has an empty cell in column {columns[at[kind]]}")
        split = cell.get("split", "")
        if split and split.lower() not in SPLITS:
            raise UserError(f"line {line} of {table} has the split {split}; it can be {', '.join(SPLITS)}")
        path, mask = (os.path.join(root, text.replace("\\", "/")) if text else None  # of Windows
                      for text in (cell["path"], cell.get("mask")))  # fmt: skip
        without = "unlabelled" if "mask" not in at else "anomalous" if mask else "good"
        rows.append(
            _Row(line, path, cell.get("label", without), SPLITS.get(split.lower(), ""), mask, cell.get("group"))
        )
    if twice := [path for path, count in Counter(row.path for row in rows).items() if count > 1]:
        raise UserError(f"{table} names {len(twice)} images more than once, the first is {twice[0]}")
    return rows, {*at}


def _refuse_normal(table: Path, rows: list[_Row], normal: str | None) -> None:
    labels = {row.label for row in rows}
    if normal is not None and normal not in labels:
        found = first_few(sorted(labels), 6)
        raise UserError(f"{table} has no label {normal} for normal images; labels there: {found}; set data.normal")
    if normal not in (None, "good") and "good" in labels:
        raise UserError(f"label good of {table} would be an anomaly, but normal images are called so: rename it")


def _divide(root: PathText, rows: list[_Row], normal: str | None, share: float, draw: Draw) -> Division:
    """Give each row a split: of anomaly sets, groups with an anomaly are tested on."""
    classes = sorted({row.label for row in rows})
    labels = torch.tensor([classes.index(row.label) for row in rows])
    anomalous = None if normal is None else [row.label != normal for row in rows]
    groups = [row.group or row.path for row in rows]
    division = draw.divide(root, [row.path for row in rows], labels, share=share, tested=anomalous, groups=groups)
    for row, split in zip(rows, division.splits):
        row.split = split
    if all(row.group is None for row in rows):
        division.groups = None
    return division


def _check_splits(table: Path, rows: list[_Row], normal: str | None) -> None:
    """No group in two splits, and no class that is not learned."""
    split_of: dict[str, str] = {}
    for row in rows:
        if row.split and row.group is not None and split_of.setdefault(row.group, row.split) != row.split:
            raise UserError(
                f"group {row.group} of {table} is in {split_of[row.group]} and, line {row.line}, in {row.split}: "
                "give all its images one split"
            )
    if normal is None:
        learned = {row.label for row in rows if row.split == "train"}
        if unknown := sorted({row.label for row in rows if row.split} - learned):
            raise UserError(f"{table} has no training image of {first_few(unknown)}, but others of it")


def _check_files(table: Path, rows: list[_Row], normal: str | None, on_error: OnError, masks: Masks | None) -> None:
    """Images (unless broken ones are skipped) and masks are there; masks: which are needed, None: none are used."""
    defective = [row for row in rows if row.label != normal] if masks else []
    if masks == "all" and (bare := [row for row in defective if row.mask is None]):
        raise UserError(
            f"line {bare[0].line} of {table} is anomalous and has no mask: add it, or set data.masks=some to leave "
            "such images out of the pixel metrics"
        )
    files = [row.path for row in rows] * (on_error == "fail") + [row.mask for row in defective if row.mask is not None]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UserError(f"{len(missing)} files that {table} names are not there, the first is {missing[0]}")
