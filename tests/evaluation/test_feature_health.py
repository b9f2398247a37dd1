"""Features in eval mode against NumPy, and what their warnings say of kNN."""

import math

import numpy as np
import pytest
import torch

from evaluation.collapse import LEAST_FEATURES_STD, TIED_STD, constant_warning, feature_health
from evaluation.knn import knn_accuracy
from tests.evaluation.test_collapse import random_embeddings


def test_features_are_measured_as_embeddings_of_one_view_spread_over_the_set():
    features = random_embeddings(2000, 1, 6)[:, 0]
    chosen = features[np.linspace(0, 1999, 512).round()][:, None]
    for given, rows in ((features, chosen), (features[:24], features[:24, None])):
        health = feature_health(given.float())
        assert set(health) == {"features/std", "features/effective_rank"}
        unit = (rows / rows.norm(dim=2, keepdim=True))[:, 0].numpy()  # (n, 6)
        assert health["features/std"] == pytest.approx(6**0.5 * unit.std(0, ddof=1).mean(), rel=1e-5)
        share = (s := np.linalg.svd(unit, compute_uv=False)) / s.sum()
        assert health["features/effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    # classes one after the other: the first 512 rows alone would be one point
    sorted_ones = torch.eye(4, dtype=torch.float64).repeat_interleave(1000, dim=0)
    assert feature_health(sorted_ones)["features/std"] > 0.5
    assert set(feature_health(features[:1])) == {"features/effective_rank"}


def test_constant_features_are_named_with_what_train_mode_says():
    generator = torch.Generator().manual_seed(0)
    row, noise = torch.rand(64, generator=generator), torch.randn(300, 64, generator=generator)
    constant, healthy = feature_health(row + 1e-5 * noise), feature_health(row + 0.3 * noise)
    assert constant["features/std"] < 1e-3 and healthy["features/std"] > 0.3
    assert constant_warning(healthy, 0.9) is None and constant_warning({}) is None
    assert constant_warning({"features/std": math.nan}) is None and constant_warning({"features/std": 0.01}) is None
    text = constant_warning(constant, 0.9)
    assert "in eval mode images have nearly the same features, and kNN is guessing" in text
    assert "images differ (embedding/std 0.9); running statistics of BatchNorm" in text and "\n" not in text
    assert "embedding/std 0.01 in train mode says the same: a collapse" in constant_warning(constant, 0.01)
    assert "in train mode" not in constant_warning(constant)
    assert "says little about what was learned" in constant_warning({"features/std": 0.002}, 0.4)


def test_below_the_stds_of_the_warnings_neighbors_tie():
    """What the two limits say of kNN: classes that differ are told apart at the first and not at the second."""
    generator = torch.Generator().manual_seed(0)
    row, labels = torch.rand(64, generator=generator), torch.arange(200) % 2
    direction = torch.randn(64, generator=generator)
    accuracy = {}
    for size in (1e-2, 2e-5):
        train = row + size * ((2 * labels[:, None] - 1) * direction + 0.3 * torch.randn(200, 64, generator=generator))
        test = row + size * ((2 * labels[:, None] - 1) * direction + 0.3 * torch.randn(200, 64, generator=generator))
        about = {"test_labels": labels, "k": 20, "temperature": 0.07, "n_classes": 2}
        accuracy[feature_health(train)["features/std"]] = knn_accuracy(train, labels, test, **about)
    (above, right), (below, chance) = accuracy.items()
    assert LEAST_FEATURES_STD < above < 0.05 and right == 1.0
    assert below < TIED_STD and chance < 0.7
