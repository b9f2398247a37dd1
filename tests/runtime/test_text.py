"""Names of any bytes as valid text."""

import os

import pytest

from runtime.text import printable


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (os.fsdecode(b"\xff\xfe.png"), r"\xff\xfe.png"),
        (os.fsdecode("größe 中.png".encode()), "größe 中.png"),
        (os.fsdecode(b"gr\xf6\xdfe.png"), r"gr\xf6\xdfe.png"),  # Latin-1
        ("\ud800x", r"\ud800x"),
        ("", ""),
        ("a\\xff", "a\\xff"),
    ],
)
def test_printable(name, expected):
    assert printable(name) == expected
    printable(name).encode()
