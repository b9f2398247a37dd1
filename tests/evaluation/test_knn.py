"""Weighted kNN against a plain float64 loop, with ties, copies of images and one-element sets."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from data.datasets.folder import ClassFolder
from data.loading import Loader
from evaluation import frozen, knn
from evaluation.classification import classification_report
from evaluation.features import extract
from evaluation.knn import KNN_SETTINGS, few_neighbors, knn_accuracy, knn_scores
from models.backbones import BACKBONES
from models.weights.load import load_weights
from runtime.errors import UserError


def loop_scores(train, labels, test, k, temperature, n_classes):
    """DINO's vote one test image at a time; of equally similar training images the lower index is nearer."""
    scores = torch.zeros(len(test), n_classes, dtype=torch.float64)
    train, test = train.double(), test.double()
    for i, query in enumerate(test):
        similarity = []
        for row in train:
            cosine = float(query @ row) / (float(query.norm()) * float(row.norm()))
            similarity.append(float(torch.tensor(cosine).float()))  # copies tie in float32
        nearest = sorted(range(len(train)), key=lambda j: (-similarity[j], j))[:k]
        for j in nearest:
            scores[i, labels[j]] += math.exp(similarity[j] / temperature)
    return scores / scores.sum(1, keepdim=True)


def random_problem(n_train=60, n_test=23, dim=7, n_classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(n_train, dim, generator=generator)
    labels = torch.randint(0, n_classes, (n_train,), generator=generator)
    return train, labels, torch.randn(n_test, dim, generator=generator)


@pytest.mark.parametrize("k", [1, 5, 59, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_loop(k, temperature):
    train, labels, test = random_problem()
    scores = knn_scores(train, labels, test, k=k, temperature=temperature, n_classes=4)
    assert scores.dtype == torch.float32
    expected = loop_scores(train, labels, test, k, temperature, 4)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=1e-7)
    assert torch.equal(scores.argmax(1), expected.argmax(1))


def test_equals_dinos_own_arithmetic():
    """topk, exp and one-hot sum as in eval_knn.py, in float32: the same classes in the same order."""
    train, labels, test = random_problem(300, 50, 16, 5)
    for setting in KNN_SETTINGS:
        similarity = torch.nn.functional.normalize(test, dim=1) @ torch.nn.functional.normalize(train, dim=1).T
        distances, indices = similarity.topk(setting["k"], dim=1)
        one_hot = torch.nn.functional.one_hot(labels[indices], 5).float()  # (M, k, C)
        votes = (one_hot * (distances / setting["temperature"]).exp()[:, :, None]).sum(1)  # (M, C)
        scores = knn_scores(train, labels, test, **setting, n_classes=5)
        torch.testing.assert_close(scores, votes / votes.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
        assert torch.equal(scores.sort(1, descending=True)[1], votes.sort(1, descending=True)[1])


def test_infinite_temperature_is_scikit_learns_uniform_vote():
    train, labels, test = random_problem(200, 40)
    plain = KNeighborsClassifier(n_neighbors=9, metric="cosine", algorithm="brute").fit(train, labels)
    scores = knn_scores(train, labels, test, k=9, temperature=1e9, n_classes=4)
    torch.testing.assert_close(scores, torch.from_numpy(plain.predict_proba(test)).float())
    assert (scores.argmax(1).numpy() == plain.predict(test)).all()


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_ties_go_to_the_lower_training_index(k):
    """Copies of images that tie at the k-th place: which of them votes decides the class."""
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randn(5, 6, generator=generator)
    train = distinct[torch.randint(0, 5, (40,), generator=generator)] * (0.5 + torch.rand(40, 1, generator=generator))
    labels = torch.randint(0, 3, (40,), generator=generator)
    test = torch.randn(17, 6, generator=generator)
    scores = knn_scores(train, labels, test, k=k, temperature=0.07, n_classes=3)
    expected = loop_scores(train, labels, test, k, 0.07, 3)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=1e-7)


def test_all_images_alike():
    train, labels = torch.ones(30, 4), torch.arange(30) % 3
    scores = knn_scores(train, labels, torch.ones(2, 4), k=4, temperature=0.07, n_classes=3)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.25, 0.25]] * 2))  # neighbors 0, 1, 2, 3


def test_equal_votes_go_to_the_lowest_class():
    train, labels = torch.eye(4), torch.tensor([3, 1, 2, 0])
    test = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    scores = knn_scores(train, labels, test, k=4, temperature=0.07, n_classes=4)
    assert scores.argmax(1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("at_once", [1, 60, 200, 10**6])
def test_chunk_size_changes_nothing(monkeypatch, at_once):
    train, labels, test = random_problem(60, 37)
    whole = knn_scores(train, labels, test, k=10, temperature=0.07, n_classes=4)
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", at_once)
    assert torch.equal(knn_scores(train, labels, test, k=10, temperature=0.07, n_classes=4), whole)


def test_one_image_one_class_and_no_test_image():
    one = torch.tensor([[0.3, -2.0]])
    assert knn_scores(one, torch.tensor([0]), one, k=1, temperature=0.07, n_classes=2).tolist() == [[1.0, 0.0]]
    with pytest.raises(UserError, match="there is only one"):
        knn_scores(one, torch.tensor([0]), one, k=1, temperature=0.07, n_classes=1)
    none = knn_scores(one, torch.tensor([0]), torch.empty(0, 2), k=1, temperature=0.07, n_classes=3)
    assert none.shape == (0, 3)


def test_more_neighbors_than_images_uses_all_and_says_so():
    train, labels, test = random_problem(15, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = knn_scores(train, labels, test, k=200, temperature=0.1, n_classes=4)
    assert few_neighbors(15) == "kNN with k=20 and k=200: there are only 15 training images, and all of them vote"
    assert few_neighbors(60, 20).startswith("kNN with k=200: ")
    assert (
        few_neighbors(200, 201).startswith("kNN with k=201: ") and few_neighbors(200) is few_neighbors(200, 7) is None
    )
    assert torch.equal(scores, knn_scores(train, labels, test, k=15, temperature=0.1, n_classes=4))


def test_small_temperature_does_not_overflow():
    train, labels, test = random_problem()
    scores = knn_scores(train, labels, test, k=5, temperature=1e-4, n_classes=4)
    assert torch.equal(scores.argmax(1), knn_scores(train, labels, test, k=1, temperature=1, n_classes=4).argmax(1))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_top5_of_noise_counts_the_classes_that_were_voted_for(k):
    """Ten classes of noise: with k=1 top-5 is top-1, where official DINO's counts the lowest classes without a vote."""
    torch.manual_seed(0)
    train, test = torch.randn(200, 8), torch.randn(300, 8)
    labels, truth = torch.arange(200) % 10, torch.arange(300) % 10
    scores, metrics = frozen.knn((train, labels), (test, truth), list("abcdefghij"), None, k=k)
    report = classification_report(scores, truth, list("abcdefghij"))
    hits = 0
    unit_train, unit_test = F.normalize(train.double()), F.normalize(test.double())
    for query, own in zip(unit_test, truth.tolist()):
        nearest = sorted(range(200), key=lambda i: -float(query @ unit_train[i]))[:k]
        votes = {}
        for i in nearest:
            votes[int(labels[i])] = votes.get(int(labels[i]), 0) + math.exp(float(query @ unit_train[i]) / 0.07)
        hits += own in sorted(votes, key=votes.get, reverse=True)[:5]
    assert report["top5"] == pytest.approx(hits / 300)
    assert (report["top5"] == report["top1"]) == (k == 1)
    assert metrics.keys() == {"knn20_top1", "knn200_top1"}


def test_accuracy():
    train, labels, _ = random_problem()
    setting = {"k": 1, "temperature": 0.07, "n_classes": 4}
    assert knn_accuracy(train, labels, train, test_labels=labels, **setting) == 1.0
    wrong = labels.clone()
    wrong[:15] = (wrong[:15] + 1) % 4
    assert knn_accuracy(train, labels, train, test_labels=wrong, **setting) == 0.75


def test_mistakes_name_the_shape():
    train, labels, test = random_problem()
    setting = {"k": 3, "temperature": 0.07}
    with pytest.raises(ValueError, match=r"\(60, 7\)"):
        knn_scores(train, labels, test[:, :5], **setting, n_classes=4)
    with pytest.raises(ValueError, match="n_classes=2"):
        knn_scores(train, labels, test, **setting, n_classes=2)
    with pytest.raises(ValueError, match="not finite"):
        knn_scores(train, labels, test.fill_(math.nan), **setting, n_classes=4)
    with pytest.raises(ValueError, match=r"\(0, 7\)"):
        knn_scores(train[:0], labels[:0], test, **setting, n_classes=4)


def test_imagenet_features_tell_steel_defects_apart(real_data, real_weights):
    """30 training and 15 test images per class at 64 pixels: 0.92; a random MobileNetV2 has 0.47, chance is 0.17."""
    backbone = BACKBONES["mobilenet_v2"]()
    load_weights(backbone, real_weights / "mobilenet_v2_imagenet.pth")
    sets = {}
    for split, n in (("train", 30), ("test", 15)):
        images = ClassFolder(split, 64, root=str(real_data / "neu_steel"))
        few = torch.cat([(images.labels == label).nonzero()[:n, 0] for label in range(6)])
        sets[split] = extract(backbone, Loader(images, 64, "cpu", indices=few))
    (train, labels), (test, test_labels) = sets["train"], sets["test"]
    assert knn_accuracy(train, labels, test, test_labels=test_labels, k=20, temperature=0.07, n_classes=6) > 0.85
