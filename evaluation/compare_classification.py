"""Are classifiers of the same test images different by more than chance? A paired bootstrap over these images.

Two classifiers with accuracies of 0.93 and 0.95 on 300 images have intervals that overlap widely and may still differ
significantly, for most images are right in both. So each replicate draws images once, for all classifiers alike, and
what is judged is the difference (Efron and Tibshirani 1993, chapters 13 and 16). Every class is drawn from by itself:
in each replicate it has as many images as in the test set.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evaluation.anomaly.bootstrap import draw_images
from evaluation.anomaly.compare import judge
from evaluation.classification import Average, averaged, ranks

Metric = Literal["accuracy", "precision", "recall", "f1", "top_k"]
METRICS: tuple[Metric, ...] = ("accuracy", "precision", "recall", "f1", "top_k")
REPLICATES = 10_000  # p is at least 2 / (REPLICATES + 1), which Holm multiplies by the number of differences
COUNTS_AT_ONCE = 2**23  # 64 MiB of float64
SIGNIFICANT = 0.05  # p, corrected


def metrics_of(
    scores: Tensor, labels: Tensor, counts: Tensor, *, average: Average = "macro", top_k: int = 5
) -> dict[str, Tensor]:
    """Metrics (R,) of R drawn sets of test images, by the keys of `METRICS`.

    Equal scores are settled for the lowest class. Precision, recall and F1 are those of `averaged`. Without `top_k`
    where there are no more classes than that.

    Args:
        scores: (N, C), larger is likelier; -inf of a class that is no candidate.
        labels: (N,) int64.
        counts: (N, R) float64, how often a set holds an image; each class as often in all sets.
    """
    n_classes, rank = scores.shape[1], ranks(scores, labels)

    def per_class(of: Tensor, which: Tensor) -> Tensor:
        """(R, C), how often the images `which` (N,) of each class are held."""
        return counts.new_zeros(n_classes, counts.shape[1]).index_add_(0, of[which], counts[which]).T

    right, all_of_them = rank < 1, torch.ones_like(labels, dtype=torch.bool)
    hits, of_prediction = per_class(labels, right), per_class(scores.argmax(1), all_of_them)  # (R, C)
    of_truth = per_class(labels, all_of_them)[0]  # (C,)
    found = dict(zip(("precision", "recall", "f1"), averaged(hits, of_truth, of_prediction, average)))
    found = {"accuracy": hits.sum(1) / len(labels)} | found
    if n_classes > top_k:
        found["top_k"] = counts[rank < top_k].sum(0) / len(labels)
    return found


def drawn(labels: Tensor, seed: int) -> Iterator[Tensor]:
    """The replicates in pieces that memory can hold: how often each holds each image, (N, R') float64."""
    generator, most = np.random.default_rng(seed), max(1, COUNTS_AT_ONCE // len(labels))
    for first in range(0, REPLICATES, most):
        draws = draw_images(labels.numpy(), generator, min(most, REPLICATES - first))  # (R', N)
        yield torch.from_numpy(np.ascontiguousarray(draws.T))


def with_replicates(
    classifiers: Sequence[Tensor], labels: Tensor, *, average: Average = "macro", top_k: int = 5, seed: int = 0
) -> list[tuple[dict[str, float], dict[str, np.ndarray]]]:
    """Of each classifier's scores (N, C) its metrics, and their replicates (R,), the same images drawn for all."""
    classifiers, labels = [scores.cpu() for scores in classifiers], labels.cpu()
    options = {"average": average, "top_k": top_k}
    pieces = [
        [metrics_of(scores, labels, counts, **options) for scores in classifiers] for counts in drawn(labels, seed)
    ]
    found = []
    for scores, own in zip(classifiers, zip(*pieces)):
        exact = metrics_of(scores, labels, torch.ones(len(labels), 1, dtype=torch.float64), **options)
        replicates = {key: torch.cat([piece[key] for piece in own]).numpy() for key in exact}
        found.append(({key: float(value) for key, value in exact.items()}, replicates))
    return found


def interval(replicates: np.ndarray) -> list[float]:
    """95 %, between percentiles."""
    return np.percentile(replicates, (2.5, 97.5)).tolist()


def compare_classification(
    measured: dict[str, dict[str, Tensor]],
    labels: Tensor,
    *,
    metrics: Sequence[Metric] = METRICS,
    average: Average = "macro",
    top_k: int = 5,
    seed: int = 0,
) -> list[dict]:
    """A row per measure, metric and classifier, each compared with the first classifier of its measure.

    p is two-sided (`judge`), and `p_holm` corrected for the number of all differences here by Holm (1979): if no
    classifier differed from its first, a verdict other than "none" would stand anywhere in 5 % of such tables at most.
    It says nothing of what another training seed would change.

    Args:
        measured: {measure: {name: scores (N, C)}}; one without classifiers has no rows.
        labels: (N,) int64.

    Returns:
        [{measure, metric, name, value, interval, difference, difference_interval, p, p_holm, verdict}]; difference and
        what follows is None for the first. verdict: "better", "worse" or "none".
    """
    rows = []
    for measure, classifiers in measured.items():
        if not classifiers:
            continue
        found = with_replicates([*classifiers.values()], labels, average=average, top_k=top_k, seed=seed)
        values, replicates = zip(*found)
        for metric in (metric for metric in metrics if metric in values[0]):
            for i, name in enumerate(classifiers):
                row = {"measure": measure, "metric": metric, "name": name, "value": values[i][metric]}
                row |= {"interval": interval(replicates[i][metric]), "difference": None, "difference_interval": None}
                row |= {"p": None, "p_holm": None, "verdict": None}
                if i:
                    ends, p, _ = judge(replicates[i][metric] - replicates[0][metric])
                    difference = values[i][metric] - values[0][metric]
                    row |= {"difference": difference, "difference_interval": ends, "p": p}
                rows.append(row)
    compared = [row for row in rows if row["p"] is not None]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        sign = "better" if row["difference"] > 0 else "worse"
        row |= {"p_holm": p, "verdict": sign if p < SIGNIFICANT else "none"}
    return rows


def holm(p: Sequence[float]) -> list[float]:
    """p of several tests corrected by Holm (1979, Scandinavian Journal of Statistics 6): the i-th smallest of m times
    m + 1 - i, but at least what the smaller ones came to, and at most 1."""
    order, m = np.argsort(p, kind="stable"), len(p)
    corrected = np.empty(m)
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(m, 0, -1)))
    return corrected.tolist()


def comparison_table(rows: list[dict], top_k: int) -> tuple[list[str], list[list[str]]]:
    """(header, rows) for `markdown_table`."""
    header = ["measure", "metric", "backbone", "value [95 %]", "minus the first [95 %]", "p (Holm)", "verdict"]
    cells = []
    for row in rows:
        shown = "{:.3f} [{:.3f}, {:.3f}]".format(row["value"], *row["interval"])
        metric = f"top-{top_k}" if row["metric"] == "top_k" else row["metric"]
        judged = ["the first", "", ""]
        if row["p"] is not None:
            change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["difference_interval"])
            judged = [change, f"{row['p_holm']:.3f}", row["verdict"]]
        cells.append([row["measure"], metric, row["name"], shown, *judged])
    return header, cells
