"""What is computed for the drawings: color scale, images worth a look, curves."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve, roc_curve

from evaluation.anomaly.display import heat_range, pick_images, ranking_curves
from evaluation.anomaly.metrics import image_metrics
from evaluation.anomaly.report import good_first
from runtime.errors import UserError


def test_heat_range_comes_from_the_quantiles_of_normal_maps():
    maps = torch.arange(1001.0)[torch.randperm(1001)].reshape(1, 7, 143)
    assert heat_range(maps) == pytest.approx((500, 500 + 1.5 * 499))
    low, high = heat_range(torch.full((2, 3, 3), 4.0))
    assert low == 4 and high > low
    with pytest.raises(UserError, match="not a number"):
        heat_range(torch.full((1, 2, 2), float("nan")))


def test_pick_by_hand():
    #          0     1     2     3     4     5     6     7     8
    scores = [0.10, 0.20, 0.30, 0.60, 0.40, 0.45, 0.70, 0.90, 0.80]
    defects = ["good"] * 4 + ["hole", "hole", "hole", "crack", "crack"]
    captions = pick_images(torch.tensor(scores), torch.tensor([0] * 4 + [1] * 5), defects, 0.5, each=2)
    got = [(c.index, c.heading, c.correct, c.lines[-1]) for c in captions]
    assert got == [
        (4, "missed", False, "low for a defect"),
        (5, "missed", False, "low for a defect"),
        (3, "false alarm", False, "high for a good one"),
        (2, "correct", True, "high for a good one"),
        (7, "correct", True, "highest of its kind"),
        (8, "correct", True, "median of its kind"),  # the lower of two
        (6, "correct", True, "highest of its kind"),  # the median hole stands above as a miss
        (1, "correct", True, "median of its kind"),
    ]
    assert captions[0].lines[:4] == ["hole", "called normal", "score 0.4 (threshold 0.5)", "rank 6 of 9"]
    assert captions[4].lines[:4] == ["crack", "called anomalous", "score 0.9 (threshold 0.5)", "rank 1 of 9"]


def test_pick_without_a_threshold_gives_no_verdict():
    (caption,) = pick_images([0.5], [1], ["hole"], None)
    assert (caption.heading, caption.correct) == ("no threshold", None)
    assert caption.lines == ["hole", "score 0.5", "rank 1 of 1", "low for a defect"]


def test_pick_shows_every_image_once_and_lives_without_a_class():
    labels = torch.tensor([0, 1] * 20)
    defects = ["good", "hole"] * 20
    captions = pick_images(torch.rand(40), labels, defects, 0.5)
    assert len({c.index for c in captions}) == len(captions) <= 3 + 3 + 3
    assert all(c.correct == ((c.lines[1] == "called anomalous") == (c.lines[0] == "hole")) for c in captions)
    normals = pick_images(torch.zeros(4), torch.zeros(4), ["good"] * 4, 0.5)
    assert {c.lines[-1] for c in normals} <= {"high for a good one", "median of its kind"}
    assert [c.lines[-1] for c in pick_images(torch.ones(1), torch.ones(1), ["hole"], 0.5)] == ["low for a defect"]


def test_a_tie_with_the_threshold_is_no_alarm():
    assert pick_images([0.5], [1], ["hole"], 0.5)[0].heading == "missed"


@pytest.mark.parametrize("decimals", [8, 1])  # 1: many ties
def test_curves_go_through_the_points_of_scikit_learn(decimals):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=60).round(decimals), rng.integers(0, 2, 60)
    curves = ranking_curves(torch.tensor(scores), torch.tensor(labels), image_metrics(scores, labels), 0.3)
    rates, recalls, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert np.allclose(curves.false_alarm_rate, rates[1:]) and np.allclose(curves.recall, recalls[1:])
    precisions, recalls, _ = precision_recall_curve(labels, scores)
    assert np.allclose(curves.precision, precisions[-2::-1]) and np.allclose(curves.recall, recalls[-2::-1])
    assert (curves.hits, curves.false_alarms) == tuple(((scores > 0.3) & (labels == kind)).sum() for kind in (1, 0))
    assert (curves.n_anomalous, curves.n_normal) == (labels.sum(), 60 - labels.sum())


@pytest.mark.parametrize("labels", [[], [0], [1, 1]])
def test_curves_without_a_class(labels):
    scores = np.arange(float(len(labels)))
    curves = ranking_curves(scores, labels, image_metrics(scores, np.array(labels)), None)
    assert curves.auroc is curves.ap is None and (curves.hits, curves.false_alarms) == (0, 0)
    assert len(curves.recall) == len(labels)


def test_kinds_instead_of_defects():
    defects = ["good", "a/hole", "good", "a/crack", "b/hole", "a/hole"]
    kinds = [f"{c}: {'good' if d == 'good' else 'defective'}" for c, d in zip("aababa", defects)]
    captions = pick_images([0.1, 0.9, 0.2, 0.8, 0.7, 0.6], [0, 1, 0, 1, 1, 1], defects, 0.5, each=0, kinds=kinds)
    assert [(c.index, c.lines[0], c.lines[-1]) for c in captions] == [
        (1, "a/hole", "highest of its kind"),
        (3, "a/crack", "median of its kind"),
        (4, "b/hole", "highest of its kind"),
        (0, "good", "median of its kind"),
        (2, "good", "median of its kind"),
    ]
    assert sorted(["good", "z", "a: defective", "a: good", "b: good"], key=good_first) == [
        "good",
        "z",
        "a: good",
        "a: defective",
        "b: good",
    ]
