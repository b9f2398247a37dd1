"""What the report on a data set consists of: sections, and in each what is wrong, tables, charts and images.

A further section is one file beside this one with a function that returns a `Section`, and one line in
evaluation/tasks/data.py. The report, results.json, TensorBoard and the PNG files follow from what is in it.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

Weight = Literal["error", "warning", "note"]  # of problems, the worst first


class Problem(NamedTuple):
    """One line at the top of the report, such as `3 images of test are also in train`."""

    weight: Weight
    text: str


@dataclass
class Table:
    """Cells are texts. The first column says what the row is about, the others are numbers, unless `texts`."""

    header: list[str]
    rows: list[list[str]]
    title: str = ""
    texts: bool = False


@dataclass
class Chart:
    """A drawing as SVG (plots/bars.py), with its title in it."""

    svg: str


@dataclass
class Gallery:
    """Images under one title, in a PNG file and TensorBoard as one sheet; `tiles` are captions of one or two lines and
    images, uint8 (3, h, w) with at most about 300 pixels a side."""

    title: str
    tiles: list[tuple[str, Tensor]]
    note: str = ""  # which ones these are


@dataclass
class Section:
    """One part of the report.

    Attributes:
        key: of its numbers in results.json.
        numbers: what a program reads.
        problems: for the top of the report.
        parts: in the order of the report; a text is a paragraph.
    """

    key: str
    title: str
    numbers: dict = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    parts: list[str | Table | Chart | Gallery] = field(default_factory=list)


def count(number: int, noun: str) -> str:
    """`1 image`, `1,200 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
