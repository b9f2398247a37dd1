"""The counts that all anomaly metrics are made of, with bins and without, against comparisons of every pair."""

import numpy as np
import pytest

from evaluation.anomaly import metrics as anomaly_metrics

INFINITE = np.array([-np.inf, np.inf, 0.0, 1.0])
SCORES = {  # (number of pixels, generator) -> scores: what bins of equal width must not spoil
    "normal": lambda n, rng: rng.normal(size=n),
    "heavy tails": lambda n, rng: rng.standard_cauchy(n) ** 3,
    "infinities": lambda n, rng: np.where(rng.random(n) < 0.5, rng.normal(size=n), INFINITE[rng.integers(0, 4, n)]),
    "one value": lambda n, _: np.ones(n),
    "ties": lambda n, rng: np.round(rng.normal(size=n) * 3),
    "below float32's normal numbers": lambda n, rng: rng.normal(size=n) * 1e-42,
    "overflow of float32's range": lambda n, rng: rng.uniform(-3e38, 3e38, n),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", SCORES)
def test_bins_change_no_count(monkeypatch, kind, dtype):
    rng = np.random.default_rng(0)
    scores = [SCORES[kind](n, rng).astype(dtype) for n in (900, 1, 1100)]
    labels = [rng.random(len(part)) < 0.1 for part in scores]
    positives, negatives = (
        np.concatenate([s[m == wanted] for s, m in zip(scores, labels)]) for wanted in (True, False)
    )
    positives.sort()
    for one_thread in (0, 10**9):  # with bins and without
        monkeypatch.setattr(anomaly_metrics, "ONE_THREAD", one_thread)
        monkeypatch.setattr(anomaly_metrics, "BINS", 256)
        counts = anomaly_metrics.count_ranks(positives, scores, labels)
        assert (counts.above == (negatives > positives[:, None]).sum(1)).all()
        assert (counts.false == (negatives >= positives[:, None]).sum(1)).all()
        assert (counts.true == (positives >= positives[:, None]).sum(1)).all() and counts.negatives == len(negatives)
