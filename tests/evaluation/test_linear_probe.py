"""The linear probe against one torch.optim.SGD loop a learning rate in float64, and its choice of learning rate."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from data.splits import stratified_split
from evaluation.linear_probe import LEARNING_RATES, linear_probe, train_and_apply
from runtime.errors import UserError


def clusters(n, dim=12, n_classes=3, noise=0.1, seed=0):
    """Features (n, dim) in n_classes clusters, badly scaled and far from 0, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % n_classes
    features = centers[labels] + noise * torch.randn(n, dim, generator=generator)
    return features * torch.logspace(-3, 3, dim) + 100, labels


def naive(train, labels, test, *, n_classes, epochs, batch_size, seed, lr):
    """One classifier, torch's own SGD, cross-entropy and autograd."""
    mean, scale = train.mean(0), train.std(0, correction=0)
    train, test = (train - mean) / scale, (test - mean) / scale
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(train.shape[1], n_classes, dtype=train.dtype)
    with torch.no_grad():
        linear.weight.copy_((0.01 * torch.randn(train.shape[1], n_classes, generator=generator, dtype=train.dtype)).T)
        linear.bias.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    n_batches = math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (epochs * n_batches)))
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).tensor_split(n_batches):
            optimizer.zero_grad()
            F.cross_entropy(linear(train[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return linear(test).detach()


def test_every_rate_equals_its_own_naive_loop():
    train, labels = clusters(70, noise=2.0)
    test, _ = clusters(20, noise=2.0, seed=1)
    settings = {"n_classes": 4, "epochs": 7, "batch_size": 16, "seed": 5}  # 4 classes, the last without an image
    rates = (1e-3, 1e-2, 0.3)
    logits = train_and_apply(train.double(), labels, test.double(), learning_rates=rates, **settings)
    assert logits.shape == (3, 20, 4)
    for one, lr in zip(logits, rates):
        expected = naive(train.double(), labels, test.double(), lr=lr, **settings)
        torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-9)


def test_probe_with_one_rate_equals_the_naive_loop():
    train, labels = clusters(50, noise=2.0)
    settings = {"n_classes": 3, "epochs": 5, "batch_size": 64, "seed": 2}
    logits, report = linear_probe(train.double(), labels, train[:9].double(), learning_rates=[0.03], **settings)
    torch.testing.assert_close(logits, naive(train.double(), labels, train[:9].double(), lr=0.03, **settings))
    assert report == {"lr": 0.03, "holdout_top1": None, "holdout_top1_by_lr": None}


def test_separable_toy_is_solved():
    train, labels = clusters(300)
    test, test_labels = clusters(60, seed=1)
    logits, report = linear_probe(train, labels, test, n_classes=3)
    assert logits.shape == (60, 3)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(1), test_labels)
    assert report["holdout_top1"] == 1.0
    assert report["lr"] in LEARNING_RATES


def test_chooses_the_rate_that_learns():
    """Far too small a rate leaves W at its random start, far too large a one diverges on overlapping clusters."""
    train, labels = clusters(300, noise=1.5)
    _, report = linear_probe(train, labels, train[:1], n_classes=3, epochs=5, learning_rates=[1e-9, 3e-2, 1e38])
    assert report["lr"] == 3e-2
    assert report["holdout_top1"] == max(report["holdout_top1_by_lr"].values()) > 0.8
    assert list(report["holdout_top1_by_lr"]) == ["1e-09", "0.03", "1e+38"]
    assert report["holdout_top1_by_lr"]["1e+38"] == 0.0


def test_chosen_rate_is_best_on_the_holdout_and_retrained_on_everything():
    train, labels = clusters(90, noise=2.5)
    settings = {"n_classes": 3, "epochs": 10, "batch_size": 32, "seed": 3}
    rates = [1e-4, 1e-2, 1.0]
    logits, report = linear_probe(train.double(), labels, train.double(), learning_rates=rates, **settings)
    fit, held = stratified_split(labels, 0.2, 3)
    double = train.double()
    by_hand = {}
    for lr in rates:
        held_logits = naive(double[fit], labels[fit], double[held], lr=lr, **settings)
        top1 = float((held_logits.argmax(1) == labels[held]).double().mean())
        by_hand[lr] = (-top1, float(F.cross_entropy(held_logits, labels[held])))
    assert report["lr"] == min(rates, key=by_hand.get)
    assert report["holdout_top1"] == pytest.approx(-by_hand[report["lr"]][0])
    torch.testing.assert_close(logits, naive(double, labels, double, lr=report["lr"], **settings))


def test_test_labels_are_no_argument():
    assert "test_labels" not in inspect.signature(linear_probe).parameters
    train, labels = clusters(60, noise=2.0)
    few, report_few = linear_probe(train, labels, train[:2], n_classes=3, epochs=3)
    many, report_many = linear_probe(train, labels, train, n_classes=3, epochs=3)
    assert report_few == report_many
    torch.testing.assert_close(few, many[:2])


def test_same_seed_same_logits_and_no_global_random_numbers():
    train, labels = clusters(60, noise=2.0)
    before = torch.get_rng_state()
    first, _ = linear_probe(train, labels, train, n_classes=3, epochs=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(first, linear_probe(train, labels, train, n_classes=3, epochs=3, seed=1)[0])
    assert not torch.equal(first, linear_probe(train, labels, train, n_classes=3, epochs=3, seed=2)[0])


def test_scale_and_offset_of_a_feature_do_not_matter():
    train, labels = clusters(60, noise=2.0)
    train = train.double()
    settings = {"n_classes": 3, "epochs": 3}
    plain, _ = linear_probe(train, labels, train, **settings)
    moved, _ = linear_probe(1000 * train - 7, labels, 1000 * train - 7, **settings)
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-8)


def test_constant_features_are_harmless():
    train, labels = clusters(60)
    train[:, :3] = torch.tensor([0.0, 0.1, 1e6])
    logits, _ = linear_probe(train, labels, train, n_classes=3)
    assert torch.equal(logits.argmax(1), labels)


def test_mistakes():
    train, labels = clusters(6)
    with pytest.raises(ValueError, match="nothing to hold out"):
        linear_probe(train[:3], torch.arange(3), train, n_classes=3)
    logits, _ = linear_probe(train[:3], torch.arange(3), train, n_classes=3, learning_rates=[0.1])
    assert logits.shape == (6, 3)
    with pytest.raises(ValueError, match=r"\(6, 12\)"):
        linear_probe(train, labels[:4], train, n_classes=3)


def test_one_class_is_an_error():
    with pytest.raises(UserError, match="there is only one"):
        linear_probe(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64), torch.randn(2, 3), n_classes=1)
