"""Names of any bytes as valid text; long lists cut short."""

import os

import pytest

from runtime.text import first_few, printable


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


def test_first_few():
    assert first_few(iter("abc")) == "a, b, c"
    assert first_few("abcde") == "a, b, c, and 2 more"
    assert first_few([1, 2], 1, separator="; ") == "1; and 1 more"
    assert first_few([]) == ""


def test_control_characters_are_spelled_out():
    """What would color a terminal or turn its direction around; newlines, tabs and any other letters stay."""
    assert printable("a\x1b[31m\0b\x7f\x85") == "a\\x1b[31m\\x00b\\x7f\\x85"
    assert printable("\u202ea\ufeff\u2028") == "\\u202ea\\ufeff\\u2028"
    assert printable("é 名前\u3000😀\u200d\n\t") == "é 名前\u3000😀\u200d\n\t"
