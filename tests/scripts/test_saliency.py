"""eval.py task=attention and task=gradcam on every kind of network: what they write, and mistakes."""

import csv
import json
import math

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluate
import train_anomaly
import train_classifier
import train_ssl
from evaluation.inspect.saliency import summarize
from models.backbones.vit import DEPTH
from runtime.errors import UserError
from tests.images import TOP, write_classes, write_mvtec

ABOUT = ["device=cpu", "data.size=32"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    place = tmp_path_factory.mktemp("sets")
    write_classes(place / "classes", each=6)
    write_mvtec(place / "mvtec")
    return place


@pytest.fixture(scope="module")
def runs(sets):
    """classifier/, patchcore/, embedding/ and dino/ (a ViT)."""
    about = [*ABOUT, f"runs={sets}/runs", "batch_size=4"]
    classes = [f"data.root={sets}/classes", "epochs=1"]
    small = ["augment.size=32", "unfreeze.head_epochs=0", "backbone=mobilenet_v2", "backbone.width=0.25"]
    config = f"{TOP}/configs/demo"
    train_classifier.main([f"{config}/classifier_demo.yaml", *about, *classes, *small, "run_name=classifier"])
    anomaly = [f"data.root={sets}/mvtec", "data.category=part"]
    train_anomaly.main([f"{config}/patchcore_demo.yaml", *about, *anomaly, "run_name=patchcore"])
    vit = ["backbone=vit_tiny", "backbone.patch=8", "backbone.size=32", "augment.size=32", "optim.warmup_epochs=0"]
    train_ssl.main([f"{config}/dino_demo.yaml", *about, *classes, *vit, "run_name=dino"])
    return sets / "runs"


def results_of(words: list[str], capsys) -> dict:
    evaluate.main([*words, "device=cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_backbone_without_a_run(sets, tmp_path, capsys):
    words = ["task=gradcam", "data.name=folder", f"data.root={sets}/classes", "data.size=48", "backbone=resnet18"]
    results = results_of([*words, "most=2", "shown=1", f"runs={tmp_path}", "batch_size=5"], capsys)
    assert list(results["maps"]) == ["Grad-CAM", "random", "center"] and results["n_images"] == 2
    folder = tmp_path / "eval" / "eval_gradcam"
    rows = list(csv.DictReader((folder / "gradcam.csv").open()))
    assert [row["map"] for row in rows] == ["Grad-CAM", "random", "center"] * 2
    for name, found in results["maps"].items():
        own = [float(row["faithfulness"]) for row in rows if row["map"] == name]
        assert found["faithfulness"] == pytest.approx(sum(own) / 2)
        assert found["faithfulness"] == pytest.approx(found["insertion"] - found["deletion"])
        assert found["intact"] == pytest.approx(1)  # the similarity of an image with itself
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["images"] == ["2_test/gradcam"]
    assert Image.open(folder / "gradcam.png").height < 500  # one row


@pytest.mark.slow
def test_every_kind_of_run(runs, sets, capsys):
    found = results_of(["task=gradcam", f"checkpoint={runs}/classifier", "most=3"], capsys)
    assert found["network"] == "Classifier on MobileNetV2" and 0 < found["maps"]["Grad-CAM"]["intact"] <= 1
    one = f"images={sets}/classes/test/class1/000.png"
    found = results_of(["task=gradcam", f"checkpoint={runs}/classifier", one, "class_name=class2"], capsys)
    row = next(csv.DictReader((runs / "classifier/eval_gradcam/gradcam.csv").open()))
    assert found["n_images"] == 1 and row["image"] == "000.png" and row["explains"].startswith("class2, probability")
    likeness = [f"reference={sets}/classes/test/class0/000.png", f"images={sets}/classes/test", "most=4"]
    found = results_of(["task=gradcam", f"checkpoint={runs}/dino", *likeness], capsys)
    assert found["n_images"] == 4 and found["network"] == "ViTTiny"
    found = results_of(["task=gradcam", f"checkpoint={runs}/patchcore"], capsys)
    assert list(found["maps"]) == ["Grad-CAM", "the detector's own map", "random", "center"]
    assert found["n_images"] == 4 and found["maps"]["Grad-CAM"]["n_masked"] == 4  # the anomalous ones
    # a bright square in a texture
    inside = {name: each["inside"] for name, each in found["maps"].items()}
    assert min(inside["Grad-CAM"], inside["the detector's own map"]) > inside["random"], inside
    for more in ([], ["data.size=40"]):
        found = results_of(["task=attention", f"checkpoint={runs}/dino", "most=2", *more], capsys)
        assert list(found["maps"]) == ["mean of the heads", "rollout", "random", "center"]
    assert DEPTH == 12 and (runs / "dino/eval_attention/attention.png").exists()


@pytest.mark.slow
def test_mistakes_of_runs(runs, capsys):
    for words, match in (
        (["task=attention", f"checkpoint={runs}/classifier"], "MobileNetV2 has none: use task=gradcam"),
        (["task=gradcam", f"checkpoint={runs}/classifier", "class_name=x"], "none of the run's classes"),
        (["task=gradcam", f"checkpoint={runs}/classifier", "backbone.width=0.5"], "remove the keys backbone"),
        (["task=gradcam", f"checkpoint={runs}/patchcore", "class_name=good"], "class_name=good is for classifiers"),
        (["task=gradcam", f"checkpoint={runs}/patchcore", "data.tile=16"], "set data.tile=0"),
    ):
        with pytest.raises(UserError, match=match):
            results_of(words, capsys)
    assert not (runs / "classifier/eval_attention").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["task=attention", "backbone=resnet18"], "ResNet18 has none"),
        (["task=gradcam", "backbone=resnet18", "images=nowhere.png"], "nowhere.png"),
        (["task=gradcam", "backbone=resnet18", "reference=nowhere.png"], "nowhere.png"),
        (["task=gradcam", "backbone=resnet18", "class_name=cat"], "class_name=cat is for classifiers"),
        (["task=attention", "backbone=vit_tiny", "data.size=40"], "40 x 40 is not a multiple"),
        (["task=gradcam", "backbone=resnet18", "most=0"], "most=0 must be at least 1"),
    ],
)
def test_mistakes_leave_no_folder(more, match, sets, tmp_path):
    words = [*ABOUT, "data.name=folder", f"data.root={sets}/classes", f"runs={tmp_path}/runs"]
    words = [word for word in words if word.partition("=")[0] not in {m.partition("=")[0] for m in more}]
    with pytest.raises(UserError, match=match):
        evaluate.main([*words, *more])
    assert not (tmp_path / "runs").exists()


def test_the_summary_is_of_means():
    def row(name: str, number: float, **more) -> dict:
        curve = {"deletion_curve": [1.0, 0.25]}
        return {"map": name, "deletion": 0.1, "insertion": 0.1 + number, "faithfulness": number} | curve | more

    rows = [row("a", 0.5, inside=0.5, hit=1.0), row("random", 0.1), row("a", 0.0), row("random", 0.2)]
    found = summarize(rows, 0)
    assert found["a"]["faithfulness"] == 0.25 and found["a"]["above_random"] == 0.5 and found["a"]["n_masked"] == 1
    assert found["a"]["inside"] == 0.5 and found["a"]["intact"] == 1 and found["a"]["removed"] == 0.25
    assert found["a"]["faithfulness_interval"] == [0.0, 0.5] and found["random"]["above_random"] is None
    assert "hit" not in found["random"] and math.isclose(found["random"]["faithfulness"], 0.15)
