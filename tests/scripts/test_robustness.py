"""task=robustness: kNN, a classifier and a detector; equal in two processes; CIFAR-10-C's files; mistakes."""

import csv
import json
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import train_anomaly
import train_classifier
from data.corruptions import CORRUPTIONS, corrupt
from data.datasets.cifar import CLASSES, Corruption
from evaluation.tasks import robustness
from runtime.errors import UserError
from tests.images import write_classes, write_mvtec
from tests.processes import script

NETWORK = ["backbone=vit_tiny", "backbone.patch=8", "backbone.size=32"]
FEW = ["corruptions=fog,jpeg_compression,underexposure", "severities=5,1", "shifts=2", "device=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_classes(place / "images")
    write_mvtec(place / "tiles", size=32)
    return place


def data(place):
    return ["data.name=folder", f"data.root={place}/images", "data.size=32", f"runs={place}", *NETWORK]


def read(folder):
    with open(folder / "robustness.csv") as file:
        return json.loads((folder / "results.json").read_text()), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def knn(place):
    evaluate.main(["task=robustness", *data(place), *FEW, "run_name=knn", "frames=true"])
    return read(place / "knn" / "eval_robustness")


def test_knn_has_a_row_per_corruption_and_severity(place, knn, capsys):
    results, rows = knn
    pairs = [("none", 0), *((name, s) for name in ("fog", "jpeg_compression", "underexposure") for s in (1, 5))]
    assert [(row["corruption"], int(row["severity"])) for row in rows] == pairs
    evaluate.main(["task=knn", *data(place), "device=cpu"])
    assert results["clean_error"] == pytest.approx(
        1 - json.loads(capsys.readouterr().out.splitlines()[-1])["knn20_top1"]
    )
    assert results["constants"] == 32 and results["severities"] == [1, 5] and results["kind"] == "knn"
    own = [row["error"] for row in results["rows"] if row["corruption"] in ("fog", "jpeg_compression")]
    assert results["corrupted_error"] == pytest.approx(np.mean(own))  # underexposure is ours
    assert float(rows[1]["cosine"]) == results["rows"][0]["cosine"] < 1
    assert results["frames"]["pairs"] == 9 and len(results["shifts"]) == 1


@pytest.mark.slow
def test_curves_are_of_the_last_measurement(place, knn):  # noqa: ARG001
    evaluate.main(["task=robustness", *data(place), *FEW, "run_name=knn", "frames=true"])
    lines = (place / "knn" / "eval_robustness" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 5]


def test_what_it_leaves_in_the_folder(place, knn):
    folder = place / "knn" / "eval_robustness"
    with Image.open(folder / "robustness.png") as curves, Image.open(folder / "corrupted.png") as sheet:
        assert curves.size[0] > 600 and sheet.size[0] > 400
    assert "| fog" in (folder / "robustness.md").read_text()
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [0, 1, 5]
    assert steps[0]["robustness/fog"] == knn[0]["clean_error"]
    assert steps[2]["robustness/fog"] == knn[0]["rows"][1]["error"]


@pytest.mark.slow
def test_two_processes_give_the_same_table(place, knn):
    script(["eval.py", "task=robustness", *data(place), *FEW, "run_name=two", "frames=true"], processes=2)
    results, _ = read(place / "two" / "eval_robustness")
    for row, other in zip(results["rows"], knn[0]["rows"]):
        assert row["error"] == other["error"] and row["changed"] == other["changed"]
        assert row["cosine"] == pytest.approx(other["cosine"], abs=1e-4)
    assert results["shifts"][0]["changed"] == knn[0]["shifts"][0]["changed"]
    assert results["errors"] == knn[0]["errors"]


@pytest.mark.slow
def test_a_classifier_is_tested_with_its_own_head_and_by_a_reference(place, knn):  # noqa: ARG001
    small = [*data(place), "augment.size=32", "device=cpu", "epochs=1", "batch_size=8", "unfreeze.head_epochs=0"]
    train_classifier.main(["configs/demo/classifier_demo.yaml", *small, "run_name=tuned"])
    evaluate.main(["task=robustness", f"checkpoint={place}/tuned", *FEW])
    results, _ = read(place / "tuned" / "eval_robustness")
    trained = json.loads((place / "tuned" / "results.json").read_text())
    assert results["kind"] == "classifier" and results["clean_error"] == pytest.approx(1 - trained["top1"])
    evaluate.main(["task=robustness", f"checkpoint={place}/tuned", *FEW, f"reference={place}/tuned", "seed=0"])
    again, _ = read(place / "tuned" / "eval_robustness")
    assert again["mce"] == pytest.approx(1) or results["corrupted_error"] == 0
    with pytest.raises(UserError, match="errors of another kind: 1 - top-1 of kNN"):
        evaluate.main(["task=robustness", f"checkpoint={place}/tuned", *FEW, f"reference={place}/knn"])
    with pytest.raises(UserError, match="has a backbone of its own"):
        evaluate.main(["task=robustness", f"checkpoint={place}/tuned", *FEW, "backbone.name=resnet18"])


@pytest.mark.slow
def test_a_detector_at_its_stored_threshold(place):
    about = ["data.name=mvtec", f"data.root={place}/tiles", "data.category=part", "data.size=32", f"runs={place}"]
    words = ["configs/demo/padim_demo.yaml", *about, "backbone=resnet18", "device=cpu", "run_name=padim"]
    train_anomaly.main(words)
    evaluate.main(["task=robustness", f"checkpoint={place}/padim", *FEW])
    results, rows = read(place / "padim" / "eval_robustness")
    trained = json.loads((place / "padim" / "results.json").read_text())
    assert results["threshold"] == trained["threshold"] and results["kind"] == "detector"
    assert results["clean"]["image_auroc"] == pytest.approx(trained["image_auroc"])
    assert results["clean"]["false_alarms"] == trained["observed_false_alarms"]
    assert {"false_alarms", "false_alarms_low", "detections", "image_auroc"} <= rows[0].keys()
    steps = (place / "padim" / "eval_robustness" / "metrics.jsonl").read_text().splitlines()
    assert "robustness/false_alarms_fog" in json.loads(steps[1])
    with pytest.raises(UserError, match="takes images as its run did"):
        evaluate.main(["task=robustness", f"checkpoint={place}/padim", *FEW, "data.size=48"])
    with pytest.raises(UserError, match="cifar10_c has images to classify"):
        evaluate.main(["task=robustness", f"checkpoint={place}/padim", *FEW, f"cifar10_c={place}"])


@pytest.mark.slow
def test_the_published_files_of_cifar10_c_are_taken_where_they_are(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for name in CLASSES:
            (tmp_path / "cifar" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
                    tmp_path / "cifar" / split / name / f"{i}.png"
                )
    files = sorted((tmp_path / "cifar" / "test").rglob("*.png"))
    test = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    made = [corrupt(test, torch.arange(10), "fog", s, seed=0) for s in range(1, 6)]
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "fog.npy", torch.cat(made).permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "c" / "labels.npy", np.tile(np.arange(10, dtype=np.uint8), 5))
    words = ["task=robustness", "data.name=cifar10", f"data.root={tmp_path}/cifar", "data.size=32", *NETWORK]
    words += ["severities=2,4", "device=cpu", f"runs={tmp_path}"]
    evaluate.main([*words, "corruptions=fog", "run_name=made"])
    evaluate.main([*words, "corruptions=fog", "run_name=files", f"cifar10_c={tmp_path}/c"])
    (own, _), (other, _) = (read(tmp_path / name / "eval_robustness") for name in ("made", "files"))
    assert [row["cosine"] for row in own["rows"]] == pytest.approx([row["cosine"] for row in other["rows"]], abs=1e-5)
    with pytest.raises(UserError, match=r"snow\.npy"):
        evaluate.main([*words, "run_name=files", f"cifar10_c={tmp_path}/c", "corruptions=snow"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corruptions=foggy"], "corruptions='foggy' is unknown, did you mean 'fog'"),
        (["severities=6"], r"severities.*at least 1 and at most 5"),
        (["severities=[]"], "severities is empty"),
        (["corruptions=fog,snow,fog"], "corruptions names fog twice"),
        (["reference=alexnet", "severities=1,2"], "all five severities"),
        (["constants=64"], "constants"),
        (["cifar10_c=/none"], "cifar10_c has no /none/gaussian_noise.npy"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(place, words, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["task=robustness", *data(place), *words, "run_name=wrong"])
    assert not (place / "wrong").exists()


def test_all_is_measured_by_default():
    cfg = SimpleNamespace(corruptions=None, cifar10_c=None, severities=[1], checkpoint=None)
    robustness.check(cfg)
    assert cfg.corruptions == list(CORRUPTIONS) and len(CORRUPTIONS) == 21
    cfg = SimpleNamespace(corruptions=None, cifar10_c="c", severities=[1], checkpoint=None)
    robustness.check(cfg)
    assert cfg.corruptions == list(get_args(Corruption))  # those with a file
