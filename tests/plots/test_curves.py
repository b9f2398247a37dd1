"""Where things are drawn, not every pixel of them."""

import numpy as np
import pytest
import torch

from evaluation.anomaly.display import ranking_curves
from evaluation.anomaly.metrics import image_metrics
from plots.curves import (
    ALARM,
    GRID,
    LEFT,
    NAMES,
    PANEL,
    PLOT,
    ROW,
    TOP,
    USUAL,
    bar_edges,
    histogram_image,
    roc_pr_image,
    ticks,
)
from plots.heatmaps import MARGIN
from runtime.errors import UserError

BOXES = [(MARGIN + LEFT, TOP, PANEL, PANEL), (MARGIN + 2 * LEFT + PANEL + 2 * MARGIN, TOP, PANEL, PANEL)]
SCORES, LABELS = [0.1, 0.2, 0.3, 0.9, 0.25, 0.6, 0.7, 0.8], [0, 0, 0, 0, 1, 1, 1, 1]


def drawn(scores, labels, title: str, threshold: float | None = None):
    scores, labels = np.array(scores), np.array(labels)
    return roc_pr_image(ranking_curves(scores, labels, image_metrics(scores, labels), threshold), title)


def pixel(box, x: float, y: float) -> tuple[int, int]:
    left, top, width, height = box
    return round(left + x * width), round(top + height - y * height)


def colored(image, color) -> np.ndarray:
    """(H, W) bool."""
    return (np.asarray(image) == color).all(-1)


def middle(where: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(where)
    return (x.min() + x.max()) / 2, (y.min() + y.max()) / 2


def test_the_dot_is_where_the_threshold_is():
    """At 0.65 two of four anomalous images are found with one false alarm of four: precision 2/3."""
    image = drawn(SCORES, LABELS, "a run", 0.65)
    orange = colored(image, ALARM)
    assert image.size == (1008, 640)
    for box, (x, y) in zip(BOXES, [(0.25, 0.5), (0.5, 2 / 3)]):
        left, top, width, height = box
        panel = np.zeros_like(orange)
        panel[top - 10 : top + height + 10, left - 10 : left + width + 10] = True
        assert middle(orange & panel) == pytest.approx(pixel(box, x, y), abs=1)
    assert orange[TOP + PANEL + 40 :].any()  # and in the key
    assert not colored(drawn(SCORES, LABELS, "a run"), ALARM).any()


def test_the_curves_go_through_their_points():
    blue = colored(drawn(SCORES, LABELS, "a run"), USUAL)
    for box, points in zip(
        BOXES, [[(0, 0), (0.25, 0.4), (0.25, 0.75), (0.4, 0.75), (1, 1)], [(0.5, 2 / 3), (0.75, 3 / 4), (1, 4 / 6)]]
    ):
        for x, y in points:
            column, row = pixel(box, x, y)
            assert blue[row - 3 : row + 4, column - 3 : column + 4].any(), (x, y)
    column, row = pixel(BOXES[0], 0.6, 0.4)
    assert not blue[row - 60 : row + 60, column - 60 : column + 60].any()


@pytest.mark.parametrize(("scores", "labels"), [([], []), ([1.0], [0]), ([1.0], [1]), ([1.0, 2.0], [1, 1])])
def test_plots_without_a_class_stay_empty(scores, labels):
    image = drawn(scores, labels, "one class", 0.5)
    assert not colored(image, USUAL).any() and not colored(image, ALARM).any()


def test_no_alarm_has_no_precision():
    orange = colored(drawn(SCORES, LABELS, "a run", 5.0), ALARM)[: TOP + PANEL + 10]
    assert orange[:, : BOXES[1][0] - 60].any() and not orange[:, BOXES[1][0] - 20 :].any()


def row_of(image, number: int, color) -> np.ndarray:
    """(ROW, PLOT) bool: where the bars of a group have a color."""
    top = 104 + ROW * number
    return colored(image, color)[top : top + ROW, MARGIN + NAMES : MARGIN + NAMES + PLOT]


def test_bars_change_color_at_the_threshold():
    groups = {"normals": torch.tensor([1.0, 2, 3, 3, 4]), "good": np.array([4.0]), "hole": [4.1, 9, 10], "none": []}
    image = histogram_image(groups, 4.0)
    assert image.size == (1098, 164 + 4 * ROW)
    blue, orange = ([row_of(image, i, color) for i in range(4)] for color in (USUAL, ALARM))
    assert [b.any() for b in blue] == [True, True, False, False]  # a tie with the threshold is no alarm
    assert [o.any() for o in orange] == [False, False, True, False]
    line = np.nonzero(blue[1].any(0))[0].max() + 1  # the bar of 4.0 ends at the threshold
    assert np.nonzero(orange[2].any(0))[0].min() == pytest.approx(line, abs=4)
    heights = blue[0].sum(0)
    assert heights.max() == pytest.approx(2 * np.median(heights[heights > 0]), abs=2)  # two images of score 3


def test_groups_without_threshold_are_all_blue():
    image = histogram_image({"a": [1.0], "b": []}, None)
    assert colored(image, USUAL).any() and not colored(image, ALARM).any()
    left, right = np.nonzero(row_of(image, 0, USUAL).any(0))[0][[0, -1]]
    assert (left + right) / 2 == pytest.approx(PLOT / 2, abs=12)  # one value stands in the middle


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_no_group_and_infinite_scores(threshold):
    assert colored(histogram_image({}, threshold), GRID).any()
    image = histogram_image({"a": [-np.inf, 0.0, 1.0, np.inf]}, threshold)
    assert (row_of(image, 0, USUAL) | row_of(image, 0, ALARM)).any()
    with pytest.raises(UserError, match="scores of a are not a number"):
        histogram_image({"a": [float("nan")]}, threshold)


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [1000.001, 1000.002], [-3e-9, 4e7], np.linspace(0, 1, 99)])
@pytest.mark.parametrize("threshold", [None, 0.0, 1000.0015])
def test_bar_edges_hold_everything_and_meet_at_the_threshold(values, threshold):
    values = np.array(values, dtype=np.float64)
    edges = bar_edges(values, threshold)
    assert (np.diff(edges) > 0).all() and 50 < len(edges) < 70
    everything = values if threshold is None else np.append(values, threshold)
    assert all(edges[0] < value < edges[-1] for value in everything)
    assert threshold is None or threshold in edges


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.9), (999.99, 1000.03), (0, 3e7), (-5e-5, 4e-5), (17, 80)])
def test_ticks_are_round_and_few(low, high):
    values, texts = zip(*ticks(low, high))
    assert 3 <= len(values) <= 8 and low <= min(values) and max(values) <= high
    assert len(set(texts)) == len(texts) and [float(text) for text in texts] == pytest.approx(values)


def test_fifteen_defects_with_long_names_have_rows_of_their_own():
    names = [f"a_defect_with_a_very_long_name_that_has_no_room_{i}" for i in range(15)]
    image = histogram_image({name: [float(i), i + 1.0] for i, name in enumerate(names)}, 7.0)
    assert image.size[1] == 164 + 15 * ROW
    ink = np.asarray(image.convert("L")) < 100
    assert not ink[104 : 104 + 15 * ROW, MARGIN + NAMES - 16 : MARGIN + NAMES].any()  # names end before the bars
