"""SVG charts are well-formed, count right, and hold any name."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from plots.bars import LINES, bars_svg, histogram_svg, lines_svg
from plots.style import ALARM, USUAL

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg):
    root = ElementTree.fromstring(svg)
    return [text.text for text in root.iter(f"{SVG}text")], list(root.iter(f"{SVG}rect"))


def of(color, boxes):
    return [box for box in boxes if box.get("fill") == "#{:02x}{:02x}{:02x}".format(*color)]


def test_what_is_beyond_a_limit_is_orange_and_counted():
    values = np.array([0.05, 0.1, 0.5, 0.5, 0.5, 0.97])
    texts, boxes = drawn(histogram_svg("Score", {"train": values, "test": values[:1]}, low=0.2, high=0.95))
    assert "3 of 6" in texts and "1 of 1" in texts
    assert len(of(ALARM, boxes)) == 4 and len(of(USUAL, boxes)) == 1
    texts, boxes = drawn(histogram_svg("Score", {"train": values}))
    assert "6 images" in texts and not of(ALARM, boxes)


@pytest.mark.parametrize("values", [[], [0.3], [0.3, 0.3], [0.0], [1e-12, 1e9]])
def test_few_values(values):
    drawn(histogram_svg("Score", {"train": np.array(values)}, low=0.3))


def test_bars_are_as_long_as_the_counts():
    texts, boxes = drawn(bars_svg("Images", {"a": [40, 10], "b<&\udcff\n": [0, 20]}, ["train", "test"]))
    lengths = [float(box.get("width")) for box in boxes[2:]]  # after the key
    assert len(lengths) == 3 and lengths == pytest.approx([lengths[0], lengths[0] / 4, lengths[0] / 2], abs=0.1)
    assert {"40", "10", "0", "20", "train", "test", "a"} <= set(texts)


def polylines(svg):
    """Those in the plot, each [(x, y), ...], without the keys beside the names; and what each looks like."""
    lines = list(ElementTree.fromstring(svg).iter(f"{SVG}polyline"))[::2]
    pairs = [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in lines]
    return pairs, [(line.get("stroke"), line.get("stroke-dasharray")) for line in lines]


def test_lines_are_where_their_points_are():
    svg = lines_svg("ROC", {"a": [(0, 0), (0.5, 0.8), (1, 1)], "b<&": []}, "x", "y", notes={"a": "0.7"}, unit=True)
    (a, b), _ = polylines(svg)
    assert b == [] and {"a 0.7", "b<& (none)", "x", "y", "ROC"} <= set(drawn(svg)[0])
    assert a[2][0] - a[0][0] == pytest.approx(250) and a[0][1] - a[2][1] == pytest.approx(190)
    assert a[1] == pytest.approx((a[0][0] + 125, a[0][1] - 0.8 * 190), abs=0.1)


@pytest.mark.parametrize("values", [[], [(1, 3.0)], [(1, 2.0), (2, 2.0)], [(0, 1e-12), (1e9, 1e12)], [(1, -5.0)]])
def test_few_points(values):
    points = [*values, (2, float("nan")), (float("inf"), 1)]
    svg = lines_svg("Loss", {"a": points}, "step", "loss")
    (line,), _ = polylines(svg)
    assert svg.count("<circle") == (len(values) == 1)
    assert len(line) == len(values) and all(48 <= x <= 298 and 34 <= y <= 224 for x, y in line)


def test_many_lines_look_different():
    _, looks = polylines(lines_svg("Loss", {str(i): [(0, 0), (1, i)] for i in range(3 * len(LINES))}, "x", "y"))
    assert len({*looks}) == len(looks)
