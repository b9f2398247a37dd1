"""Text for people: names of files, which may hold any bytes where terminals, fonts and TensorBoard take only valid
Unicode; long lists cut short; lines that are printed once."""

import functools
import re
import sys
from collections.abc import Iterable

# What moves a terminal's cursor, colors it, ends a line or turns its direction around
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """`text` with bytes that are not UTF-8 and control characters spelled out, but for newlines and tabs:
    os.fsdecode(b"\\xff.png") becomes `\\xff.png`.

    For people, never as a key: another file may really have that name.
    """
    text = CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that is not a byte, from a JSON or YAML file
        return text.encode("utf-8", "backslashreplace").decode()


def first_few(items: Iterable, most: int = 3, separator: str = ", ") -> str:
    """`a, b, c, and 4 more`: the first `most` items and the number of the others."""
    texts = [str(item) for item in items]
    rest = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join(texts[:most] + rest)


@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, once per process: several data sets look at the same folder."""
    print(printable(line), file=sys.stderr)
