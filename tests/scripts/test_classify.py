"""From the calibration of train_classifier.py to the rows of predict.py and the results of load_classifier."""

import csv
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import predict
import scavenge
import train_classifier
from data.images import decode
from data.normalize import normalize
from evaluation.classify import NONE, load_classifier_run
from evaluation.confidence import fit_temperature
from runtime import checkpoint
from runtime.errors import UserError
from tests.images import write_classes
from tests.scripts.test_train_classifier import results_of, without_width, words


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """A run whose validation images are a quarter."""
    runs = tmp_path_factory.mktemp("runs")
    quick = ["optim=adamw", "optim.lr=0.01", "unfreeze.layers=0", "batch_size=4", "epochs=4", "augment.scale=0.9,1"]
    run = words(images, runs, "holdout=0.25", "unknown=0.2", "backbone=resnet18", *quick)
    train_classifier.main(without_width(run))
    return runs / "run"


def logits_of(folder, paths):
    """By hand, float32 (N, C)."""
    network, geometry, state = load_classifier_run(folder)
    pixels = torch.stack([decode(str(path), geometry) for path in paths])
    with torch.no_grad():
        return network(normalize(pixels, network.normalization)), state


def scores_of(folder, paths):
    """By hand: the distance to the nearest of the stored features, by float64 differences."""
    network, geometry, state = load_classifier_run(folder)
    pixels = torch.stack([decode(str(path), geometry) for path in paths])
    with torch.no_grad():
        features = network.backbone(normalize(pixels, network.normalization)).double()
    features = features / features.norm(dim=1, keepdim=True)
    return (features[:, None] - state["bank"].double()).norm(dim=2).amin(1)  # (N,)


def table(out):
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def run(capsys, *more) -> tuple[dict, str]:
    predict.main([*map(str, more), "device=cpu"])
    return results_of(capsys)


def test_temperature_and_threshold_are_of_the_validation_images(folder, images):
    state = checkpoint.load(folder)
    learned = {sorted((images / "train").rglob("*.png"))[i] for i in state["learned"]}
    held = [path for path in sorted((images / "train").rglob("*.png")) if path not in learned]
    assert len(held) == 9
    logits, _ = logits_of(folder, held)
    labels = torch.tensor([state["classes"].index(path.parent.name) for path in held])
    kept, results = state["calibration"], json.loads((folder / "results.json").read_text())
    assert kept["temperature"] == pytest.approx(fit_temperature(logits, labels, "cross_entropy"), rel=1e-4)
    scores = sorted(scores_of(folder, held).tolist())
    assert kept["threshold"] == pytest.approx(scores[math.ceil(10 * 0.8) - 1], rel=1e-5)
    assert kept == {key: results[key] for key in kept} and results["n_validation"] == 9
    assert results["promised_unknown"] == 0.2

    tested = sorted((images / "test").rglob("*.png"))
    logits, _ = logits_of(folder, tested)
    right = (logits.argmax(1) == torch.tensor([state["classes"].index(p.parent.name) for p in tested])).numpy()
    for key, temperature in (("test_ece_uncalibrated", 1.0), ("test_ece", kept["temperature"])):
        claimed = (logits.double() / temperature).softmax(1).amax(1).numpy()
        bins = np.ceil(claimed * 15)
        expected = sum(abs((right - claimed)[bins == b].sum()) for b in range(1, 16)) / len(right)
        assert results[key] == pytest.approx(expected, abs=1e-5), key
    assert results["test_unknown"] == (scores_of(folder, tested) > kept["threshold"]).double().mean()
    network, geometry, _ = load_classifier_run(folder)
    pixels = torch.stack([decode(str(path), geometry) for path in sorted(learned)])
    with torch.no_grad():
        features = torch.nn.functional.normalize(network.backbone(normalize(pixels, network.normalization)))
    torch.testing.assert_close(state["bank"], features, atol=1e-5, rtol=1e-5)


def test_rows_are_the_results_of_load_classifier(folder, images, tmp_path, capsys):
    """To the last bit; broken images are named and skipped, what is no image is left alone."""
    shutil.copytree(images / "test", tmp_path / "in")
    (tmp_path / "in" / "broken.png").write_bytes(b"nonsense")
    paths = sorted((images / "test").rglob("*.png"))
    scores = sorted(r.score for r in scavenge.load_classifier(folder, device="cpu", batch_size=5).classify(paths))
    middle = scores[len(scores) // 2]
    out = [folder, tmp_path / "in", f"out={tmp_path}/out", "batch_size=5", f"threshold={middle!r}"]
    results, err = run(capsys, *out)
    rows = table(tmp_path / "out")
    classifier = scavenge.load_classifier(folder, device="cpu", batch_size=5, threshold=middle)
    found = classifier.classify([tmp_path / "in" / row["path"] for row in rows])
    assert len(rows) == 12 == results["images"] and results["skipped"] == [f"{tmp_path}/in/broken.png"]
    assert "skipped: " in err and results["classes"][NONE] == sum(score > middle for score in scores) == 5
    assert sum(results["classes"].values()) == 12
    assert list(rows[0])[:6] == ["path", "class", "probability", "score", "is_unknown", "threshold"]
    for row, result in zip(rows, found, strict=True):
        assert result.path == f"{tmp_path}/in/{row['path']}" and row["class"] == result.verdict
        assert (result.probability, result.score) == (float(row["probability"]), float(row["score"]))
        each = [float(row[f"probability of {name}"]) for name in classifier.classes]
        assert each == result.probabilities.tolist() and max(each) == result.probability
        assert float(row["threshold"]) == middle and row["is_unknown"] == str(int(result.score > middle))
        assert (row["class"] == NONE) == (result.score > middle)
        if row["class"] != NONE:
            assert row["class"] == result.likeliest == classifier.classes[int(np.argmax(each))]
    expected, state = logits_of(folder, [tmp_path / "in" / row["path"] for row in rows])
    expected = (expected / state["calibration"]["temperature"]).softmax(1)
    again = [tmp_path / "in" / row["path"] for row in rows]
    torch.testing.assert_close(classifier(again), expected)
    assert [result.score for result in found] == pytest.approx(scores_of(folder, again).tolist(), rel=1e-4)
    assert classifier.classify(sorted((images / "train/class0").iterdir())[:1])[0].score < 1e-3  # it was learned
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    run(capsys, *out)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before
    assert not (tmp_path / "out" / "heatmaps").exists() or not os.listdir(tmp_path / "out" / "heatmaps")


def test_the_runs_own_threshold(folder, images, tmp_path, capsys):
    results, _ = run(capsys, folder / "last.pt", images / "test", f"out={tmp_path}")
    trained = json.loads((folder / "results.json").read_text())
    assert results["classes"].get(NONE, 0) == pytest.approx(12 * trained["test_unknown"])
    assert {float(row["threshold"]) for row in table(tmp_path)} == {trained["threshold"]}


@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_other_losses_and_a_class_without_validation_images(loss, images, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for path in sorted((root / "train" / "class1").iterdir())[1:]:  # of one image none is held out
        path.unlink()
    train_classifier.main(words(root, tmp_path, "holdout=0.34", "epochs=1", f"loss={loss}"))
    results, _ = results_of(capsys)
    assert results["n_validation"] == 8 and results["threshold"] is not None
    assert results["promised_unknown"] == 1 / 9
    found = scavenge.load_classifier(tmp_path / "run", device="cpu")(sorted((images / "test").rglob("*.png")))
    logits, state = logits_of(tmp_path / "run", sorted((images / "test").rglob("*.png")))
    scaled = logits / (state["calibration"]["temperature"] or 1)
    torch.testing.assert_close(found, scaled.sigmoid() if loss == "bce" else scaled.softmax(1))


def test_without_validation_images(images, tmp_path, capsys):
    """Nothing to calibrate on, which train_classifier.py and predict.py say."""
    train_classifier.main(words(images, tmp_path, "epochs=1", "holdout=0"))
    results, err = results_of(capsys)
    assert (results["temperature"], results["threshold"], results["test_unknown"]) == (None, None, None)
    assert results["test_ece"] == results["test_ece_uncalibrated"] and "no validation images: probabilities" in err
    results, err = run(capsys, tmp_path / "run", images / "test", f"out={tmp_path}/out")
    assert "give threshold=" in err and NONE not in results["classes"]
    assert {(row["is_unknown"], row["threshold"]) for row in table(tmp_path / "out")} == {("", "")}
    (result,) = scavenge.load_classifier(tmp_path / "run", device="cpu").classify([images / "test/class0/000.png"])
    assert result.is_unknown is result.threshold is None and result.verdict == result.likeliest


def test_mistakes(folder, images, tmp_path):
    for more, text in (
        (["tile=64"], "tile=64 is for detectors, and .* is a classifier's: remove it"),
        (["overlap=8"], "overlap=8 is for detectors"),
        (["category=bottle"], "category=bottle is for detectors"),
        ([f"submission={tmp_path}"], "submission=.* is for detectors"),
        (["threshold=high"], "threshold"),
    ):
        with pytest.raises(UserError, match=text) as error:
            predict.main([str(folder), str(images / "test"), f"out={tmp_path}/out", "device=cpu", *more])
        assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    state = checkpoint.load(folder)
    for name, change, text in (
        ("temperature", {"calibration": state["calibration"] | {"temperature": 0.0}}, "its calibration cannot be"),
        ("threshold", {"calibration": state["calibration"] | {"threshold": "high"}}, "its calibration cannot be"),
        ("half", {"calibration": None, "bank": None}, "has not finished: the command that began it resumes it"),
        ("older", {"bank": None}, "trained by an older version, .* resume=never"),
        ("oldest", {"calibration": None, "bank": None}, "trained by an older version, .* resume=never"),
        ("wide", {"bank": torch.zeros(3, 4)}, "its bank is no features"),
        ("nan", {"bank": torch.full((3, 512), torch.nan)}, "its bank is no features"),
        ("precision", {"config": state["config"] | {"precision": "int8"}}, "precision"),
    ):
        edited = {key: value for key, value in (state | change).items() if value is not None}
        (tmp_path / name).mkdir()
        torch.save(edited, tmp_path / name / "last.pt")
        if name.startswith("old"):  # and finished
            shutil.copy(folder / "results.json", tmp_path / name)
        with pytest.raises(UserError, match=text) as error:
            predict.main([str(tmp_path / name), str(images / "test"), f"out={tmp_path}/out", "device=cpu"])
        assert len(str(error.value)) <= 300
    assert not (tmp_path / "out").exists()
    before = scavenge.load_classifier(tmp_path / "half", device="cpu")  # the end of the training
    (result,) = before.classify([images / "test/class0/000.png"])
    assert result.score is result.threshold is result.is_unknown is None and result.probability > 0
    with pytest.raises(UserError, match=r"has not finished, so no image has a score: leave out threshold=0\.5"):
        scavenge.load_classifier(tmp_path / "half", threshold=0.5, device="cpu")


def test_a_large_set_is_compared_with_a_part_of_it(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_classifier, "FAMILIAR", 5)
    train_classifier.main(words(images, tmp_path, "epochs=1"))
    assert len(checkpoint.load(tmp_path / "run")["bank"]) == 5
    assert results_of(capsys)[0]["test_unknown"] is not None


def test_the_sheets_are_in_tensorboard(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"2_test/confusion", "2_test/confused"} <= {*events.Tags()["images"]}
