"""task=export from a run to predict.py and scavenge.py, which need no models/ for it."""

import csv
import json
import re
import subprocess
import sys

import pytest
import torch

import eval as evaluate
import predict
import scavenge
import train_anomaly
import train_classifier
import train_ssl
from evaluation.export import programs
from evaluation.tasks import export
from runtime import checkpoint
from runtime.errors import UserError
from tests.images import TOP, write_classes, write_mvtec

pytestmark = pytest.mark.slow
WITHOUT_TRAINING_CODE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("models", "losses", "search", "training"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of a detector, one of tiles, one of padded images, a classifier and a backbone, each exported."""
    place = tmp_path_factory.mktemp("place")
    write_classes(place / "classes", each=6)
    write_mvtec(place / "mvtec")
    about = [f"runs={place}/runs", "device=cpu", "batch_size=4"]
    anomaly = [*about, f"data.root={place}/mvtec", "data.category=part", "backbone=mobilenet_v2", "backbone.width=0.25"]
    for name, further in {
        "patchcore_own": ["data.size=64"],
        "tiled": ["data.size=64", "data.tile=32", "data.overlap=0"],
        "padded": ["data.size=64,80", "data.fit=pad"],
    }.items():
        train_anomaly.main([f"{TOP}/configs/demo/patchcore_demo.yaml", *anomaly, *further, f"run_name={name}"])
    ssl = [f"data.root={place}/classes", "data.size=32", "augment.size=24", "epochs=1", "run_name=backbone"]
    train_ssl.main([f"{TOP}/configs/demo/simclr_demo.yaml", *about, *ssl])
    classes = [f"data.root={place}/classes", "data.size=32", "augment.size=32", "epochs=1", "run_name=classifier"]
    classes += ["unfreeze.head_epochs=1", "backbone=mobilenet_v2", "backbone.width=0.25"]
    train_classifier.main([f"{TOP}/configs/demo/classifier_demo.yaml", *about, *classes])
    for name in ("patchcore_own", "tiled", "padded", "backbone", "classifier"):
        evaluate.main(["task=export", f"checkpoint={place}/runs/{name}", "batch_size=3"])
    return place


KINDS = {"patchcore_own": "detector", "tiled": "detector", "padded": "detector", "classifier": "classifier"}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_results_say_what_was_compared(place):
    for name in (*KINDS, "backbone"):
        folder = place / "runs" / name / "eval_export"
        results = json.loads((folder / "results.json").read_text())
        assert results["kind"] == KINDS.get(name, "backbone") and results["batch_sizes"] == [1, 2, 3]
        assert results["bytes"] == (folder / f"{results['kind']}.pt2").stat().st_size
        assert results["decisions"] == (0 if name == "backbone" else 3 * results["images"]) and results["images"] > 5
        assert all(0 <= away <= 1e-4 for away in results["largest"].values()) and results["moved"] == 0


@pytest.mark.parametrize("name", KINDS)
def test_predict_says_the_same_of_the_file_without_the_training_code(name, place, tmp_path):
    images = str(place / ("classes" if name == "classifier" else "mvtec/part/test"))
    predict.main([f"{place}/runs/{name}", images, f"out={tmp_path}/live", "device=cpu", "batch_size=3"])
    words = [f"{place}/runs/{name}/eval_export/{KINDS[name]}.pt2", images, f"out={tmp_path}/exported", "batch_size=3"]
    program = f"{WITHOUT_TRAINING_CODE}\nimport predict\npredict.main({words})\nassert 'models' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=TOP, check=True, capture_output=True)
    live, exported = (rows_of(tmp_path / kind / "predictions.csv") for kind in ("live", "exported"))
    assert len(live) == len(exported) > 5
    for then, now in zip(live, exported):
        for key in then:
            number = key in ("score", "probability") or key.startswith("probability of")
            assert float(now[key]) == pytest.approx(float(then[key]), rel=1e-4) if number else now[key] == then[key]
    heat = [sorted(p.name for p in (tmp_path / kind).rglob("*.png")) for kind in ("live", "exported")]
    assert heat[0] == heat[1] and len(heat[0]) == (0 if name == "classifier" else len(live))


def test_scavenge_says_the_same_without_the_training_code(place, tmp_path):
    paths = sorted(map(str, (place / "mvtec/part/test").rglob("*.png")))
    program = f"""{WITHOUT_TRAINING_CODE}
import scavenge, torch
paths = {paths}
runs = "{place}/runs"
found = [(r.score, r.is_anomalous, r.p_value, r.peak, r.map) for r in scavenge.load_detector(
    runs + "/patchcore_own/eval_export/detector.pt2")(paths)]
classes = scavenge.load_classifier(runs + "/classifier/eval_export/classifier.pt2")(paths)
features = scavenge.load_backbone(runs + "/backbone/eval_export/backbone.pt2")(paths)
torch.save([found, classes, features], "{tmp_path}/found.pt")
assert "models" not in sys.modules"""
    subprocess.run([sys.executable, "-c", program], cwd=TOP, check=True, capture_output=True)
    found, classes, features = torch.load(tmp_path / "found.pt")
    for theirs, (score, anomalous, p, peak, heat) in zip(
        scavenge.load_detector(place / "runs/patchcore_own")(paths), found
    ):
        assert score == pytest.approx(theirs.score, rel=1e-4) and torch.allclose(heat, theirs.map, rtol=1e-3, atol=1e-4)
        assert (anomalous, p, peak) == (theirs.is_anomalous, theirs.p_value, theirs.peak)
    assert torch.allclose(classes, scavenge.load_classifier(place / "runs/classifier")(paths), atol=1e-5)
    assert torch.allclose(features, scavenge.load_backbone(place / "runs/backbone")(paths), rtol=1e-4, atol=1e-4)


def test_the_block_of_the_documentation_runs(place, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (TOP / "docs/usage.md").read_text(), re.DOTALL)
    monkeypatch.chdir(place)
    exec(block, {})
    assert capsys.readouterr().out == "tensor([True, True]) torch.Size([2, 64, 64])\n"  # black is anomalous


@pytest.mark.parametrize("wrong", ["weight", "threshold"])
def test_a_program_that_differs_is_not_kept(wrong, place, monkeypatch):
    def write(program, about, file):
        if wrong == "weight":
            for name, value in list(program.state_dict.items()):
                if value.dim() == 4:  # a convolution's, which the run's own network shares
                    program.state_dict[name] = torch.nn.Parameter(1.01 * value.detach(), requires_grad=False)
        else:
            threshold = {"threshold": about["state"]["calibration"]["threshold"] / 100}
            calibration = about["state"]["calibration"] | threshold
            about = about | {"state": about["state"] | {"calibration": calibration}}
        programs.write(program, about, file)

    folder = place / "runs/patchcore_own/eval_export"
    before = (folder / "detector.pt2").read_bytes()
    monkeypatch.setattr(export, "write", write)
    what = "score .* differs from the run's by" if wrong == "weight" else "decision .* is anomalous, the run's normal"
    with pytest.raises(UserError, match=rf"exported program's {what}.*: the file is not kept"):
        evaluate.main(["task=export", f"checkpoint={place}/runs/patchcore_own"])
    assert (folder / "detector.pt2").read_bytes() == before and not list(folder.glob("*unfinished*"))


def test_mistakes_are_one_line(place, tmp_path):
    run, file = place / "runs/patchcore_own", place / "runs/patchcore_own/eval_export/detector.pt2"
    images = f"images={place}/mvtec/part/test/good"
    state = checkpoint.read(run)
    for name, value in {"unfinished": None, "none": state["calibration"] | {"threshold": None}}.items():
        (tmp_path / name).mkdir()
        kept = {key: each for key, each in state.items() if key != "calibration"}
        torch.save(kept | ({} if value is None else {"calibration": value}), tmp_path / name / "last.pt")
    for words, message in {
        (f"checkpoint={tmp_path}/nowhere",): "cannot read",
        (f"checkpoint={tmp_path}/unfinished",): "has not finished",
        (f"checkpoint={tmp_path}/none",): "has no threshold, so it decides nothing: give threshold=",
        (f"checkpoint={place}/runs/backbone", "threshold=1"): "is for detectors and classifiers",
        (f"checkpoint={run}", f"images={tmp_path}"): "there are no images in",
        (f"checkpoint={run}", "format=onnx"): "format=onnx needs onnx and onnxscript and onnxruntime",
        (f"checkpoint={run}", "backbone.name=resnet18"): "backbone",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            evaluate.main(["task=export", *words])
        assert "\n" not in str(caught.value)
    evaluate.main(["task=export", f"checkpoint={tmp_path}/none", "threshold=3", images])
    told = scavenge.load_detector(tmp_path / "none/eval_export/detector.pt2")
    assert told.threshold == 3

    for words, message in {
        ("tile=64",): "tile=64 is not how",
        ("precision=bf16",): "precision=bf16 is not how",
        ("category=x",): "category=x has no thresholds",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            predict.main([str(file), str(place / "mvtec"), f"out={tmp_path}/out", *words])
    with pytest.raises(UserError, match="is an exported backbone, not a detector or a classifier"):
        predict.main([f"{place}/runs/backbone/eval_export/backbone.pt2", str(place / "mvtec"), f"out={tmp_path}/out"])
    with pytest.raises(ValueError, match="exported with fp32"):
        scavenge.load_detector(file, precision="bf16")
    with pytest.raises(ValueError, match="was exported for the CPU"):
        scavenge.load_detector(file, device="cuda")
    with pytest.raises(ValueError, match="gives features alone"):
        scavenge.load_backbone(place / "runs/backbone/eval_export/backbone.pt2").stages([])
