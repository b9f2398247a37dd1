"""Which images are trained on and which are held out: drawn by a seed, or read from a file."""

import csv
import io
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.files import open_regular, whole_file
from runtime.text import first_few

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val"), "validation")
FILE = "splits.csv"  # in a run folder
WORDS = {"train": "training", "validation": "validation", "test": "testing"}


def evenly(count: int, most: int) -> Tensor:
    """At most `most` numbers below `count`, evenly spread, the first and the last among them: int64, ascending."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions into (rest, picked), both ascending int64, the same fraction of every class.

    Of a class with n items, n * fraction rounded to the nearest are picked, but at least one and never all; a class
    of one item stays in the rest. Every class draws its own permutation of n from RandomState(seed), whose stream
    NumPy never changes, so a class's split does not depend on other classes, machine or library version.
    """
    picked = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = min(max(int(len(members) * fraction + 0.5), 1), len(members) - 1) if fraction > 0 else 0
        picked[members[np.random.RandomState(seed).permutation(len(members))[:count]]] = True
    return (~picked).nonzero().flatten(), picked.nonzero().flatten()


def holdout(dataset, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train indices, held-out indices) of the dataset, the same fraction of each label, and of each of its `groups` of
    these; of `whole_groups`, where it has any, all images are on one side."""
    strata = [*zip(dataset.labels.tolist(), *dataset.groups.values())]
    number = {stratum: i for i, stratum in enumerate(sorted({*strata}))}
    numbers = torch.tensor([number[stratum] for stratum in strata], dtype=torch.int64)
    if dataset.whole_groups is None:
        return stratified_split(numbers, fraction, seed)
    return grouped_split(numbers, dataset.whole_groups, fraction, seed)


def few_per_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Positions of `count` items of every class, ascending int64; drawn as in `stratified_split`.

    Raises:
        ValueError: a class has fewer.
    """
    picked = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < count:
            raise ValueError(f"class {label} has {len(members)} items, fewer than {count}")
        picked[members[np.random.RandomState(seed).permutation(len(members))[:count]]] = True
    return picked.nonzero().flatten()


def grouped_split(labels: Tensor, groups: list[str], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """As `stratified_split`, of whole groups: images of one part, scene or vessel are never on both sides.

    Where each group is of one class, the same fraction of the groups of every class is picked. Where groups hold
    several, as a vessel does that has all parts, about the same fraction of every class's images: `_spread`.
    """
    names = sorted({*groups})
    number = {name: i for i, name in enumerate(names)}
    group = torch.tensor([number[name] for name in groups])  # (N,)
    counts = torch.zeros(len(names), int(labels.max()) + 1, dtype=torch.int64)
    counts.index_put_((group, labels), torch.ones_like(labels), accumulate=True)
    if ((counts > 0).sum(1) > 1).any():
        picked = _spread(counts.numpy(), fraction, seed)
    else:
        _, picked = stratified_split(counts.argmax(1), fraction, seed)
    is_picked = torch.isin(group, picked)
    return (~is_picked).nonzero().flatten(), is_picked.nonzero().flatten()


def _spread(counts: np.ndarray, fraction: float, seed: int) -> Tensor:
    """Numbers of the groups to pick, of which int64 `counts` (G, C) has the images of each class.

    In a random order, a group is picked if that brings the picked shares of all classes nearer to `fraction`, in
    squares; then, for each class without any, the group that does least harm. None is picked that is a class's last.
    """
    totals = counts.sum(0)
    shares = counts / np.maximum(totals, 1)  # (G, C)
    missing, left, picked = np.where(totals, fraction, 0.0), totals.copy(), []  # (C,), (C,)
    order = np.random.RandomState(seed).permutation(len(counts)) if fraction > 0 else []

    def pick(group: int) -> None:
        nonlocal missing, left
        missing, left = missing - shares[group], left - counts[group]
        picked.append(int(group))

    for group in order:
        nearer = ((missing - shares[group]) ** 2).sum() < (missing**2).sum()
        if nearer and (left > counts[group])[totals > 0].all():
            pick(group)
    for label in totals.nonzero()[0] if fraction > 0 else ():
        able = [g for g in order if counts[g, label] and (left > counts[g])[totals > 0].all() and g not in picked]
        if able and left[label] == totals[label]:
            pick(min(able, key=lambda g: ((missing - shares[g]) ** 2).sum()))
    return torch.tensor(sorted(picked), dtype=torch.int64)


@dataclass
class Division:
    """All images of a set without splits on the disk, and where each belongs."""

    root: str | Path
    paths: list[str]
    splits: list[str]  # train, test, validation; empty: in none, which only a file can say
    groups: list[str] | None = None
    file: str | None = None  # that says it; None: it was drawn

    @property
    def names(self) -> list[str]:
        """The paths below the root."""
        return below(self.root, self.paths)

    def of(self, split: str) -> list[int]:
        return [i for i, its in enumerate(self.splits) if its == split]

    @property
    def there(self) -> tuple[str, ...]:
        """The splits that have images."""
        return tuple(split for split in WORDS if split in self.splits)

    def left_out(self, split: str, why: str = "") -> dict[str, int]:
        """{reason: number of images} of all that are not in this split."""
        why = f" ({self.file})" if self.file else why
        counts = Counter(self.splits)
        reasons = {f"kept for {word}{why}": counts[its] for its, word in WORDS.items() if its != split and counts[its]}
        return reasons | ({f"in no split of {self.file}": counts[""]} if counts[""] else {})


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The options of a set that is divided by nothing on the disk; None: not given.

    test_fraction, validation_fraction: shares of each class. split_seed: of these.
    splits: a file (`write_splits`) that says it all instead.
    group: regular expression, searched in each path below the root; images with the same match, or of an expression
        with a group in parentheses the same text there, are never in two splits.
    """

    test_fraction: float | None = None
    validation_fraction: float | None = None
    split_seed: int | None = None
    splits: str | None = None
    group: str | None = None

    def refuse(self, why: str, *others: str) -> None:
        """UserError, beginning with `why`, if any of the options was given (but for `others`)."""
        given = [f"data.{key}" for key, value in vars(self).items() if value is not None and key not in others]
        if given:
            raise UserError(f"{why}, so leave out {', '.join(given)}")

    def divide(
        self,
        root: str | Path,
        paths: list[str],
        labels: Tensor | None = None,
        *,
        share: float = 0.2,
        tested: list[bool] | None = None,
        groups: list[str] | None = None,
        splits: tuple[str, ...] = ("train", "validation", "test"),
    ) -> Division:
        """Give each image a split.

        Args:
            labels: int64 (N,), classes of which each is divided alike; None: one class.
            share: for testing, unless `test_fraction` was given.
            tested: which images are anomalous: tested on in any case, with all others of their groups.
            groups: of a set that knows them itself.
            splits: that the set can have.

        Raises:
            UserError: a file that cannot be read, names other images or learns from anomalous ones, shares beside it, a
                group that the file has in two splits, an expression that is none or that an image does not match,
                shares without a rest.
        """
        names = below(root, paths) if self.group is not None or self.splits is not None else []
        if self.group is not None:
            groups = groups_of(names, self.group)
        if self.splits is not None:
            self.refuse(f"data.splits={self.splits} says all splits", "splits", "group")
            given = read_splits(self.splits, names, splits)
            if wrong := [name for name, its, odd in zip(names, given, tested or ()) if odd and its not in ("test", "")]:
                raise UserError(
                    f"{self.splits} has {len(wrong)} anomalous images to learn from, the first is {wrong[0]}: "
                    "give them the split test, or none"
                )
            if groups is not None:
                _check_groups(self.splits, names, given, groups)
            return Division(root, paths, given, groups, self.splits)
        test = share if self.test_fraction is None else self.test_fraction
        validation, seed = self.validation_fraction or 0.0, self.split_seed or 0
        if not test + validation < 1:
            raise UserError(
                f"data.test_fraction={test} and data.validation_fraction={validation} must be below 1 together"
            )
        labels = torch.zeros(len(paths), dtype=torch.int64) if labels is None else labels
        drawn, free = ["test"] * len(paths), torch.ones(len(paths), dtype=torch.bool)
        if tested is not None:
            keys = groups or paths
            spoiled = {keys[i] for i, is_tested in enumerate(tested) if is_tested}
            free = torch.tensor([key not in spoiled for key in keys], dtype=torch.bool)

        def picked(of: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
            if groups is None or not len(of):
                return tuple(of[part] for part in stratified_split(labels[of], fraction, seed))
            return tuple(
                of[part] for part in grouped_split(labels[of], [groups[i] for i in of.tolist()], fraction, seed)
            )

        rest, _ = picked(free.nonzero().flatten(), test)
        learned, validated = picked(rest, validation / (1 - test))
        for split, positions in (("train", learned), ("validation", validated)):
            for i in positions.tolist():
                drawn[i] = split
        return Division(root, paths, drawn, groups)


def below(root: str | Path, paths: list[str]) -> list[str]:
    """The paths as seen from `root`."""
    start = str(root).rstrip(os.sep) + os.sep
    return [path[len(start) :] if path.startswith(start) else os.path.relpath(path, root) for path in paths]


def groups_of(names: list[str], expression: str) -> list[str]:
    """What the expression finds in each path: its first group in parentheses, or all of the match."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"data.group={expression} is no regular expression: {error}") from None
    found = [pattern.search(name) for name in names]
    groups = [match and match[1 if pattern.groups else 0] for match in found]
    if missing := [name for name, group in zip(names, groups) if not group]:
        raise UserError(
            f"data.group={expression} finds nothing in {len(missing)} of {len(names)} paths, the first is {missing[0]}"
        )
    return groups


def _check_groups(file: str, names: list[str], splits: list[str], groups: list[str]) -> None:
    first: dict[str, int] = {}
    for i, (group, split) in enumerate(zip(groups, splits)):
        if split and splits[j := first.setdefault(group, i)] != split:
            raise UserError(
                f"{file} has group {group} in two splits: {names[j]} in {splits[j]}, {names[i]} in {split}; "
                "give all its images one split"
            )


def require_same_classes(found: dict[str, set[str]]) -> None:
    """UserError unless all of these splits, by the words that name them, have images of the same classes."""
    where, classes = next(iter(found.items()))
    for other, its in found.items():
        missing, more = sorted(classes - its), sorted(its - classes)
        if missing or more:
            words = [f"lacks {first_few(missing)}"] * bool(missing) + [f"has {first_few(more)} more"] * bool(more)
            raise UserError(f"{other} {' and '.join(words)}, unlike {where}: all splits need the same classes")


def write_splits(dataset, folder: Path) -> None:
    """On rank 0, `splits.csv` in a run folder: which split each image of a set that has none on the disk is in, to be
    handed in as `data.splits`. Images in no split are left out."""
    for name, division in dataset.divisions.items() if is_main() else ():
        with whole_file(folder / name) as file:
            writer = csv.writer(file)  # with \r\n, for only then a name with a \r is quoted
            writer.writerow(["path", "split"])
            writer.writerows(row for row in dict.fromkeys(zip(division.names, division.splits)) if row[1])


def read_splits(file: str, names: list[str], known: tuple[str, ...]) -> list[str]:
    """The split of each of the images `names` by such a file, or by one written by hand; empty where it has none.

    Raises:
        UserError: a file that cannot be read, a split that the set does not know, an image that is not there or that
            is named twice.
    """
    (_, first), *rows = read_rows(Path(file), "data.splits", errors="surrogateescape")
    columns = [cell.strip() for cell in first]
    if not {"path", "split"} <= {*columns}:
        raise UserError(f"{file} has the columns {first_few(columns, 4)}; splits need path and split")
    path, split = columns.index("path"), columns.index("split")
    there, line_of, split_of, unknown = {*names}, {}, {}, []
    for line, row in rows:
        its = SPLITS.get(row[split].strip().lower())
        if its not in known:
            raise UserError(f"line {line} of {file} has the split {row[split]}; this set knows {', '.join(known)}")
        name = row[path] if row[path] in there else os.path.normpath(row[path].strip().replace("\\", "/"))
        if name not in there:
            unknown.append(row[path])
        elif name in line_of:
            before = f"in {split_of[name]} on line {line_of[name]} of {file} and in {its} on line {line}"
            raise UserError(f"{name} is {before}: remove one of the two")
        line_of[name], split_of[name] = line, its
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(rows)} images that {file} names are not in this set, the first is {unknown[0]}: "
            "paths begin below data.root"
        )
    return [split_of.get(name, "") for name in names]


def read_rows(path: Path, key: str, errors: str = "strict") -> list[tuple[int, list[str]]]:
    """Line numbers and cells of a CSV or TSV file, column names first; cells are separated by what the first line has
    most of: commas, semicolons, tabs. Lines without text are left out.

    Raises:
        UserError: there is no such file (`key` is the option that names it), not even one row, or it is no CSV.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in (".csv", ".tsv", ".txt"))
        raise UserError(f"there is no table {path}; tables there: {first_few(there, 4) or 'none'}; set {key}")
    try:
        with open_regular(path, "r", encoding="utf-8-sig", errors=errors, newline="") as file:
            text = file.read()
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read table {path}: {error}; save it as CSV in UTF-8") from None
    first = text.partition("\n")[0]
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=max(",;\t", key=first.count), strict=True)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is not CSV: {error}") from None
    if len(rows) < 2:
        raise UserError(f"{path} has no row below its column names")
    columns = [cell.strip() for cell in rows[0][1]]
    if len({*columns}) < len(columns):
        raise UserError(f"{path} has two columns of one name: {first_few(columns, 8)}")
    for line, cells in rows[1:]:
        if len(cells) != len(columns):
            raise UserError(f"line {line} of {path} has {len(cells)} cells, and there are {len(columns)} columns")
    return rows
