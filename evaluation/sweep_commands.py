"""Commands of a sweep's cells as texts: values in the place of their names, and the variants of a grid."""

import itertools
import math
import re
import shlex
from hashlib import sha256

from runtime import errors

MOST_VARIANTS = 10_000  # combinations of a grid's values
NOTHING = "none"  # a value that leaves out what has it
NAME = r"\{([A-Za-z_]\w*)\}"  # of a value, in a command


def split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise errors.UserError(f"`{errors.cut(text)}` cannot be split into words: {error}") from None


def names_in(text: str, values: dict[str, str]) -> list[str]:
    found = re.findall(NAME, text)
    for name in found:
        if name not in values:
            known = ", ".join(values) or "none"
            raise errors.UserError(f"`{errors.cut(text)}`: there is no values.{name}; there are {known}")
    return found


def filled(text: str, values: dict[str, str]) -> str:
    """`text` with the values for their names: a word that is just a name becomes all of the value's words, a name
    within a word the value as it stands, spaces included."""
    words = []
    for word in split(text):
        alone = re.fullmatch(NAME, word)
        words += split(values[alone[1]]) if alone else [re.sub(NAME, lambda found: values[found[1]], word)]
    return shlex.join(words)


def variants(grid: dict) -> list[tuple[str, list[str]]]:
    """(end of a run folder's name, words of a command line) of each combination; one of nothing for an empty grid.

    `{"optim.lr": [0.03, 0.3], "method": ["byol"]}` gives `_lr-0.03_method-byol` with `optim.lr=0.03 method=byol`, ...
    """
    keys = [key.removesuffix(".name") for key in grid]
    short = [key.rpartition(".")[2] for key in keys]
    short = [last if short.count(last) == 1 else key for last, key in zip(short, keys)]
    found, lists = [], [spelled(key, values) for key, values in grid.items()]
    if math.prod(map(len, lists)) > MOST_VARIANTS:
        raise errors.UserError(f"the grid has more than {MOST_VARIANTS} combinations of values: remove some")
    for values in itertools.product(*lists):
        name = "".join(f"_{key}-{value}" for key, value in zip(short, values))
        found.append((folder_name(name), [f"{key}={value}" for key, value in zip(grid, values)]))
    return found


def spelled(key: str, values) -> list[str]:
    """The values of one of the grid's keys as a command line spells them; a list in the list is one value."""
    if isinstance(values, str):
        values = [value.strip() for value in values.split(",") if value.strip()]
    lists = [v if isinstance(v, list) else [v] for v in (values if isinstance(values, list) else [values])]
    texts = [",".join(_text(part) for part in parts) for parts in lists]
    if not texts or len({*texts}) < len(texts):
        raise errors.UserError(f"grid.{errors.cut(key)}={errors.shown(values)} must be a list of different values")
    return texts


def _text(value) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def folder_name(text: str) -> str:
    """`text` as part of a folder's name on any system; a hash stands for characters that such a name
    cannot have and for what is beyond 80 characters."""
    safe = re.sub(r"[^\w.,+-]", "_", text)[:80]
    return safe if safe == text else f"{safe}-{sha256(text.encode()).hexdigest()[:6]}"
