"""Distance of two splits' features: against scipy's sqrtm, closed forms and random splits."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import mannwhitneyu, norm, ttest_ind
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation.dataset import distance
from evaluation.dataset.distance import ALARM, frechet_distance, frechet_test, split_distance, two_sample_test


def features(n: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated features of unequal scales."""
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.geomspace(1, 0.01, width)
    x = np.random.default_rng(seed).normal(size=(n, width)) @ mixing + shift
    return torch.from_numpy(x).float()


def by_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    """As pytorch-fid: the root of the product of two covariances that have full rank."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize(("n", "m", "width"), [(60, 40, 5), (400, 90, 30), (50, 51, 2)])
def test_frechet_is_that_of_sqrtm(n, m, width):
    a, b = features(n, width, 0), features(m, width, 1, shift=0.3)
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(by_sqrtm(a, b), rel=1e-9)


def test_frechet_of_one_dimension_has_a_closed_form():
    a, b = torch.tensor([[0.0], [2.0], [7.0]]), torch.tensor([[1.0], [5.0]])
    expected = (float(a.mean()) - float(b.mean())) ** 2 + (float(a.std()) - float(b.std())) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(7, 9), (7, 40), (20, 20)])
def test_frechet_with_fewer_images_than_dimensions(n, m):
    """Embedded by an orthogonal map into 50 dimensions, of which most are constant, nothing changes."""
    a, b = features(n, 3, 0), features(m, 3, 1, shift=0.2)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(5).normal(size=(50, 50)))[0])
    wide = [torch.cat([x.double(), torch.zeros(len(x), 47, dtype=torch.float64)], 1) @ rotation for x in (a, b)]
    assert frechet_distance(*wide) == pytest.approx(by_sqrtm(a, b), rel=1e-9)


def test_frechet_of_equal_sets_is_zero():
    for n, width in ((100, 10), (10, 100), (1, 4), (2, 4)):
        a = features(n, width, 0)
        scale = float(a.double().var(0, correction=0).sum()) + 1
        assert frechet_distance(a, a.clone()) <= 1e-13 * scale
        assert frechet_distance(a, a.flip(0)) <= 1e-13 * scale


def test_frechet_of_single_images():
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert frechet_distance(a, b) == 25
    pair = torch.tensor([[3.0, 3.0], [3.0, 5.0]])  # mean (3, 4), variances 0 and 2
    assert frechet_distance(a, pair) == pytest.approx(27)
    constant = torch.full((6, 2), 3.0)
    assert frechet_distance(constant, constant.clone()) == 0


def test_frechet_keeps_small_differences_of_far_features():
    """A mean of 1e4 and a deviation of 1: float32 sums would drown a shift of 0.01."""
    x = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    assert frechet_distance(x, x + 0.01) == pytest.approx(4 * 1e-4, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [((0, 3), (2, 3)), ((2, 3), (0, 3)), ((2, 3), (2, 4)), ((3,), (3,))])
def test_frechet_refuses_what_has_no_distance(a, b):
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(torch.zeros(a), torch.zeros(b))


def test_random_splits_have_the_bias_of_their_sizes():
    """Two samples of one distribution are apart, the more so the smaller they are; the random splits are as far."""
    for n, m in ((200, 50), (60, 15)):
        found = frechet_test(features(n, 20, 0), features(m, 20, 1))
        assert found["distance"] > 0.5 * found["random_mean"] > 0
        assert abs(found["distance"] - found["random_mean"]) < 4 * found["random_std"]
        assert found["p"] > ALARM
    small, large = (frechet_test(features(n, 20, 0), features(n, 20, 1))["random_mean"] for n in (25, 250))
    assert small > 5 * large


def test_p_is_students_prediction(monkeypatch):
    """By scipy's t-test of the one value against the ten: the same as a test of two samples of equal variance."""
    values = iter([9.0, 3.0, 4.0, 5.0, 4.5, 3.5, 4.2, 3.9, 4.1, 4.4, 3.7])
    drawn = [3.0, 4.0, 5.0, 4.5, 3.5, 4.2, 3.9, 4.1, 4.4, 3.7]
    monkeypatch.setattr(distance, "frechet_distance", lambda *_: next(values))
    found = frechet_test(torch.zeros(4, 2), torch.zeros(3, 2))
    assert found["distance"] == 9 and found["random_mean"] == pytest.approx(np.mean(drawn))
    assert found["p"] == pytest.approx(ttest_ind([9.0], drawn, alternative="greater").pvalue)


def test_drift_is_found_and_a_random_split_is_not():
    x, shifted = features(300, 16, 0), features(100, 16, 1, shift=0.5)
    for test in (frechet_test, two_sample_test):
        assert test(x[:200], shifted)["p"] < ALARM
        assert test(x[:200], x[200:])["p"] > ALARM
    apart = two_sample_test(x[:200], shifted)
    assert apart["auroc"] > 0.75 and apart["accuracy"] > 0.65


def test_a_change_of_the_spread_alone_moves_the_frechet_distance():
    x = features(400, 8, 0)
    assert frechet_test(x[:200], x[200:].mean(0) + 2 * (x[200:] - x[200:].mean(0)))["p"] < ALARM


def test_p_of_the_classifier_holds_what_it_promises():
    """Under random splits p <= 0.1 comes in at most about a tenth of the cases, with few images and many dimensions."""
    generator, low = np.random.default_rng(0), 0
    for trial in range(12):
        x = torch.from_numpy(generator.normal(size=(80, 60)))
        low += two_sample_test(x[:50], x[50:], seed=trial)["p"] <= 0.1
    assert low <= 4  # binomial(12, 0.1) is above with probability 0.004


def test_p_of_two_folds_is_that_of_their_mean_rank_statistic(monkeypatch):
    """Without ties scipy's asymptotic Mann-Whitney test of each fold, without its correction, says the same."""
    monkeypatch.setattr(distance, "FOLDS", 2)
    x, y = features(70, 5, 0).double().numpy(), np.repeat([0, 1], [45, 25])
    x[y == 1] += 0.1
    z, aurocs = [], []
    for learned, held_out in StratifiedKFold(2, shuffle=True, random_state=3).split(x, y):
        network = make_pipeline(StandardScaler(), LogisticRegression(C=distance.STRENGTH, class_weight="balanced"))
        scores = network.fit(x[learned], y[learned]).decision_function(x[held_out])
        a, b = scores[y[held_out] == 1], scores[y[held_out] == 0]
        found = mannwhitneyu(a, b, alternative="greater", method="asymptotic", use_continuity=False)
        z.append(norm.isf(found.pvalue))
        aurocs.append(np.mean(a[:, None] > b))
    found = two_sample_test(torch.from_numpy(x[:45]), torch.from_numpy(x[45:]), seed=3)
    assert found["p"] == pytest.approx(norm.sf(np.mean(z))) and found["auroc"] == pytest.approx(np.mean(aurocs))


def test_separable_and_tiny_sets():
    far = two_sample_test(features(30, 4, 0), features(30, 4, 1, shift=50.0))
    assert far["auroc"] == far["accuracy"] == 1.0 and far["p"] < 0.01
    assert two_sample_test(features(30, 4, 0), features(1, 4, 1)) == {"auroc": None, "accuracy": None, "p": None}
    assert 0 <= two_sample_test(features(30, 4, 0), features(2, 4, 1))["p"] <= 1
    constant = two_sample_test(torch.ones(9, 3), torch.ones(9, 3))
    assert constant["auroc"] == constant["p"] == 0.5


def test_split_distance_counts_copies_once_and_names_shared_images():
    train, test = features(60, 6, 0), features(30, 6, 1)
    copies = torch.cat([train, train[:20], train[:20]])
    leaking = torch.cat([test, train[:7], train[:1]])
    found = split_distance(copies, leaking)
    assert (found["train"], found["test"], found["shared"]) == (60, 37, 7)
    assert found["frechet"]["distance"] == frechet_distance(train, leaking[:37])
    assert found == split_distance(copies, leaking)  # seeded


def test_copies_within_a_split_do_not_pretend_a_drift():
    x = torch.randn(80, 40, generator=torch.Generator().manual_seed(0))
    found = split_distance(x[:40].repeat(5, 1), x[40:].repeat(5, 1))
    assert found["classifier"]["p"] > ALARM
    assert two_sample_test(x[:40].repeat(5, 1), x[40:].repeat(5, 1))["p"] < ALARM  # what it guards against


def test_one_image_on_each_side():
    found = split_distance(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]]))
    assert found["frechet"] == {"distance": 4.0, "random_mean": 4.0, "random_std": 0.0, "p": None}
    assert found["classifier"]["p"] is None


def test_large_splits_are_sampled(monkeypatch):
    monkeypatch.setattr(distance, "AT_MOST", 50)
    found = split_distance(features(120, 4, 0), features(50, 4, 1))
    assert (found["train"], found["test"]) == (50, 50)
    assert found != split_distance(features(120, 4, 0), features(50, 4, 1), seed=1)
