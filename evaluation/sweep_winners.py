"""Which pretraining is the best of a row of a sweep's table by more than chance.

Chance has two parts. Another seed would have trained another network: the metrics of two pretrainings are compared by a
t-test, paired over the seeds. And other test images would have been easier or harder: their metrics, the mean over the
seeds, are compared by a bootstrap, paired over the test images (evaluation/anomaly/compare.py). Both apply where there
are several seeds and scores of the images, and then the larger p counts. The best is a winner if it differs from every
other one of its row with p < 0.05 after Holm's correction for the number of others.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats

from evaluation.anomaly.bootstrap import draw_images
from evaluation.anomaly.compare import Scores, judge, load_scores, replicate, same_images
from evaluation.anomaly.metrics import IMAGE_METRICS, PIXEL_METRICS
from evaluation.compare_classification import SIGNIFICANT, holm
from runtime.errors import UserError

# Metrics of which more is better, by their last words; of others, as losses and times, none wins.
MORE_IS_BETTER = (*IMAGE_METRICS, *PIXEL_METRICS, "auroc", "top1", "top5", "accuracy", "f1", "category_mean")
Row = Mapping[str, list[dict]]  # {pretraining: results.json of each seed}


def winner(metric: str, row: Row, drawn: Mapping[str, np.ndarray]) -> str | None:
    """The pretraining with the best mean, None if it is not better than all others by more than chance.

    Args:
        row: of those that have results; seeds in the same order.
        drawn: {pretraining: replicates (R,) of the metric, the mean over the seeds} on the same draws of test images.
    """
    values = {name: [results.get(metric) for results in seeds] for name, seeds in row.items()}
    known = {name: np.array(its, float) for name, its in values.items() if None not in its}
    if len(known) < 2 or not metric.endswith(MORE_IS_BETTER):
        return None
    best = max(known, key=lambda name: known[name].mean())
    p = [larger(by_seeds(known[best] - known[name]), by_images(drawn, best, name)) for name in known if name != best]
    judged = [value for value in p if value is not None]
    return best if len(judged) == len(p) and max(holm(judged)) < SIGNIFICANT else None


def larger(*p: float | None) -> float | None:
    """None where no test applies."""
    return max((value for value in p if value is not None), default=None)


def by_seeds(differences: np.ndarray) -> float | None:
    """p of a paired t-test of differences (S,), one per seed; None for one seed, or where seeds change nothing."""
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


def by_images(drawn: Mapping[str, np.ndarray], a: str, b: str) -> float | None:
    """p of a paired bootstrap of the mean over the seeds."""
    return judge(drawn[a] - drawn[b])[1] if a in drawn and b in drawn else None


def replicates(folders: Mapping[str, list[Path]], metrics: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """{metric: {pretraining: (R,)}}, means over the seeds, of runs that were tested on the same images.

    `folders`: {pretraining: a run folder per seed}. Empty where a run has no scores of single images, or of others.
    """
    wanted, first, draws = [m for m in metrics if m in IMAGE_METRICS + PIXEL_METRICS], None, None
    found: dict[str, dict[str, np.ndarray]] = {metric: {} for metric in wanted}
    for name, folder in ((name, folder) for name, its in folders.items() for folder in its if wanted):
        try:
            run = load_scores(folder / "test_scores.pt")
            if first is None:
                first, draws = run, draw_images(run.labels, 0)
            same_images(first, run, "", "")
        except UserError:
            return {}
        if not {*wanted} & {*PIXEL_METRICS}:
            run = Scores(run.paths, run.labels, run.scores, run.metrics, None)
        measured = replicate(run, draws)
        for metric in measured.keys() & found.keys():
            found[metric][name] = found[metric].get(name, 0) + measured[metric] / len(folders[name])
    return found
