"""The curves over severity are where the numbers say, and gaps and long names are drawn."""

import numpy as np

from plots.heatmaps import MARGIN
from plots.severity import LEFT, PLOT, TOP, severity_image
from plots.style import ALARM, USUAL


def dots(image, color):
    pixels = np.asarray(image)
    return np.argwhere((pixels == color).all(2))


def test_lines_begin_and_end_where_their_numbers_are():
    image = severity_image({"fog": {"a": [0.0, 1.0], "b": [0.5, None]}}, [0, 5], "title", "note")
    left, right = MARGIN + LEFT, MARGIN + LEFT + PLOT
    places = {tuple(place) for place in dots(image, USUAL)}
    assert (TOP + PLOT, left) in places and (TOP, right) in places  # a row and a column of pixels
    assert (TOP, left) not in places and (TOP + PLOT, right) not in places
    assert (TOP + PLOT // 2, left) in {tuple(place) for place in dots(image, ALARM)}


def test_panels_of_any_number_and_names():
    sizes = []
    for count in (0, 1, 5, 6):
        panels = {f"a long name of a corruption {i}": {"error": [None, 0.5]} for i in range(count)}
        sizes.append(severity_image(panels, [0, 3], "t" * 99, "n" * 99).height)
    assert sizes == sorted(sizes) and sizes[2] < sizes[3]
