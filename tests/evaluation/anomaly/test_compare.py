"""Paired differences against a plain loop over the replicates with scikit-learn."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.anomaly import bootstrap
from evaluation.anomaly.bootstrap import draw_images, pixel_histograms
from evaluation.anomaly.compare import compare, compare_table, judge, load_scores, save_scores
from evaluation.anomaly.metrics import IMAGE_METRICS, PIXEL_METRICS, image_metrics, pixel_metrics
from evaluation.tables import markdown_table
from runtime.errors import UserError

PATHS = [f"test/{i:03}.png" for i in range(30)]
LABELS = np.arange(30) % 3 == 0
NOTHING = dict.fromkeys(IMAGE_METRICS + PIXEL_METRICS)


def run_of(folder, name: str, *, gain: float = 1.0, seed: int = 0, paths=PATHS, labels=LABELS, pixels: bool = True):
    """A run's stored scores, `gain` how well it separates; runs of one seed have the same noise."""
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=len(labels)) + gain * labels).astype(np.float32)
    masks = np.zeros((len(labels), 12, 10), dtype=bool)
    masks[labels, 3:6, 2:7] = True
    maps = (rng.normal(size=masks.shape) + gain * masks).astype(np.float32)
    metrics = image_metrics(scores, labels) | (pixel_metrics(maps, masks) if pixels else dict.fromkeys(PIXEL_METRICS))
    histograms = pixel_histograms(maps, masks) if pixels and metrics["aupro"] is not None else None
    save_scores(folder / name, paths, torch.from_numpy(labels), torch.from_numpy(scores), metrics, histograms)
    return load_scores(folder / name), scores, maps, masks


@pytest.mark.parametrize("gain", [1.0, 1.4])
def test_differences_equal_a_loop_over_the_replicates(tmp_path, monkeypatch, gain):
    monkeypatch.setattr(bootstrap, "REPLICATES", 200)
    (a, scores_a, *_), (b, scores_b, *_) = run_of(tmp_path, "a"), run_of(tmp_path, "b", gain=gain, seed=1)
    result = compare([a, b], ["a", "b"], seed=3)
    draws = draw_images(LABELS, seed=3)
    for key, metric in (("image_auroc", roc_auc_score), ("image_ap", average_precision_score)):
        (row,) = (row for row in result["differences"] if row["metric"] == key)
        values = [metric(LABELS, scores) for scores in (scores_a, scores_b)]
        replicates = []
        for draw in draws:
            chosen = np.repeat(np.arange(30), draw.astype(int))
            ours = [metric(LABELS[chosen], scores[chosen]) for scores in (scores_a, scores_b)]
            replicates.append(round(ours[1] - ours[0], 12))  # a tie is 0, not 1e-17
        above, below = sum(d >= 0 for d in replicates), sum(d <= 0 for d in replicates)
        assert [row["value_a"], row["value_b"]] == pytest.approx(values, abs=1e-12)
        assert row["difference"] == pytest.approx(values[1] - values[0], abs=1e-12)
        assert row["interval"] == pytest.approx(np.percentile(replicates, (2.5, 97.5)), abs=1e-9)
        assert row["p"] == pytest.approx(min(1, 2 * (1 + min(above, below)) / 201))


def test_the_same_run_twice_is_no_difference(tmp_path):
    a, *_ = run_of(tmp_path, "a")
    result = compare([a, a], ["a", "again"])
    assert [row["metric"] for row in result["differences"]] == [*IMAGE_METRICS, *PIXEL_METRICS]
    for row in result["differences"]:
        assert row["difference"] == 0 and row["interval"] == [0, 0] and row["p"] == 1 and row["verdict"] == "none"


def test_a_better_run_wins_and_the_worse_loses(tmp_path):
    (weak, *_), (strong, *_) = run_of(tmp_path, "weak", gain=0.5), run_of(tmp_path, "strong", gain=3.0)
    for runs, names, word, sign in (
        ([weak, strong], ["weak", "strong"], "win", 1),
        ([strong, weak], ["strong", "weak"], "loss", -1),
    ):
        rows = compare(runs, names)["differences"]
        assert {row["verdict"] for row in rows} == {word}
        assert all(row["difference"] * sign > 0 and row["p"] == pytest.approx(2 / 1001) for row in rows)


def test_exact_values_and_what_is_stored_fits_the_maps(tmp_path):
    run, scores, maps, masks = run_of(tmp_path, "a")
    assert run.metrics == image_metrics(scores, LABELS) | pixel_metrics(maps, masks)
    assert run.paths == PATHS and (run.labels == LABELS).all() and (run.scores == scores).all()
    assert run.histograms.negatives.sum(1).tolist() == (~masks).sum((1, 2)).tolist()
    assert run.histograms.shares.sum(1) == pytest.approx(LABELS.astype(float), abs=1e-6)  # one region each
    stored = torch.load(tmp_path / "a", weights_only=True)["histograms"]
    assert [h.dtype for h in stored] == [torch.int32, torch.int32, torch.float32]
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]  # no temporary file left


def test_three_runs_one_without_maps(tmp_path):
    (a, *_), (b, *_) = run_of(tmp_path, "a"), run_of(tmp_path, "b", seed=1)
    c, *_ = run_of(tmp_path, "c", seed=2, pixels=False)
    result = compare([a, b, c], ["a", "b", "c"])
    pairs = [(row["a"], row["b"], row["metric"]) for row in result["differences"]]
    assert pairs == [
        *(("a", "b", key) for key in IMAGE_METRICS + PIXEL_METRICS),
        *((first, "c", key) for first in "ab" for key in IMAGE_METRICS),
    ]
    assert (result["n_test_normal"], result["n_test_anomalous"]) == (20, 10)
    assert json.loads(json.dumps(result)) == result
    header, rows = compare_table(result)
    assert len(markdown_table(header, rows).splitlines()) == 2 + len(pairs)
    assert {len(row) for row in rows} == {len(header)}


def test_one_class_leaves_nothing_to_compare(tmp_path):
    a, *_ = run_of(tmp_path, "a", labels=np.zeros(30, dtype=bool))
    result = compare([a, a], ["a", "b"])
    assert result["differences"] == []
    markdown_table(*compare_table(result))


def test_replicates_without_a_mask_are_left_out():
    interval, p, verdict = judge(np.array([0.1, np.nan, 0.2, 0.3]))
    assert interval == pytest.approx([0.105, 0.295]) and p == pytest.approx(2 / 4) and verdict == "win"


def test_rounding_errors_are_no_difference():
    assert judge(np.array([1e-17, 0, 3e-17] * 50)) == ([0, 0], 1, "none")


def test_other_images_are_named(tmp_path):
    a, *_ = run_of(tmp_path, "a")
    other, *_ = run_of(tmp_path, "b", paths=[*PATHS[:7], "test/x.png", *PATHS[8:]])
    with pytest.raises(UserError, match=r"test image 7 is test/007.png in a and test/x.png in b"):
        compare([a, other], ["a", "b"])
    flipped = LABELS.copy()
    flipped[4] = True
    other, *_ = run_of(tmp_path, "b", labels=flipped)
    with pytest.raises(UserError, match=r"test/004.png is normal in a and anomalous in b"):
        compare([a, other], ["a", "b"])
    other, *_ = run_of(tmp_path, "b", paths=PATHS[:28], labels=LABELS[:28])
    with pytest.raises(UserError, match="a has 30 test images and b has 28"):
        compare([a, a, other], ["a", "a2", "b"])
    with pytest.raises(UserError, match="two runs or more"):
        compare([a], ["a"])


def test_files_that_hold_no_scores(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_scores(tmp_path / "missing.pt")
    torch.save({"config": {}}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last.pt holds no test scores"):
        load_scores(tmp_path / "last.pt")
    torch.save({"figures": {}}, tmp_path / "old.pt")  # the key of earlier versions
    with pytest.raises(UserError, match=r"old.pt is of an earlier version: run train_anomaly.py again"):
        load_scores(tmp_path / "old.pt")
    with pytest.raises(UserError, match="not a number"):
        save_scores(tmp_path / "nan.pt", ["a", "b"], [0, 1], [0.0, float("nan")], NOTHING, None)
    (tmp_path / "no").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        save_scores(tmp_path / "no" / "folder.pt", ["a", "b"], [0, 1], [0.0, 1.0], NOTHING, None)
    with pytest.raises(ValueError, match="1 paths for 2"):
        save_scores(tmp_path / "few.pt", ["a"], [0, 1], [0.0, 1.0], NOTHING, None)
