"""Errors, AUROC and alarms of corrupted images against scikit-learn and plain counts."""

import contextlib

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from evaluation.inspect.subjects import Both, Detecting, Observed, class_errors
from models.classifier import Classifier


def test_errors_of_classes():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    found = class_errors(Observed(scores, None, torch.tensor([0, 1, 1, 1])))
    assert found["error"] == 0.5  # a tie goes to the first class
    assert found["error_interval"][0] < 0.5 < found["error_interval"][1]


def test_a_detectors_auroc_and_alarms():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 60))
    scores = torch.from_numpy(rng.normal(size=60).round(1)) + labels
    subject = Detecting(None, 0.5, contextlib.nullcontext, 0)
    found = subject.numbers(Observed(scores, None, labels))
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["error"] == pytest.approx(1 - found["image_auroc"])
    low, high = found["error_interval"]
    assert low < found["error"] < high
    good = scores[labels == 0].tolist()
    assert found["false_alarms"] == pytest.approx(sum(s > 0.5 for s in good) / len(good))
    bad = scores[labels == 1].tolist()
    assert found["detections"] == pytest.approx(sum(s > 0.5 for s in bad) / len(bad))
    low, high = found["false_alarms_interval"]
    assert low < found["false_alarms"] < high
    assert torch.equal(subject.decisions(Observed(scores, None, labels)), scores > 0.5)


def test_without_a_threshold_or_a_defect_that_is_not_known():
    subject = Detecting(None, None, contextlib.nullcontext, 0)
    found = subject.numbers(Observed(torch.arange(3.0), None, torch.zeros(3, dtype=torch.int64)))
    assert all(found[key] is None for key in ("error", "error_interval", "image_auroc", "false_alarms", "detections"))
    assert subject.decisions(Observed(torch.arange(3.0), None, torch.zeros(3))) is None


def test_features_and_logits_side_by_side():
    classifier = Classifier(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    x = torch.randn(3, 3, 2, 2)
    rows = Both(classifier)(x)
    assert torch.equal(rows[:, :12], x.flatten(1)) and torch.equal(rows[:, 12:], classifier(x))
