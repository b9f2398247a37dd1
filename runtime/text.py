"""Names of files as text: they may hold any bytes, and TensorBoard, terminals and fonts take only valid Unicode."""

import functools
import sys


def printable(text: str) -> str:
    """`text` with bytes that are no UTF-8 spelled out: os.fsdecode(b"\\xff.png") becomes `\\xff.png`.

    For people, never as a key: another file may really have that name.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte, from a JSON or YAML file
        return text.encode("utf-8", "backslashreplace").decode()


@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, once per process: several data sets look at the same folder."""
    print(printable(line), file=sys.stderr)
