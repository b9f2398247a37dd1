"""The scripts on files and folders whose names are no UTF-8, hold line breaks or are in other scripts than Latin."""

import csv
import json
import os
import subprocess
import unicodedata

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluate
import predict
import train_anomaly
import train_ssl
from evaluation.anomaly.compare import load_scores
from tests.images import TOP, command, write_classes, write_mvtec
from tests.scripts.test_train_anomaly import words as anomaly_words
from tests.scripts.test_train_ssl import words as ssl_words

RAW, BREAK, CHINESE, DECOMPOSED = os.fsdecode(b"\xff\xfe"), "a\nb, c", "中文", unicodedata.normalize("NFD", "größe")
DEFECT = os.fsdecode(b"kratzer \xe4")  # Latin-1


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """MVTec layout: a defect's folder, good and defective images and training images with such names."""
    top = write_mvtec(tmp_path_factory.mktemp("set")) / "part"
    (top / "test/spot").rename(top / "test" / DEFECT)
    (top / "ground_truth/spot").rename(top / "ground_truth" / DEFECT)
    for i, name in enumerate((RAW, BREAK, CHINESE, DECOMPOSED)):
        (top / "train/good" / f"{i:03d}.png").rename(top / "train/good" / f"{name}.png")
        (top / "test/good" / f"{i:03d}.png").rename(top / "test/good" / f"{name}.png")
        (top / "test" / DEFECT / f"{i:03d}.png").rename(top / "test" / DEFECT / f"{name}.png")
        stored = unicodedata.normalize("NFC", name)  # the mask went another way than its image
        (top / "ground_truth" / DEFECT / f"{i:03d}_mask.png").rename(
            top / "ground_truth" / DEFECT / f"{stored}_mask.PNG"
        )
    return top.parent


def read_csv(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator.Tags()


def test_train_anomaly_and_predict(root, tmp_path, capsys):
    run = anomaly_words("patchcore", root, tmp_path, "holdout=0")
    train_anomaly.main(run)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "run"
    assert results == json.loads((folder / "results.json").read_text()) and list(results["per_defect"]) == [DEFECT]
    rows = read_csv(folder / "test_scores.csv")
    expected = {f"{name}.png" for name in (RAW, BREAK, CHINESE, DECOMPOSED)}
    for defect in ("good", DEFECT):
        paths = [row["path"] for row in rows if row["defect"] == defect]
        assert {os.path.basename(path) for path in paths} == expected and all(map(os.path.isfile, paths))
    assert all(os.path.isfile(row["nearest_training_image"]) for row in rows)
    assert {os.path.basename(path) for path in load_scores(folder / "test_scores.pt").paths} == expected
    tags = events(folder)
    assert r"8_scores/kratzer \xe4" in tags["histograms"] and "2_test/heatmaps 1 of 2" in tags["images"]
    train_anomaly.main(run)  # the names in the checkpoint are the same ones
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results

    (root / "part/test" / f"{RAW} broken.png").write_bytes(b"nonsense")
    predict.main([str(folder), str(root / "part/test"), f"out={tmp_path}/out", "device=cpu"])
    (root / "part/test" / f"{RAW} broken.png").unlink()
    out, err = capsys.readouterr()
    assert r"skipped: cannot read image" in err and r"\xff\xfe broken.png" in err
    assert [os.path.basename(path) for path in json.loads(out.splitlines()[-1])["skipped"]] == [f"{RAW} broken.png"]
    rows = read_csv(tmp_path / "out/predictions.csv")
    assert {row["path"] for row in rows} == {f"{d}/{name}" for d in ("good", DEFECT) for name in expected}
    for row in rows:
        assert os.path.isfile(os.path.join(root, row["nearest_training_image"]))
        assert Image.open(tmp_path / "out/heatmaps" / f"{row['path']}.png").size[0] == 420


def test_train_ssl_and_eval(tmp_path, capsys):
    root = write_classes(tmp_path / "set", each=8)
    for split in ("train", "test"):
        for i, name in enumerate((RAW, CHINESE, BREAK)):
            (root / split / f"class{i}").rename(root / split / name)
            (root / split / name / "000.png").rename(root / split / name / f"{RAW}.png")
    train_ssl.main(ssl_words("simclr", root, tmp_path, "epochs=1", "holdout=0.2"))
    evaluate.main(["task=knn", f"checkpoint={tmp_path}/run/last.pt", "device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(results["classes"]) == set(results["per_class"]) == {RAW, CHINESE, BREAK}
    assert (tmp_path / "run/eval_knn/confusion.png").exists()


def test_eval_defects(root, tmp_path, capsys):
    about = ["data.name=mvtec", f"data.root={root}", "data.category=part", "data.size=48", f"runs={tmp_path}"]
    evaluate.main(["task=defects", *about, "images=3", "defect=cutpaste", "device=cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["task"] == "defects"


@pytest.mark.slow
def test_errors_name_the_file(root, tmp_path):
    """As a terminal shows it: one line, valid UTF-8."""
    path = root / "part/train/good" / f"{RAW}.png"
    whole = path.read_bytes()
    path.write_bytes(b"")
    words = command(["train_anomaly.py", *anomaly_words("patchcore", root, tmp_path)])
    done = subprocess.run(words, cwd=TOP, capture_output=True, check=False)
    path.write_bytes(whole)
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("error: cannot read image ") and r"\xff\xfe.png: the file is empty" in last
