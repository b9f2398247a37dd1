import numpy as np
import pytest
import torch

from evaluation.threshold import normal_threshold
from training.errors import UserError


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
    ],
)
def test_rank_by_hand(n, rate, rank):
    scores = torch.arange(1, n + 1)[torch.randperm(n)].double()
    assert normal_threshold(scores, false_alarm_rate=rate) == rank
    assert normal_threshold(scores.numpy(), false_alarm_rate=rate) == rank


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rate", [0.03, 0.1, 0.25])
def test_the_promise_holds(rate, ties):
    """Each of N + 1 pictures left out in turn: at most the promised share is called anomalous, with certainty."""
    scores = np.random.default_rng(0).normal(size=61)
    scores = np.round(scores) if ties else scores
    alarms = [s > normal_threshold(np.delete(scores, i), false_alarm_rate=rate) for i, s in enumerate(scores)]
    assert np.mean(alarms) <= rate
    assert ties or np.mean(alarms) > rate - 1 / 61  # and no smaller than it needs to be


def test_float32_comes_back_unrounded():
    scores = torch.rand(50)
    assert normal_threshold(scores) == scores.max().item()


def test_mistakes():
    with pytest.raises(UserError, match="1 of 3 scores of normal pictures are not a number"):
        normal_threshold(torch.tensor([1.0, float("nan"), 2.0]))
    for rate in (0, 1, -0.1, 2):
        with pytest.raises(UserError, match="between 0 and 1"):
            normal_threshold(torch.ones(3), false_alarm_rate=rate)
    with pytest.raises(ValueError, match=r"\(0,\)"):
        normal_threshold(torch.ones(0))
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        normal_threshold(torch.ones(2, 2))
