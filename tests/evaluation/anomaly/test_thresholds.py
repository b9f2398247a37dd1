from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import binom

from evaluation.anomaly.thresholds import binomial_interval, normal_threshold, pixel_threshold, suspicious
from runtime.errors import UserError


@pytest.mark.parametrize(
    ("n", "rate", "rank"),
    [
        (199, 0.01, 198),
        (99, 0.01, 99),
        (98, 0.01, 98),  # rank 99 of 98: the largest
        (1, 0.01, 1),
        (19, 0.05, 19),
        (39, 0.05, 38),
        (9, 0.5, 5),
        (99, 0.45, 55),  # in floats 100 x (1 - 0.45) is a little more than 55
    ],
)
def test_rank_by_hand(n, rate, rank):
    scores = torch.arange(1, n + 1)[torch.randperm(n)].double()
    assert normal_threshold(scores, false_alarm_rate=rate) == rank
    assert normal_threshold(scores.numpy(), false_alarm_rate=rate) == rank


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.03, 0.1, 0.25])
def test_the_promise_holds(rate, ties):
    """Each of N + 1 images left out in turn: at most the promised share is called anomalous, with certainty."""
    scores = np.random.default_rng(0).normal(size=61)
    scores = np.round(scores) if ties else scores
    alarms = [s > normal_threshold(np.delete(scores, i), false_alarm_rate=rate) for i, s in enumerate(scores)]
    assert np.mean(alarms) <= rate
    assert ties or np.mean(alarms) > rate - 1 / 61  # and no smaller than it needs to be


def test_float32_comes_back_unrounded():
    scores = torch.rand(50)
    assert normal_threshold(scores) == scores.max().item()


def test_mistakes():
    with pytest.raises(UserError, match="1 of 3 scores of normal images are not a number"):
        normal_threshold(torch.tensor([1.0, float("nan"), 2.0]))
    for rate in (0, 1, -0.1, 2):
        with pytest.raises(UserError, match="between 0 and 1"):
            normal_threshold(torch.ones(3), false_alarm_rate=rate)
    with pytest.raises(ValueError, match=r"\(0,\)"):
        normal_threshold(torch.ones(0))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        normal_threshold(torch.ones(2, 2))
    with pytest.raises(UserError, match="1 of 4 pixels of normal anomaly maps of image 0 are not a number"):
        pixel_threshold([torch.tensor([[1.0, float("nan")], [0, 0]])])
    with pytest.raises(UserError, match="between 0 and 1"):
        pixel_threshold(torch.ones(3, 2, 2), false_alarm_rate=1)
    for maps in ([], torch.zeros(0, 4, 4), [torch.ones(2, 2), torch.ones(0, 3)]):
        with pytest.raises(ValueError, match="one or more images"):
            pixel_threshold(maps)


def every_threshold(maps: list[np.ndarray], rate: str) -> float:
    """The smallest pixel value that keeps theorem 1's condition, in exact arithmetic; the largest if none does."""
    n, values = len(maps), np.unique(np.concatenate([image.ravel() for image in maps]))
    for t in values:
        risk = sum(Fraction(int((image > t).sum()), image.size) for image in maps) / n
        if Fraction(n, n + 1) * risk + Fraction(1, n + 1) <= Fraction(rate):
            return float(t)
    return float(values[-1])


@pytest.mark.parametrize("levels", [None, 10, 2, 0])
@pytest.mark.parametrize("rate", ["0.05", "0.1", "0.3", "0.9"])
@pytest.mark.parametrize("n", [1, 9, 19, 30])
def test_pixel_threshold_equals_every_value_in_turn(n, rate, levels):
    rng = np.random.default_rng(n)
    maps = rng.normal(size=(n, 5, 4)) * rng.uniform(0.5, 2, (n, 1, 1))
    maps = (maps if levels is None else np.round(maps * levels)).astype(np.float32)
    assert pixel_threshold(maps, false_alarm_rate=float(rate)) == every_threshold(list(maps), rate)
    maps = [image[: 1 + i % 5, i % 3 :] for i, image in enumerate(maps)]  # of different sizes
    assert pixel_threshold(maps, false_alarm_rate=float(rate)) == every_threshold(maps, rate)


def test_pixel_threshold_by_hand():
    """Nine images of ten pixels, 0 .. 89: at rate 0.3 the shares above may add up to 2, which is 20 pixels."""
    maps = torch.randperm(90).reshape(9, 2, 5)
    assert pixel_threshold(maps, false_alarm_rate=0.3) == 69
    assert pixel_threshold(maps, false_alarm_rate=0.1) == 89  # exactly enough images, none may be above
    assert pixel_threshold(maps, false_alarm_rate=0.01) == 89  # too few


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_promise_on_pixels_holds(rate):
    """Each of N + 1 images left out in turn: the mean share of its pixels above is at most the promised one."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(41, 6, 6)) * rng.lognormal(size=(41, 1, 1))
    shares = [
        (image > pixel_threshold(np.delete(maps, i, 0), false_alarm_rate=rate)).mean() for i, image in enumerate(maps)
    ]
    assert rate - 1 / 41 < np.mean(shares) <= rate


def test_suspicious_images_lie_beyond_the_outer_fence():
    scores = torch.tensor([3.0, 8.5, 2, 8, 1, 2, 2, 3, 2, 3, 40])  # quartiles 2 and 5.5: fence 16
    assert suspicious(scores, [f"{i}.png" for i in range(11)]) == [{"path": "10.png", "score": 40.0}]
    scores[-1] = 16
    assert suspicious(scores, [f"{i}.png" for i in range(11)]) == []
    scores = torch.tensor([1.0, 9, 1, 7, 1, 1, 1, 1, 1, 9])  # quartiles both 1, but for the three
    found = suspicious(torch.cat([scores, torch.ones(6)]), [f"{i}.png" for i in range(16)])
    assert [row["path"] for row in found] == ["1.png", "9.png", "3.png"]  # equal scores in their order


@pytest.mark.parametrize("scores", [[], [5.0], [1, 1, 9], [1, 1, 1, 1], [2.0] * 50])
def test_nothing_is_suspicious(scores):
    assert suspicious(np.array(scores), ["x.png"] * len(scores)) == []


def test_suspicious_mistakes():
    with pytest.raises(UserError, match="not a number"):
        suspicious([1.0, 2, float("nan"), 3], list("abcd"))
    with pytest.raises(ValueError, match="for 2 paths"):
        suspicious([1.0, 2, 3], list("ab"))


@pytest.mark.parametrize(("alarms", "n"), [(0, 30), (3, 30), (30, 30), (0, 1), (17, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_binomial_interval_ends_where_the_tail_has_half_of_the_rest(alarms, n, level):
    low, high = binomial_interval(alarms, n, level)
    tail = (1 - level) / 2
    assert low == 0 if alarms == 0 else binom.sf(alarms - 1, n, low) == pytest.approx(tail)
    assert high == 1 if alarms == n else binom.cdf(alarms, n, high) == pytest.approx(tail)
    assert binomial_interval(0, 0, level) == (0, 1)
