"""Classification metrics against scikit-learn and cases worked by hand."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics

from evaluation.classification import classification_report, confusion_matrix
from plots.confusion import confusion_image


def names(n):
    return [f"class {i}" for i in range(n)]


def random_problem(n=200, n_classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, (n,), generator=generator)
    scores = torch.rand(n, n_classes, generator=generator)
    scores[torch.arange(n), labels] += 0.4
    return scores, labels


@pytest.mark.parametrize("n_classes", [2, 4, 7])
def test_equals_scikit_learn(n_classes):
    scores, labels = random_problem(n_classes=n_classes)
    report = classification_report(scores, labels, names(n_classes))
    predicted = scores.argmax(1)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted)
    rows = list(report["per_class"].values())
    np.testing.assert_allclose([row["precision"] for row in rows], precision)
    np.testing.assert_allclose([row["accuracy"] for row in rows], recall)
    np.testing.assert_allclose([row["f1"] for row in rows], f1)
    assert [row["n_test"] for row in rows] == support.tolist()
    assert report["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    assert report["top1"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert report["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    macro = metrics.precision_recall_fscore_support(labels, predicted, average="macro")[:3]
    assert [report["macro_precision"], report["macro_recall"], report["macro_f1"]] == pytest.approx(macro)
    top5 = pytest.approx(metrics.top_k_accuracy_score(labels, scores, k=5)) if n_classes > 5 else None
    assert report["top5"] == top5


def test_classes_without_test_images_or_predictions():
    """Class 1 has no image, class 3 is never predicted; scikit-learn with labels= the classes present agrees."""
    scores, labels = random_problem(n_classes=5)
    scores, labels = scores[labels != 1], labels[labels != 1]
    scores[:, 3] = -1
    report = classification_report(scores, labels, names(5))
    predicted = scores.argmax(1)
    assert (predicted == 1).any()  # the case is not empty
    macro = metrics.precision_recall_fscore_support(
        labels, predicted, labels=[0, 2, 3, 4], average="macro", zero_division=0
    )[:3]
    assert [report["macro_precision"], report["macro_recall"], report["macro_f1"]] == pytest.approx(macro)
    assert report["macro_recall"] == report["balanced_accuracy"]
    assert report["per_class"]["class 1"] == {"n_test": 0, "accuracy": None, "precision": None, "f1": None}
    assert report["per_class"]["class 3"]["precision"] == report["per_class"]["class 3"]["f1"] == 0.0


def test_by_hand():
    """Truth a a a b b c, predictions a b b b b a."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    scores = torch.eye(3)[torch.tensor([0, 1, 1, 1, 1, 0])]
    report = classification_report(scores, labels, ["a", "b", "c"])
    assert report["confusion"] == [[1, 2, 0], [0, 2, 0], [1, 0, 0]]
    assert report["top1"] == pytest.approx(3 / 6)
    assert report["balanced_accuracy"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert report["macro_precision"] == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)
    assert report["macro_f1"] == pytest.approx((2 / 5 + 4 / 6 + 0) / 3)
    assert report["most_confused"] == [
        {"truth": "a", "predicted": "b", "count": 2, "share": pytest.approx(2 / 3)},
        {"truth": "c", "predicted": "a", "count": 1, "share": 1.0},
    ]


def test_ties_go_to_the_lowest_class_in_every_figure():
    """All scores equal: class 0 is predicted, and classes 0 to 4 are the top five."""
    labels = torch.arange(8)
    report = classification_report(torch.zeros(8, 8), labels, names(8))
    assert report["top1"] == 1 / 8
    assert report["top5"] == 5 / 8
    assert [row[0] for row in report["confusion"]] == [1] * 8


def test_one_image_and_one_class():
    report = classification_report(torch.tensor([[0.2]]), torch.tensor([0]), ["only"])
    assert (report["top1"], report["top5"], report["macro_f1"], report["most_confused"]) == (1.0, None, 1.0, [])
    report = classification_report(torch.tensor([[0.2, 0.7]]), torch.tensor([0]), ["a", "b"])
    assert (report["top1"], report["top5"], report["macro_f1"]) == (0.0, None, 0.0)


def test_a_class_that_is_no_candidate_is_no_hit():
    """Six classes, of which two or one got a vote: the lowest of the others would fill up the five."""
    scores = torch.full((4, 6), -torch.inf)
    scores[0, [4, 1]] = torch.tensor([0.7, 0.3])
    scores[1:, 5] = 1.0
    report = classification_report(scores, torch.tensor([1, 0, 5, 2]), names(6))
    assert (report["top1"], report["top5"]) == (1 / 4, 2 / 4)
    for spoilt in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="not finite"):
            classification_report(scores.index_fill(1, torch.tensor([3]), spoilt), torch.zeros(4).long(), names(6))
    scores[2] = -torch.inf
    with pytest.raises(ValueError, match="no candidate"):
        classification_report(scores, torch.zeros(4).long(), names(6))


def test_at_most_ten_confused_pairs_by_falling_count():
    labels = torch.arange(12).repeat_interleave(torch.arange(1, 13))
    report = classification_report(torch.eye(12)[(labels + 1) % 12], labels, names(12))
    assert [pair["count"] for pair in report["most_confused"]] == list(range(12, 2, -1))


def test_report_is_json():
    scores, labels = random_problem()
    report = classification_report(scores, labels, names(7))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_confusion_matrix_of_nothing():
    empty = torch.empty(0, dtype=torch.int64)
    assert confusion_matrix(empty, empty, 3).tolist() == [[0] * 3] * 3


def test_mistakes():
    scores, labels = random_problem()
    with pytest.raises(ValueError, match=r"scores \(N, 3\)"):
        classification_report(scores, labels, names(3))
    with pytest.raises(ValueError, match="outside"):
        classification_report(scores[:, :3], labels, names(3))
    with pytest.raises(ValueError, match="not finite"):
        classification_report(scores / 0, labels, names(7))
    with pytest.raises(ValueError, match="labels"):
        classification_report(scores[:0], labels[:0], names(7))


@pytest.mark.parametrize("n_classes", [1, 4, 20, 60])
def test_image_colors_the_diagonal_blue_and_mistakes_red(n_classes):
    matrix = 50 * torch.eye(n_classes, dtype=torch.int64)
    matrix[0] = 0  # a class without test images stays white
    if n_classes > 1:
        matrix[1, 0] = 25
    image = confusion_image(matrix, ["Ölfilm", *names(n_classes)][:n_classes])
    assert image.mode == "RGB"
    assert max(image.size) < 1400
    pixels = np.asarray(image).astype(int)  # (H, W, 3)
    saturated = np.abs(pixels[..., 0] - pixels[..., 2]) > 60  # (H, W) neither white nor grey
    red, blue = saturated & (pixels[..., 0] > pixels[..., 2]), saturated & (pixels[..., 0] < pixels[..., 2])
    assert red.any() == (n_classes > 1)
    assert blue.any() == (n_classes > 1)
    if n_classes > 1:
        assert np.argwhere(red)[:, 1].max() <= np.argwhere(blue)[:, 1].min()  # (1, 0) lies left of (1, 1)
