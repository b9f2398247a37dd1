"""The variants that a sweep's `grid` spells: every combination of the values of its keys."""

import itertools
import re
from hashlib import sha256

from runtime.errors import UserError


def variants(grid: dict) -> list[tuple[str, list[str]]]:
    """(end of a run folder's name, words of a command line) of each combination; one of nothing for an empty grid.

    `{"optim.lr": [0.03, 0.3], "method": ["byol"]}` gives `_lr-0.03_method-byol` with `optim.lr=0.03 method=byol`, ...
    """
    keys = [key.removesuffix(".name") for key in grid]
    short = [key.rpartition(".")[2] for key in keys]
    short = [last if short.count(last) == 1 else key for last, key in zip(short, keys)]
    found = []
    for values in itertools.product(*(spelled(key, values) for key, values in grid.items())):
        name = "".join(f"_{key}-{value}" for key, value in zip(short, values))
        found.append((folder_name(name), [f"{key}={value}" for key, value in zip(grid, values)]))
    return found


def spelled(key: str, values) -> list[str]:
    """The values of a key of the grid as a command line has them; a list in the list is one value."""
    if isinstance(values, str):
        values = [value.strip() for value in values.split(",") if value.strip()]
    lists = [v if isinstance(v, list) else [v] for v in (values if isinstance(values, list) else [values])]
    texts = [",".join(_text(part) for part in parts) for parts in lists]
    if not texts or len({*texts}) < len(texts):
        raise UserError(f"grid.{key}={values} must be a list of different values")
    return texts


def _text(value) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def folder_name(text: str) -> str:
    """`text` as a part of a folder's name on any system: what such a name cannot have or is too long is in a hash."""
    safe = re.sub(r"[^\w.,+-]", "_", text)[:80]
    return safe if safe == text else f"{safe}-{sha256(text.encode()).hexdigest()[:6]}"
