"""Several categories of one data set as one, for one detector of all of them."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from data.geometry import Geometry
from data.splits import Division
from runtime.errors import UserError
from runtime.text import first_few


def open_set(kind: type[Dataset], split: str, size: int | Geometry, options: dict[str, Any]) -> Dataset:
    """One split of a data set. `category=a,b` and `category=all` are its `Categories`, unless one is called so.

    Raises:
        UserError: a name that is empty or there twice, several for `others`, or what the data set has to say.
    """
    given = options.get("category")
    if given is None or (given != "all" and "," not in given):
        return kind(split, size, **options)
    there = kind.categories(**options)
    if given in there or (given == "all" and not there):  # of no category the data set says what it expects
        return kind(split, size, **options)
    names = there if given == "all" else [name.strip() for name in given.split(",")]
    if "" in names or len({*names}) < len(names):
        raise UserError(f"data.category={given} has a name that is empty or there twice: give each category once")
    if split == "others":
        raise UserError(f"data.category={given}: the detector learns from all other categories, so name one")
    return Categories(split, {name: kind(split, size, **options | {"category": name}) for name in names})


class Categories(Dataset):
    """The images of several categories one after the other; groups say which is of which.

    Defects are called `<category>/<defect>`. If only some categories have masks, the others' defective images are left
    out of the pixel metrics.

    Args:
        parts: {category: its set}, all of one kind and root.
    """

    def __init__(self, split: str, parts: dict[str, Dataset]):
        self._rows = [(name, part, i) for name, part in parts.items() for i in range(len(part))]
        first, paths = next(iter(parts.values())), [path for part in parts.values() for path in part.paths]
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            raise UserError(f"{twice[0]} is in data.category twice: give each category once")
        labels = torch.cat([part.labels for part in parts.values()])
        super().__init__(split, first.geometry, first.root, paths, labels, first.classes)
        if first.defects is not None:
            pairs = [(name, defect) for name, part in parts.items() for defect in part.defects or ()]
            self.defects = [defect if defect == "good" else f"{name}/{defect}" for name, defect in pairs]
        self.has_masks = any(part.has_masks for part in parts.values())
        self.mask_paths = [files for part in parts.values() for files in part.mask_paths]
        self.splits, self.few, self.saturates = first.splits, first.few, first.saturates
        for part in parts.values():
            for why, count in part.left_out.items():
                self.left_out[why] = self.left_out.get(why, 0) + count
            self.unreadable |= part.unreadable

    def keep(self, positions: list[int], why: str) -> None:
        super().keep(positions, why)
        self._rows = [self._rows[i] for i in positions]

    def image(self, index: int) -> Tensor:
        _, part, i = self._rows[index]
        return part.image(i)

    def stored(self, index: int):
        _, part, i = self._rows[index]
        return part.stored(i)

    def mask(self, index: int, *, original: bool = False) -> Tensor:
        _, part, i = self._rows[index]
        return part.mask(i, original=original)

    def regions(self, index: int) -> list[tuple[Tensor, int]]:
        """As of a set that `saturates`."""
        _, part, i = self._rows[index]
        return part.regions(i)

    @property
    def groups(self) -> dict[str, list[str]]:
        """`category`, and what the parts' images are grouped by."""
        own = {name: part.groups for name, part, _ in self._rows}
        kinds = next(iter(own.values()))
        more = {kind: [own[name][kind][i] for name, _, i in self._rows] for kind in kinds}
        return {"category": [name for name, *_ in self._rows]} | more

    @property
    def whole_groups(self) -> list[str] | None:
        """Those of the categories; an image of one without is its own."""
        parts = {name: part for name, part, _ in self._rows}
        if all(part.whole_groups is None for part in parts.values()):
            return None
        own = {name: part.whole_groups or part.names for name, part in parts.items()}
        return [f"{name}/{own[name][i]}" for name, _, i in self._rows]

    @property
    def divisions(self) -> dict[str, Division]:
        """As of each category."""
        parts = {name: part for name, part, _ in self._rows}
        return {
            file.replace("splits", f"splits_{name}", 1): division
            for name, part in parts.items()
            for file, division in part.divisions.items()
        }

    @property
    def matched(self) -> str:
        """As of any set, by category and not by defect."""
        counts: dict[str, Counter] = {}
        for (name, *_), label in zip(self._rows, self.labels.tolist()):
            counts.setdefault(name, Counter())[label] += 1
        each = [f"{name} {own[0]} good" + f" + {own[1]} defective" * (own[1] > 0) for name, own in counts.items()]
        masks = f", {sum(files is not None for files in self.mask_paths)} masks" if self.has_masks else ""
        return (
            f"{self.split} of {self.root}: {len(self)} images of {len(each)} categories ({first_few(each, 20)}){masks}"
        )
