"""How many images there are of each class and split."""

from collections import Counter

from evaluation.dataset.inspection import Inspected
from evaluation.dataset.section import Section, Table


def counts(splits: dict[str, Inspected]) -> Section:
    by_split = {name: Counter(split.kinds) for name, split in splits.items()}
    kinds = list(dict.fromkeys(kind for counter in by_split.values() for kind in sorted(counter)))
    rows = [[kind, *(str(counter[kind]) for counter in by_split.values())] for kind in kinds]
    numbers = {name: dict(counter) for name, counter in by_split.items()}
    return Section("counts", "Images of each class", numbers, parts=[Table(["class", *splits], rows)])
