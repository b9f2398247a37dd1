"""Distances from a shrunk Gaussian of the others against scikit-learn's LedoitWolf, refitted without each image."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf, ledoit_wolf

from models.anomaly.gaussian import shrunk_gaussian, shrunk_left_out


def refits(x: np.ndarray) -> np.ndarray:
    """(n, D) -> (n,), inf where the others' covariance is singular, to rounding."""
    out = np.full(len(x), np.inf)
    for i in range(len(x)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one sample
            fitted = LedoitWolf().fit(np.delete(x, i, 0))
        spectrum = np.linalg.eigvalsh(fitted.covariance_)
        if len(x) > 2 and spectrum[0] > 1e-12 * spectrum[-1]:
            away = x[i] - fitted.location_
            out[i] = np.sqrt(away @ np.linalg.solve(fitted.covariance_, away))
    return out


def assert_equal_refits(x: np.ndarray, rtol: float = 1e-8) -> np.ndarray:
    ours, theirs = shrunk_left_out(torch.from_numpy(x)).numpy(), refits(x)
    np.testing.assert_allclose(ours, theirs, rtol=rtol)
    return theirs


@pytest.mark.parametrize("dimensions", [2, 3, 8, 40])
def test_equals_refits_for_2_to_20_images(dimensions):
    for n in range(2, 21):
        x = np.random.default_rng(n).normal(3.0, 1.0, (n, dimensions)) @ np.diag(np.geomspace(1, 30, dimensions))
        expected = assert_equal_refits(x)
        assert np.isfinite(expected).all() == (n > 3)


@pytest.mark.parametrize(("n", "dimensions"), [(60, 12), (60, 60), (61, 60), (200, 3), (100, 1), (5, 1)])
def test_equals_refits_for_many_images_and_few_features(n, dimensions):
    assert np.isfinite(assert_equal_refits(np.random.default_rng(1).standard_t(3, (n, dimensions)))).all()


def test_the_shrinkage_held_would_be_another_distance():
    """Four images: what the first version said, with the shrinkage of all four, is a third too low."""
    x = np.random.default_rng(3).normal(size=(4, 40))
    covariance, shrinkage = ledoit_wolf(x)
    held = []
    for i in range(4):
        rest = np.delete(x, i, 0)
        kept = (1 - shrinkage) * np.cov(rest, rowvar=False, bias=True)
        kept += shrinkage * np.trace(covariance) / 40 * np.eye(40)
        away = x[i] - rest.mean(0)
        held.append(np.sqrt(away @ np.linalg.solve(kept, away)))
    assert max(held) < 0.9 * assert_equal_refits(x).max()


@pytest.mark.parametrize("n", [4, 5, 7, 12, 20])
def test_constant_features_and_features_that_repeat_others(n):
    x = np.random.default_rng(n).normal(size=(n, 9))
    x[:, 3], x[:, 7] = 5.0, 0.0
    x[:, 8] = x[:, 0]
    assert np.isfinite(assert_equal_refits(x)).all()


def test_ties():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 6))
    assert np.isfinite(assert_equal_refits(np.stack([a, a, b, b, c, c]))).all()
    assert np.isfinite(assert_equal_refits(np.stack([a, a, b, c]))).sum() == 4
    assert_equal_refits(rng.integers(0, 2, (15, 5)).astype(float))
    # without b nothing is left that differs; without one a there is one a less
    assert np.isfinite(assert_equal_refits(np.stack([a, a, a, a, b]))).tolist() == [True] * 4 + [False]
    assert np.isinf(assert_equal_refits(np.stack([a] * 5))).all()
    # without c there are two points of equal weight, whose shrinkage is 0
    assert np.isfinite(assert_equal_refits(np.stack([a, a, b, b, c]))).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("far", [30, 1e3, 1e5, 1e7])
@pytest.mark.parametrize(("n", "dimensions"), [(5, 8), (20, 8), (9, 4)])
def test_an_image_that_holds_nearly_all_of_the_scatter(n, dimensions, far):
    """Differences of sums over all images would leave rounding only."""
    x = np.random.default_rng(2).normal(size=(n, dimensions))
    x[3] *= far
    assert np.isfinite(assert_equal_refits(x, rtol=1e-6)).all()
    if far < 1e6:  # two of them: without a third image both sides of the scatter are nearly equal, and rounding tells
        x[4] = x[3] + x[0]
        assert np.isfinite(assert_equal_refits(x, rtol=1e-3 if far > 1e4 else 1e-6)).all()


@pytest.mark.parametrize(("n", "dimensions"), [(4, 6), (30, 6)])
def test_the_gaussian_of_all_is_scikit_learns(n, dimensions):
    x = np.random.default_rng(5).normal(size=(n, dimensions))
    mean, cholesky, failed = shrunk_gaussian(torch.from_numpy(x))
    fitted = LedoitWolf().fit(x)
    assert not failed
    np.testing.assert_allclose(mean, fitted.location_, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(cholesky @ cholesky.T, fitted.covariance_, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Only one sample")
def test_a_singular_covariance_is_found_also_where_rounding_hides_it():
    for seed in range(40):
        x = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 2)))
        for singular in (x, x[:1], x[:1].expand(5, 2)):
            assert shrunk_gaussian(singular)[2]
            assert shrunk_left_out(singular).isinf().all()
