"""Several sets as one, their classes kept apart or merged."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.dataset import Dataset
from data.datasets.categories import open_set
from data.geometry import Geometry, as_geometry
from data.splits import Division
from runtime import config
from runtime.config import suggest
from runtime.errors import UserError, keys_in
from runtime.schema import choice
from runtime.values import PositiveInt

KINDS: dict[str, type[Dataset]] = {}  # DATASETS, which puts itself here, for it has this class in it


@dataclass(kw_only=True)
class Part:
    """One of the sets: as in section `data`, its name and its options."""

    name: str = choice(KINDS)
    options: dict = field(default_factory=dict)


class Mixed(Dataset):
    """The images of several sets one after the other, each split as its set has it.

    sets: {neu: {name: folder, root: /neu_steel}, parts: {name: scavport_class, root: /scavport}}

    A class is called `<set>/<class>`, and an image `<set>/<its name there>`. Images only, no masks.

    Args:
        sets: {the user's name: the keys `name`, `root` and further ones of a data set}.
        merge: {class: new name}; classes with the same new name become one. An old one is `<set>/<class>`, or `<class>`
            of whatever sets have it.
        min_per_class: classes with fewer training images are left out, of all splits.

    Raises:
        UserError: no sets, a name in `merge` that is no class, no class with so many images, or what a set has to say.
    """

    def __init__(
        self, split: str, size: int | Geometry, *, sets: dict, merge: dict | None = None, min_per_class: PositiveInt = 1
    ):
        if not sets:
            raise UserError("data.sets is empty: give it {a name: {name: folder, root: ...}} of each set")
        geometry = as_geometry(size)
        self.parts = {name: _part(name, about, split, geometry) for name, about in sets.items()}
        owned = [(name, c) for name, part in self.parts.items() for c in part.classes]  # the parts' classes in a row
        new = renamed([f"{name}/{c}" for name, c in owned], merge or {})
        classes = sorted({*new})
        first, labels, paths = 0, [], []
        for part in self.parts.values():
            numbers = torch.tensor([classes.index(name) for name in new[first : first + len(part.classes)]])
            labels.append(numbers[part.labels])
            paths += part.paths
            first += len(part.classes)
        self._rows = [(part, i) for part in self.parts.values() for i in range(len(part))]
        super().__init__(split, size, "", paths, torch.cat(labels), classes)
        for part in self.parts.values():
            self.unreadable |= part.unreadable
            for why, count in part.left_out.items():
                self.left_out[why] = self.left_out.get(why, 0) + count
        train = self if split == "train" or min_per_class <= 1 else Mixed("train", size, sets=sets, merge=merge)
        counts = train.labels.bincount(minlength=len(classes))
        if min_per_class > counts.max():
            raise UserError(f"data.min_per_class={min_per_class}: the largest class has {int(counts.max())} images")
        few = counts < min_per_class
        if min_per_class > 1 and few.any():
            self.keep((~few[self.labels]).nonzero()[:, 0].tolist(), f"of {int(few.sum())} classes with too few")
            self.classes = [name for name, is_small in zip(classes, few.tolist()) if not is_small]
            self.labels = ((~few).long().cumsum(0) - 1)[self.labels]

    def keep(self, positions: list[int], why: str) -> None:
        super().keep(positions, why)
        self._rows = [self._rows[i] for i in positions]

    def image(self, index: int) -> Tensor:
        part, i = self._rows[index]
        return part.image(i)

    def stored(self, index: int):
        part, i = self._rows[index]
        return part.stored(i)

    def box(self, index: int) -> list[int] | None:
        part, i = self._rows[index]
        return part.box(i)

    @property
    def sizes(self) -> Tensor:
        """As of each part; read from the headers when first asked."""
        return torch.stack([part.sizes[i] for part, i in self._rows])

    @property
    def whole_groups(self) -> list[str] | None:
        """Those of the parts; an image of one without groups is its own."""
        if all(part.whole_groups is None for part in self.parts.values()):
            return None
        each = {id(part): (name, part.whole_groups or part.names) for name, part in self.parts.items()}
        return [f"{each[id(part)][0]}/{each[id(part)][1][i]}" for part, i in self._rows]

    @property
    def divisions(self) -> dict[str, Division]:
        """As `splits_<set>.csv`, to be handed in as `data.sets.<set>.splits`."""
        return {
            file.replace("splits", f"splits_{name.replace('/', '_')}", 1): division
            for name, part in self.parts.items()
            for file, division in part.divisions.items()
        }

    @property
    def names(self) -> list[str]:
        names = {id(part): (name, part.names) for name, part in self.parts.items()}
        return [f"{names[id(part)][0]}/{names[id(part)][1][i]}" for part, i in self._rows]


def _part(name: str, about: dict, split: str, geometry: Geometry) -> Dataset:
    part = config.build(Part, about, f"data.sets.{name}.")
    kind = KINDS[part.name]
    if split not in kind.splits:
        raise UserError(f"data.sets.{name}: {part.name} has no split '{split}'")
    with keys_in(f"data.sets.{name}", {"name", *part.options}):
        return open_set(kind, split, geometry, part.options)


def renamed(names: list[str], merge: dict[str, str]) -> list[str]:
    """Each of the classes, called `<set>/<class>` or `<class>`, by its new name.

    Raises:
        UserError: a key of `merge` that is neither one of them nor the `<class>` of one.
    """
    short = [name.partition("/")[2] or name for name in names]
    for old in merge:
        if old not in {*names, *short}:
            raise UserError(f"data.merge: {old} is no class{suggest(str(old), names)}")
    return [str(merge.get(name, merge.get(last, name))) for name, last in zip(names, short)]
