"""The winner of a row of a sweep's table: by hand, and by scipy's paired test."""

import numpy as np
import pytest
from scipy import stats

from evaluation.anomaly.compare import compare, load_scores, save_scores
from evaluation.anomaly.metrics import image_metrics
from evaluation.sweep_winners import by_images, by_seeds, larger, replicates, winner

LABELS = np.arange(60) % 2 == 1


def run(folder, separation, seed=0, names=60):
    """A run folder with scores of 60 images, and its results."""
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=names) + separation * LABELS[:names], LABELS[:names]
    metrics = image_metrics(scores, labels) | dict.fromkeys(
        ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "aupro_005", "aupro_001")
    )
    folder.mkdir(parents=True)
    save_scores(folder / "test_scores.pt", [f"{i}.png" for i in range(names)], labels, scores, metrics, None)
    return metrics


def row_of(*values, metric="image_auroc"):
    """A row of pretrainings a, b, ... from lists of a value per seed."""
    return {name: [{metric: value} for value in its] for name, its in zip("abcd", values)}


def test_seeds_are_compared_in_pairs():
    """Both spread widely over the seeds, but a is always a little better: not paired, it would be chance."""
    a, b = np.array([0.60, 0.75, 0.90, 0.70]), np.array([0.58, 0.735, 0.882, 0.679])
    assert stats.ttest_ind(a, b).pvalue > 0.5
    assert by_seeds(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue) and by_seeds(a - b) < 0.01
    assert winner("image_auroc", row_of(a, b), {}) == "a" and winner("image_auroc", row_of(b, a), {}) == "b"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (([0.9, 0.8, 0.7], [0.7, 0.8, 0.6]), "the difference is within the seeds"),
        (([0.9], [0.1]), "one seed, no scores of images"),
        (([0.9, 0.9], [0.1, 0.1]), "seeds change nothing"),
        (([0.5, 0.6], [0.5, 0.6]), "equal"),
        (([0.9, 0.8],), "alone"),
        (([0.90, 0.80, 0.70], [0.85, 0.752, 0.651], [0.89, 0.81, 0.70]), "better than b only"),
        (([0.9, None, 0.8], [0.1, 0.2, 0.15]), "a lacks a value"),
        ((), "nothing"),
    ],
)  # fmt: skip
def test_no_winner(values, why):
    assert winner("image_auroc", row_of(*values), {}) is None, why


def test_only_metrics_of_which_more_is_better_have_a_winner():
    better, worse = [0.9, 0.91, 0.92, 0.90], [0.1, 0.12, 0.11, 0.11]
    for metric in ("pixel_auroc", "knn20_top1", "balanced_accuracy", "image_auroc_category_mean", "aupro_005"):
        assert winner(metric, row_of(worse, better, metric=metric), {}) == "b", metric
    for metric in ("seconds_fit", "loss", "observed_false_alarms", "images_per_second", "test_ece"):
        assert winner(metric, row_of(worse, better, metric=metric), {}) is None, metric


def test_each_further_column_makes_it_harder():
    """p = 0.03 suffices against one other, and not against three of the kind (Holm)."""
    best, other = np.array([0.8, 0.9, 0.85]), np.array([0.777, 0.862, 0.813])
    assert 0.02 < by_seeds(best - other) < 0.05
    assert winner("image_auroc", row_of(best, other), {}) == "a"
    assert winner("image_auroc", row_of(best, other, other, other), {}) is None


def test_test_images_are_compared_in_pairs(tmp_path):
    results = {name: run(tmp_path / name, separation, 3) for name, separation in (("a", 1.0), ("b", 1.4), ("c", 5.0))}
    folders = {name: [tmp_path / name] for name in results}
    drawn = replicates(folders, ["image_auroc", "seconds_fit"])
    assert drawn.keys() == {"image_auroc"} and all(len(its) == 1000 for its in drawn["image_auroc"].values())
    whole = compare([load_scores(tmp_path / name / "test_scores.pt") for name in "ca"], ["c", "a"])
    expected = next(row for row in whole["differences"] if row["metric"] == "image_auroc")
    assert by_images(drawn["image_auroc"], "c", "a") == expected["p"]
    row = {name: [its] for name, its in results.items()}
    assert winner("image_auroc", row, drawn["image_auroc"]) == "c"
    assert winner("image_auroc", {name: row[name] for name in "ab"}, drawn["image_auroc"]) in (None, "b")
    # the seeds say yes, the images no: the larger p counts
    seeds = {"a": [{"image_auroc": v} for v in (0.6, 0.7)], "b": [{"image_auroc": v} for v in (0.61, 0.7101)]}
    assert winner("image_auroc", seeds, {}) == "b"
    same = {"a": drawn["image_auroc"]["a"], "b": drawn["image_auroc"]["a"]}
    assert winner("image_auroc", seeds, same) is None


def test_replicates_are_means_over_the_seeds_on_the_same_draws(tmp_path):
    for name in ("a/0", "a/1", "b/0"):
        run(tmp_path / name, 1.0, seed=len(name) + ord(name[-1]))
    both = replicates({"a": [tmp_path / "a/0", tmp_path / "a/1"]}, ["image_ap"])["image_ap"]["a"]
    each = [replicates({"a": [tmp_path / f"a/{i}"]}, ["image_ap"])["image_ap"]["a"] for i in (0, 1)]
    assert np.allclose(both, np.mean(each, 0)) and not np.allclose(*each)
    run(tmp_path / "fewer", 1.0, names=58)
    assert replicates({"a": [tmp_path / "a/0"], "b": [tmp_path / "fewer"]}, ["image_ap"]) == {}  # other images
    assert replicates({"a": [tmp_path / "a/0"], "b": [tmp_path / "nowhere"]}, ["image_ap"]) == {}
    assert replicates({}, ["image_ap"]) == {"image_ap": {}}


def test_the_larger_p_counts():
    assert [larger(None, None), larger(0.2, None), larger(0.01, 0.2)] == [None, 0.2, 0.2]
