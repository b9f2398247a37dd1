"""Images that show the same: within a split, and in two splits, where testing is on what was learned from.

Exact copies have the same decoded pixels. Near ones are resized, encoded anew, flipped or rotated by quarter turns
(data/duplicates.py). Each image is reported with its nearest copy only.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.duplicates import nearest, turned
from evaluation.dataset.inspection import Inspected, tile
from evaluation.dataset.section import Gallery, Problem, Section, Table, count

SHOWN, SIDE, GAP = 12, 150, 4  # pairs of each kind in the report, pixels of an image's side, between two
LISTED = 100  # pairs of each kind in results.json


class Pair(NamedTuple):
    """An image and the one that it is a copy of: positions in their splits, and how they differ."""

    image: int
    other: int
    distance: float  # root mean square difference of 16 x 16 gray values, 0 to 255
    exact: bool
    how: str


def copies(splits: dict[str, Inspected]) -> tuple[Section, list[dict]]:
    """The section, and all pairs as rows of copies.csv."""
    numbers: dict = {"across": {}, "within": {}}
    problems, galleries, table, rows = [], [], [], []
    for name, other in [(later, earlier) for earlier, later in combinations(splits, 2)] + [(n, n) for n in splits]:
        within, where = name == other, f"{name} in {other}"
        pairs = find(splits[name], None if within else splits[other])
        exact, mixed = [pair for pair in pairs if pair.exact], _of_two_classes(splits[name], splits[other], pairs)
        images = len({i for pair in pairs for i in ((pair.image, pair.other) if within else (pair.image,))})
        listed = [_entry(name, other, splits, pair) for pair in pairs]
        rows += listed
        about = {"images": images, "exact": len(exact), "near": len(pairs) - len(exact), "other_class": len(mixed)}
        numbers["within" if within else "across"][where] = about | {"pairs": listed[:LISTED]}
        table.append([where, *(f"{number:,}" for number in about.values())])
        if pairs:
            problems += _problems(name, other, listed[0], about)
            galleries.append(_gallery(name, other, splits, pairs))
        if mixed:
            one = _entry(name, other, splits, mixed[0])
            named = f"{one['image']} ({one['class']}) and {one['other_image']} ({one['other_class']})"
            text = f"{count(len(mixed), 'pair')} of copies {'is' if len(mixed) == 1 else 'are'} of two classes: {named}"
            problems.append(Problem("error", text))
    about_copies = (
        "Exact copies have the same pixels; near ones are resized, encoded anew, flipped or rotated (counterclockwise)."
        " Each image is listed with its nearest copy, each pair once; copies.csv has all. The distance is that of"
        " 16 x 16 gray values, 0 to 255."
    )
    header = ["where", "images with a copy", "exact pairs", "near pairs", "of two classes"]
    parts = [about_copies, Table(header, table), *galleries]
    return Section("copies", "Copies and leakage", numbers, problems, parts), rows


def _problems(name: str, other: str, first: dict, about: dict) -> list[Problem]:
    images = count(about["images"], "image")
    if name == other:
        pairs = f"{count(about['exact'], 'exact pair')}, {about['near']:,} near"
        return [Problem("warning", f"{images} of {name} have a copy in {name} ({pairs})")]
    kinds = f"{about['exact']:,} exact, {about['near']:,} near copies; {first['image']} is {first['other_image']}"
    return [Problem("error", f"{images} of {name} {'is' if about['images'] == 1 else 'are'} also in {other} ({kinds})")]


def _of_two_classes(mine: Inspected, theirs: Inspected, pairs: list[Pair]) -> list[Pair]:
    """Pairs whose classes contradict; splits with other classes, as a test set without labels, say nothing."""
    if mine.dataset.classes != theirs.dataset.classes:
        return []
    return [pair for pair in pairs if mine.kinds[pair.image] != theirs.kinds[pair.other]]


def find(split: Inspected, others: Inspected | None = None) -> list[Pair]:
    """Each image of the split that has a copy among the others (None: in the split itself, each pair once), with the
    nearest one, an exact one before all: exact ones first, then by distance."""
    base = split if others is None else others
    if not len(split.readable) or not len(base.readable):
        return []
    same = _same_pixels(split, others)
    position, distance = nearest(split.fingerprints, None if others is None else others.fingerprints)
    exact = same >= 0
    position, distance = torch.where(exact, same, position), distance.masked_fill(exact, 0)
    pairs, seen = [], set()
    for i in (position >= 0).nonzero()[:, 0].tolist():
        j = int(position[i])
        image, other = int(split.readable[i]), int(base.readable[j])
        if others is None:
            image, other = max(image, other), min(image, other)
            if (image, other) in seen:
                continue
            seen.add((image, other))
        how = "same pixels" if exact[i] else turned(split.fingerprints, i, base.fingerprints, j)
        pairs.append(Pair(image, other, float(distance[i]), bool(exact[i]), how))
    return sorted(pairs, key=lambda pair: (not pair.exact, pair.distance, pair.image))


def _same_pixels(split: Inspected, others: Inspected | None) -> Tensor:
    """For each readable image the first of the others with the same pixels, among the readable ones: -1 without one."""
    base = split if others is None else others
    digests = [each.rows["digest"][each.readable] for each in (base, split)]
    _, group = np.unique(np.concatenate(digests), axis=0, return_inverse=True)  # equal numbers for equal pixels
    theirs, own = np.split(group.ravel(), [len(digests[0])])
    order = np.argsort(theirs, kind="stable")
    at = np.searchsorted(theirs[order], own)  # where those of its group begin
    first = order[at.clip(max=len(order) - 1)]
    if others is None:
        at += first == np.arange(len(own))  # not the image itself
        first = order[at.clip(max=len(order) - 1)]
    same = theirs[first] == own
    if others is None:
        same &= first != np.arange(len(own))
    return torch.from_numpy(np.where(same, first, -1))


def _entry(name: str, other: str, splits: dict[str, Inspected], pair: Pair) -> dict:
    a, b = splits[name], splits[other]
    return {
        "split": name,
        "image": a.names[pair.image],
        "class": a.kinds[pair.image],
        "other_split": other,
        "other_image": b.names[pair.other],
        "other_class": b.kinds[pair.other],
        "how": pair.how,
        "distance": round(pair.distance, 3),
    }


def _how(pair: Pair) -> str:
    return pair.how if pair.exact else f"{pair.how}, distance {pair.distance:.2f}"


def _gallery(name: str, other: str, splits: dict[str, Inspected], pairs: list[Pair]) -> Gallery:
    """Pairs side by side, spread from the most to the least alike."""
    chosen = [pairs[k] for k in np.unique(np.linspace(0, len(pairs) - 1, SHOWN).round().astype(int))]
    tiles = []
    for pair in chosen:
        a, b = splits[name], splits[other]
        images = tile(a.dataset, pair.image, SIDE), tile(b.dataset, pair.other, SIDE)
        caption = f"{a.names[pair.image]} | {b.names[pair.other]}\n{_how(pair)}"
        tiles.append((caption, _beside(*images)))
    title = f"Copies within {name}" if name == other else f"In {name} and in {other}"
    left = len(pairs) - len(chosen)
    return Gallery(title, tiles, "from the most to the least alike" + (f", {left:,} more between them" if left else ""))


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """Two images (3, h, w), white where the lower one ends."""
    height = max(left.shape[1], right.shape[1])
    paper = torch.full((3, height, left.shape[2] + GAP + right.shape[2]), 255, dtype=torch.uint8)
    paper[:, : left.shape[1], : left.shape[2]] = left
    paper[:, : right.shape[1], left.shape[2] + GAP :] = right
    return paper
