"""Which labels are drawn, and what is measured with them."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.few_label import draw, few_label
from evaluation.linear_probe import standardized
from tests.evaluation.test_linear_probe import clusters

LABELS = torch.tensor([2, 0, 0, 2, 0, 3, 2, 2, 0, 0])  # no class 1, class 3 has one image


@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_a_draw_has_as_many_of_each_class_and_all_of_a_small_one(count):
    chosen = [draw(LABELS, count, seed) for seed in range(40)]
    for one in chosen:
        assert one.tolist() == sorted(set(one.tolist()))
        counts = LABELS[one].bincount(minlength=4).tolist()
        assert counts == [min(count, 5), 0, min(count, 4), 1]
    assert len({tuple(one.tolist()) for one in chosen}) > (20 if count == 2 else 0)
    assert {int(i) for one in chosen for i in one} == {*range(10)}  # each image has its chance
    assert all(set(draw(LABELS, count, seed).tolist()) >= set(draw(LABELS, 1, seed).tolist()) for seed in range(9))


def test_each_number_is_what_the_classifiers_give_on_the_draws():
    train, labels = clusters(90, noise=2.0)
    test, truth = clusters(60, noise=2.0, seed=1)
    one, five = few_label((train, labels), (test, truth), n_classes=3, per_class=(1, 5), draws=3, seed=7)
    assert (one["n_labeled"], five["n_labeled"]) == (3, 15) and five["logistic_top1"] > 1 / 3
    for number, top1 in enumerate(one["knn_top1_draws"]):  # of one image per class, the most similar one's
        chosen = draw(labels, 1, 7 + number)
        cosine = torch.cosine_similarity(test[:, None].double(), train[chosen][None].double(), dim=2)
        assert top1 == (labels[chosen][cosine.argmax(1)] == truth).double().mean()
    for number, top1 in enumerate(one["logistic_top1_draws"]):
        chosen = draw(labels, 1, 7 + number)
        inputs, queries = standardized(train[chosen].double(), test.double())
        oracle = LogisticRegression(C=1 / (3 * 10**-2.5), tol=1e-10, max_iter=10000).fit(inputs, labels[chosen])
        assert top1 == (oracle.predict(queries) == truth.numpy()).mean()
    for row in (one, five):
        for name in ("knn", "logistic"):
            values = torch.tensor(row[f"{name}_top1_draws"]).double()
            assert row[f"{name}_top1"] == pytest.approx(float(values.mean()))
            assert row[f"{name}_top1_std"] == pytest.approx(float(values.std()))


def test_one_draw_has_no_deviation():
    train, labels = clusters(12)
    (row,) = few_label((train, labels), (train, labels), n_classes=3, per_class=(2,), draws=1)
    assert row["knn_top1_std"] is None and len(row["knn_top1_draws"]) == 1
