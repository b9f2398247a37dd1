"""Names in images: whatever they hold, no box is drawn, and text that Pillow's own font has looks as it did."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from plots import style
from plots.style import NO_CHARACTER, font, lettered, write


@pytest.fixture(params=["this machine's fonts", "Pillow's own font alone"])
def fonts(request, monkeypatch):
    if request.param.endswith("alone"):
        monkeypatch.setattr(style, "_fonts", lambda: ("",))


NAMES = ["Kratzer_größe", "Жук", "中文 1", "שלום", "ελ", "a\nb\tc", os.fsdecode(b"\xff\xe4.png"), "😀", "ＡＢ", "", " "]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("fonts")
def test_no_character_is_a_box(name):
    shown, face = lettered(name, 17)
    box = face.getmask(NO_CHARACTER)
    for char in shown.replace(" ", ""):
        mask = face.getmask(char)
        assert (mask.size, bytes(mask)) != (box.size, bytes(box)), char
    assert "\n" not in shown and "\t" not in shown
    assert bool(shown) == bool(name)


def test_what_no_font_has(monkeypatch):
    monkeypatch.setattr(style, "_fonts", lambda: ("",))
    for name, expected in {
        "Lunker-Größe é": r"Lunker-Gro\u00dfe e",
        unicodedata.normalize("NFD", "é"): "e",
        "中文1": r"\u4e2d\u6587" + "1",
        "😀": r"\U0001f600",
        "ＡＢ": "AB",
        "a\nb": r"a\nb",
        "a\u202eb": r"a\u202eb",  # would be drawn from right to left
        os.fsdecode(b"\xff"): r"\xff",
    }.items():
        assert lettered(name, 17)[0] == expected, name


def test_a_font_of_this_machine_is_taken_only_when_it_is_needed():
    if "DejaVuSans.ttf" not in style._fonts():
        pytest.skip("no DejaVu here")
    shown, face = lettered("größe Жук α", 17)
    assert shown == "größe Жук α" and face.getname()[0] == "DejaVu Sans"
    assert lettered("scratch", 17)[1] is font(17)
    # the font that lacks fewest characters, and what it lacks spelled out
    assert lettered("ä中", 17)[0] == r"ä\u4e2d" and lettered("ä中", 17)[1].getname()[0] == "DejaVu Sans"


def test_plain_text_is_drawn_as_pillow_does():
    papers = [Image.new("RGB", (200, 40), "white") for _ in range(2)]
    write(ImageDraw.Draw(papers[0]), (9, 20), "scratch_2 (x)", (1, 2, 3), 17, anchor="lm")
    ImageDraw.Draw(papers[1]).text((9, 20), "scratch_2 (x)", (1, 2, 3), ImageFont.load_default(17), "lm")
    assert np.array_equal(*papers) and np.asarray(papers[0]).min() == 1


def test_long_names_keep_both_ends_and_fit():
    name = "manipulated_front_side_scratch_type_b"
    short, face = lettered(name, 17, 200)
    assert face.getlength(short) <= 200
    assert short.startswith("manipul") and short.endswith("type_b") and "..." in short
    assert lettered("", 17, 10)[0] == "" and lettered(name, 17)[0] == name
