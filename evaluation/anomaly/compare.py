"""Is one run better than another on the same test images? A paired bootstrap over the images.

The metrics of two runs rise and fall together with the images that are drawn, so their intervals may overlap widely
where the difference is sure. Each replicate of bootstrap.py is therefore taken for all runs alike, and what
is judged is the distribution of the difference (Efron and Tibshirani 1993, chapters 13 and 16).
"""

import itertools
import os
from dataclasses import asdict, dataclass

import numpy as np
import torch

from evaluation.anomaly.bootstrap import (
    Histograms,
    draw_images,
    image_replicates,
    pixel_replicates,
)
from evaluation.anomaly.metrics import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    Array,
    real_numbers,
    to_numpy,
)
from runtime import checkpoint, integrity
from runtime.errors import UserError

TYPES = Histograms(np.int32, np.int32, np.float32)  # of the stored histograms: 12 bytes a bin, 24 KB per image
AGAIN = "remove that run's results.json and give its command again"


@dataclass
class Scores:
    """What a run made of the N test images."""

    paths: list[str]
    labels: np.ndarray  # (N,) bool
    scores: np.ndarray  # (N,)
    metrics: dict[str, float | None]  # `image_metrics` and `pixel_metrics`; those of pixels None without maps or masks
    histograms: Histograms | None  # of pixels, (N, K) each


def save_scores(
    path: str | os.PathLike,
    paths: list[str],
    labels: Array,
    scores: Array,
    metrics: dict[str, float | None],
    histograms: Histograms | None,
) -> None:
    """Write what `compare` needs of a run: rank 0 writes, atomically.

    `paths` N names, best relative to the data set so that runs on two machines agree; `labels` (N,) 0/1, `scores` (N,);
    `metrics` has those of `image_metrics` and `pixel_metrics`, perhaps more; `histograms` from `pixel_histograms`, or
    None without maps, take about 24 KB per image. Raises UserError on NaN and when the file cannot be written.
    """
    labels, scores = to_numpy(labels).astype(bool), real_numbers(to_numpy(scores), "image scores")
    if len(paths) != len(scores):
        raise ValueError(f"{len(paths)} paths for {len(scores)} scores")
    if histograms is not None:
        if len(histograms.negatives) != len(scores):
            raise ValueError(f"histograms of {len(histograms.negatives)} images for {len(scores)} scores")
        histograms = [torch.from_numpy(np.ascontiguousarray(h, dtype)) for h, dtype in zip(histograms, TYPES)]
    checkpoint.save(
        path,
        {},
        paths=[str(name) for name in paths],
        labels=torch.from_numpy(labels),
        scores=torch.from_numpy(scores.copy()),
        metrics={key: metrics[key] for key in IMAGE_METRICS + PIXEL_METRICS},
        histograms=histograms,
    )


def load_scores(path: str | os.PathLike) -> Scores:
    """What `save_scores` wrote. Raises UserError for any other file; no code in it is run."""
    state = checkpoint.read(path, AGAIN)
    keys = ("paths", "labels", "scores", "metrics", "histograms")
    if not isinstance(state, dict) or not set(keys) <= set(state):
        if isinstance(state, dict) and "figures" in state:
            raise UserError(f"{path} is of an earlier version: run train_anomaly.py again with another run_name")
        raise UserError(f"{path} holds no test scores; name a run folder's test_scores.pt, written by train_anomaly.py")
    if wrong := wrong_scores(**{key: state[key] for key in keys}):
        raise UserError(f"{path} was edited: its {wrong} cannot be what was saved; {AGAIN}")
    paths, labels, scores, metrics, histograms = (state[key] for key in keys)
    if histograms is not None:
        histograms = Histograms(*(h.double().numpy() for h in histograms))
    return Scores(paths, labels.numpy(), scores.numpy(), metrics, histograms)


def wrong_scores(*, paths, labels, scores, metrics, histograms) -> str | None:
    """Which of the values that a file has for `Scores` cannot be, None if all can."""
    if not integrity.is_a("texts", paths):
        return "paths"
    n, form_of = len(paths), integrity.form_of
    if form_of(labels) != f"bool[{n}]":
        return "labels"
    if form_of(scores) not in (f"float32[{n}]", f"float64[{n}]") or not integrity.is_finite(scores):
        return "scores"
    if not integrity.is_a("numbers", metrics) or not {*IMAGE_METRICS, *PIXEL_METRICS} <= metrics.keys():
        return "metrics"
    needed = [*(IMAGE_METRICS if metrics["image_auroc"] is not None else ())]
    needed += [] if histograms is None else PIXEL_METRICS
    known = [value for value in metrics.values() if value is not None]
    if any(metrics[key] is None for key in needed) or not np.isfinite(known).all():
        return "metrics"
    if histograms is None:
        return None
    tables = histograms if isinstance(histograms, list | tuple) and len(histograms) == len(TYPES) else [None]
    bins = tables[0].shape[-1] if isinstance(tables[0], torch.Tensor) and tables[0].ndim else 0
    wanted = [f"{np.dtype(kind)}[{n}, {bins}]" for kind in TYPES]
    fits = list(map(form_of, tables)) == wanted and all(map(integrity.is_finite, tables))
    return None if fits else "histograms"


@dataclass
class Difference:
    """A metric of run `b` minus that of run `a`."""

    metric: str
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    interval: list[float]  # 95 %, percentiles
    p: float  # two-sided
    verdict: str  # "win" for b when the interval lies above 0, "loss" below, else "none"


def compare(runs: list[Scores], names: list[str], seed: int = 0) -> dict:
    """Every pair of runs, every metric that both have, ready for JSON.

    `{"names", "n_test_normal", "n_test_anomalous", "replicates", "differences": [Difference as a dict]}`. The values
    are exact; the replicates of pixel metrics come from histograms (bootstrap.py). p is twice the smaller
    share of replicates on either side of 0, each with one replicate added: (1 + count) / (R + 1), so never below
    2 / (R + 1) (Davison and Hinkley 1997, section 4.2). It is not corrected for the number of comparisons, and says
    nothing of what another training seed would change.

    Raises UserError when the runs were not tested on the same images in the same order, naming the first difference.
    """
    if len(runs) < 2 or len(names) != len(runs):
        raise UserError(f"comparing needs two runs or more, each with a name, not {len(runs)} runs and names {names}")
    for run, name in zip(runs[1:], names[1:]):
        same_images(runs[0], run, names[0], name)
    labels = runs[0].labels
    draws = draw_images(labels, seed)
    replicates = [replicate(run, draws) for run in runs]
    differences = []
    for a, b in itertools.combinations(range(len(runs)), 2):
        for key in (key for key in IMAGE_METRICS + PIXEL_METRICS if key in replicates[a] and key in replicates[b]):
            values = runs[a].metrics[key], runs[b].metrics[key]
            judged = judge(replicates[b][key] - replicates[a][key])
            differences.append(asdict(Difference(key, names[a], names[b], *values, values[1] - values[0], *judged)))
    counts = {"n_test_normal": int((~labels).sum()), "n_test_anomalous": int(labels.sum())}
    return {"names": names} | counts | {"replicates": len(draws), "differences": differences}


def replicate(run: Scores, draws: np.ndarray) -> dict[str, np.ndarray]:
    """{metric: (R,)} of the metrics that are defined."""
    metrics = image_replicates(run.scores, run.labels, draws) if run.metrics["image_auroc"] is not None else {}
    return metrics | (pixel_replicates(run.histograms, draws) if run.histograms is not None else {})


def judge(differences: np.ndarray) -> tuple[list[float], float, str]:
    """(95 % interval, p, verdict) from replicates of a difference, (R,), without those that are NaN (no mask drawn)."""
    kept = differences[~np.isnan(differences)].round(12)  # 1e-17 between equal metrics is no difference
    low, high = np.percentile(kept, (2.5, 97.5)).tolist()
    tail = min(np.count_nonzero(kept <= 0), np.count_nonzero(kept >= 0))
    p = min(1.0, 2 * (1 + tail) / (1 + len(kept)))
    return [low, high], p, "win" if low > 0 else "loss" if high < 0 else "none"


def same_images(a: Scores, b: Scores, name_a: str, name_b: str) -> None:
    """UserError with the first difference of the two test sets, if there is one."""
    advice = "compare runs of one data set"
    for i, (path_a, path_b) in enumerate(zip(a.paths, b.paths)):
        if path_a != path_b:
            raise UserError(f"test image {i} is {path_a} in {name_a} and {path_b} in {name_b}; {advice}")
        if a.labels[i] != b.labels[i]:
            kinds = [("normal", "anomalous")[int(run.labels[i])] for run in (a, b)]
            raise UserError(f"{path_a} is {kinds[0]} in {name_a} and {kinds[1]} in {name_b}; {advice}")
    if len(a.paths) != len(b.paths):
        raise UserError(f"{name_a} has {len(a.paths)} test images and {name_b} has {len(b.paths)}; {advice}")


def compare_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of `compare`'s result for `report.markdown_table`."""
    header = ["metric", "a", "b", "of a", "of b", "b - a [95 %]", "p", "b against a"]
    rows = []
    for row in result["differences"]:
        low, high = row["interval"]
        values = [f"{row['value_a']:.3f}", f"{row['value_b']:.3f}"]
        change = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append([row["metric"], row["a"], row["b"], *values, change, f"{row['p']:.3f}", row["verdict"]])
    return header, rows
