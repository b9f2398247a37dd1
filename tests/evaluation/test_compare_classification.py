"""Metrics of drawn images against scikit-learn's of the same images; p against McNemar's; Holm by its definition."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest
from sklearn import metrics

from evaluation import compare_classification as module
from evaluation.classification import classification_report
from evaluation.compare_classification import (
    compare_classification,
    comparison_table,
    drawn,
    holm,
    metrics_of,
    with_replicates,
)

AVERAGES = ("macro", "micro", "weighted")


def problem(n=90, n_classes=7, seed=0):
    """Scores with many ties, classes that are no candidate, class 2 without images and class 4 never predicted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, n_classes, (n,), generator=generator)
    labels[labels == 2] = 5
    scores = torch.randint(0, 4, (n, n_classes), generator=generator).float()
    scores[torch.arange(n), labels] += torch.randint(0, 3, (n,), generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.4] = -torch.inf
    scores[:, 0], scores[:, 4] = scores[:, 0].clamp(min=0), -torch.inf  # each image has a candidate
    assert (scores.argmax(1) == 2).any() and (labels == 4).any()
    return scores, labels


def found_in(scores, label, k):
    """Whether an image's class is one of the k first candidates, the lower class first of equal scores."""
    order = sorted((c for c in range(len(scores)) if scores[c] > -np.inf), key=lambda c: (-scores[c], c))
    return label in order[:k]


def oracle(scores, labels, average, top_k):
    present = sorted({*labels.tolist()})
    predicted = np.asarray(scores).argmax(1)
    values = metrics.precision_recall_fscore_support(
        labels, predicted, labels=present, average=average, zero_division=0
    )[:3]
    accuracy = metrics.accuracy_score(labels, predicted)
    top = np.mean([found_in(row, label, top_k) for row, label in zip(scores.tolist(), labels.tolist())])
    return [accuracy, *values, top]


@pytest.mark.parametrize("average", AVERAGES)
def test_each_replicate_is_scikit_learns_of_the_images_drawn(average):
    scores, labels = problem()
    counts = next(drawn(labels, 3))[:, :25]  # (N, R)
    assert (counts.sum(0) == len(labels)).all()
    found = metrics_of(scores, labels, counts, average=average, top_k=3)
    for number in range(counts.shape[1]):
        images = torch.repeat_interleave(torch.arange(len(labels)), counts[:, number].long())
        assert len(images) == len(labels) and (labels[images].bincount() == labels.bincount()).all()
        expected = oracle(scores[images], labels[images], average, 3)
        assert [float(found[key][number]) for key in module.METRICS] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_values_are_scikit_learns_and_the_reports(average):
    scores, labels = problem()
    ((values, _),) = with_replicates([scores], labels, average=average)
    assert list(values.values()) == pytest.approx(oracle(scores, labels, average, 5), abs=1e-12)
    report = classification_report(scores, labels, list("abcdefg"))
    assert (values["accuracy"], values["top_k"]) == (report["top1"], report["top5"])
    if average == "macro":
        ours = [values[key] for key in ("precision", "recall", "f1")]
        assert ours == [report[f"macro_{key}"] for key in ("precision", "recall", "f1")]


def test_one_image_and_few_classes():
    ((values, replicates),) = with_replicates([torch.tensor([[0.2, 0.7]])], torch.tensor([1]))
    assert values == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1}  # no top-5 of two classes
    assert all((kept == 1).all() and len(kept) == module.REPLICATES for kept in replicates.values())


def test_memory_is_bounded_and_every_replicate_drawn(monkeypatch):
    _, labels = problem(n=50)
    monkeypatch.setattr(module, "COUNTS_AT_ONCE", 50 * 3000)
    pieces = list(drawn(labels, 0))
    assert [piece.shape[1] for piece in pieces] == [3000, 3000, 3000, 1000]
    assert len({tuple(column.tolist()) for piece in pieces for column in piece.T[:5]}) == 20  # the stream goes on


@pytest.mark.parametrize(("gained", "lost", "verdict"), [(20, 4, "better"), (4, 20, "worse"), (9, 7, "none")])
def test_p_of_accuracy_is_mcnemars(gained, lost, verdict):
    """Of 300 images the second classifier alone has `gained` right, the first alone `lost`, and none of them 90."""
    labels = torch.arange(300) % 3
    right = torch.nn.functional.one_hot(labels, 3).double()
    wrong = torch.nn.functional.one_hot((labels + 1) % 3, 3).double()
    first, second = right.clone(), right.clone()
    first[-90:], second[-90:] = wrong[-90:], wrong[-90:]
    first[:gained], second[gained : gained + lost] = wrong[:gained], wrong[gained : gained + lost]
    rows = compare_classification({"knn": {"a": first, "b": second}}, labels, metrics=["accuracy"])
    assert rows[0] | {"value": (210 - gained) / 300, "p": None, "verdict": None, "difference": None} == rows[0]
    row = rows[1]
    assert row["difference"] == pytest.approx((gained - lost) / 300)
    mid_p = binomtest(gained, gained + lost).pvalue - binom.pmf(gained, gained + lost, 0.5)
    assert row["p"] == pytest.approx(mid_p, rel=0.2, abs=0.001) and row["verdict"] == verdict
    spread = np.sqrt(gained + lost - (gained - lost) ** 2 / 300) / 300  # of a difference of paired shares
    half = (row["difference_interval"][1] - row["difference_interval"][0]) / 2
    assert half == pytest.approx(1.96 * spread, rel=0.08)
    assert row["interval"][0] < row["value"] < row["interval"][1]


def test_a_classifier_does_not_differ_from_itself_and_every_measure_has_its_first():
    scores, labels = problem()
    measured = {"knn": {"a": scores, "b": scores, "c": scores.roll(1, 1)}, "own head": {"b": scores}, "none": {}}
    rows = compare_classification(measured, labels, top_k=5)
    assert [(row["measure"], row["name"]) for row in rows if row["verdict"] is None] == [
        *[("knn", "a")] * 5,
        *[("own head", "b")] * 5,
    ]
    same = [row for row in rows if row["measure"] == "knn" and row["name"] == "b"]
    assert all((row["difference"], row["p"], row["p_holm"], row["verdict"]) == (0, 1, 1, "none") for row in same)
    compared = [row for row in rows if row["p"] is not None]
    assert len(compared) == 10  # whose p are corrected together
    assert [row["p_holm"] for row in compared] == holm([row["p"] for row in compared])
    header, cells = comparison_table(rows, 5)
    assert {len(row) for row in cells} == {len(header)} and cells[0][4] == "the first"
    assert [row[1] for row in cells if row[0] == "own head"] == ["accuracy", "precision", "recall", "f1", "top-5"]


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R's p.adjust
    assert (holm([]), holm([0.7]), holm([0.7, 0.7])) == ([], [0.7], [1, 1])
    p = np.random.default_rng(0).uniform(0, 0.2, 12).round(2)  # some are equal
    by_size = np.sort(p)
    for value, corrected in zip(p, holm(p)):
        rank = int((by_size <= value).sum())  # the last of equal ones, whose first counts more
        assert corrected == pytest.approx(min(1, max((12 - j) * by_size[j] for j in range(rank))))
