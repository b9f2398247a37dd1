"""Logistic regression against scikit-learn's, and its choice of penalty."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.linear_probe import standardized
from evaluation.logistic import PENALTIES, fitted, logistic_probe, solve
from runtime.errors import UserError
from tests.evaluation.test_linear_probe import clusters


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_equals_scikit_learn(penalty):
    train, labels = clusters(90, noise=2.0)
    test, _ = clusters(30, noise=2.0, seed=1)
    (logits,) = fitted(train, labels, test, 3, [penalty])
    inputs, queries = standardized(train.double(), test.double())
    oracle = LogisticRegression(C=1 / (len(train) * penalty), tol=1e-10, max_iter=10000).fit(inputs, labels)
    expected = torch.from_numpy(oracle.predict_log_proba(queries))
    torch.testing.assert_close(logits.log_softmax(1), expected, rtol=1e-4, atol=1e-5)


def test_each_penalty_is_solved_as_if_alone():
    train, labels = clusters(60, noise=2.0)
    several = fitted(train, labels, train, 3, [1e-3, 1e-1, 10.0])
    for penalty, logits in zip([1e-3, 1e-1, 10.0], several):
        torch.testing.assert_close(logits, fitted(train, labels, train, 3, [penalty])[0], rtol=1e-4, atol=1e-4)


def test_the_penalty_is_chosen_on_the_training_set():
    train, labels = clusters(200, dim=40, noise=3.0)
    test, truth = clusters(200, dim=40, noise=3.0, seed=1)
    logits, report = logistic_probe(train, labels, test, n_classes=3)
    assert report["holdout_top1"] == max(report["holdout_top1_by_l2"].values()) and report["l2"] in PENALTIES
    accuracy = (logits.argmax(1) == truth).double().mean()
    (unpenalized,) = fitted(train, labels, test, 3, [1e-6])
    assert accuracy > (unpenalized.argmax(1) == truth).double().mean() and report["l2"] > 1e-6
    assert torch.equal(logits, fitted(train, labels, test, 3, [report["l2"]])[0])


def test_one_image_per_class_and_a_class_without_any():
    train = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
    logits, report = logistic_probe(train, torch.arange(3), train, n_classes=5)
    assert logits.argmax(1).tolist() == [0, 1, 2] and report["holdout_top1"] is None
    assert report["l2"] == PENALTIES[len(PENALTIES) // 2]
    assert (logits[:, 3:] < logits.amax(1, keepdim=True)).all()


def test_a_constant_feature_and_an_empty_test_set():
    train, labels = clusters(30)
    train[:, 3] = 7.0
    logits, _ = logistic_probe(train, labels, train[:0], n_classes=3, penalties=[0.1])
    assert logits.shape == (0, 3)
    weight = solve(standardized(train.double(), train[:0].double())[0], labels, 0.1, torch.zeros(13, 3).double())
    assert weight[3].abs().max() < 1e-6


def test_mistakes():
    train, labels = clusters(30)
    with pytest.raises(UserError, match="only one"):
        logistic_probe(train, labels * 0, train, n_classes=1)
    with pytest.raises(ValueError, match="expected train_features"):
        logistic_probe(train, labels[:5], train, n_classes=3)
