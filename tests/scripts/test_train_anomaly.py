"""train_anomaly.py with each kind of detector: results, killed and resumed, under torchrun, thresholds, errors."""

import json

import pytest
import torch

import train_anomaly
from tests.pictures import script, write_mvtec
from tests.scripts.test_train_ssl import kill_after
from training.errors import UserError

TINY = {
    "embedding": ["configs/embedding_demo.yaml"],
    "patchcore": ["configs/patchcore_demo.yaml"],
    "rd4ad": ["configs/rd4ad_demo.yaml", "epochs=4", "save_every=3", "log_every=1"],
}
METRICS = ["image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro", "aupro_005", "threshold"]
COUNTS = ["n_train", "n_test_normal", "n_test_anomalous"]
KEYS = METRICS + COUNTS + ["seconds_fit", "images_per_second"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("pictures"))


def words(name, pictures, runs, *more):
    about = [f"data.root={pictures}", "data.category=part", "data.size=64", f"runs={runs}", "run_name=run"]
    return TINY[name] + about + ["batch_size=4", "holdout=0.2", "device=cpu", *more]


@pytest.mark.parametrize("name", TINY)
def test_a_run_leaves_everything_behind(name, pictures, tmp_path, capsys):
    train_anomaly.main(words(name, pictures, tmp_path))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "run"
    assert results == json.loads((folder / "results.json").read_text())
    assert set(KEYS) <= set(results)
    assert (results["n_train"], results["n_test_normal"], results["n_test_anomalous"]) == (10, 4, 4)
    low, high = results["image_auroc_interval"]
    assert low <= results["image_auroc"] <= high
    assert results["per_defect"]["spot"]["n"] == 4
    assert (results["aupro"] is None) == (name == "embedding")
    assert (folder / "heatmaps.png").exists() == (name != "embedding")
    if name != "embedding":
        assert results["pixel_auroc"] > 0.8  # a bright square in noise is no riddle, even for random weights
    train_anomaly.main(words(name, pictures, tmp_path))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results


@pytest.mark.parametrize("name", ["patchcore", "rd4ad"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(name, pictures, tmp_path):
    first = script(["train_anomaly.py", *words(name, pictures, tmp_path / "a")])
    again = ["train_anomaly.py", *words(name, pictures, tmp_path / "b")]
    folder = tmp_path / "b" / "run"
    if name == "rd4ad":
        kill_after(again, folder / "metrics.jsonl", 5)  # the checkpoint is of step 3
        assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    else:  # fitted in one pass: what remains after a kill is nothing, or the fitted detector without results
        script(again)
        (folder / "results.json").unlink()
    second = script(again)
    whole, resumed = (torch.load(tmp_path / x / "run" / "last.pt", weights_only=True) for x in "ab")
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    for key in METRICS + COUNTS:
        assert first[key] == second[key]


@pytest.mark.parametrize("name", ["patchcore", "rd4ad"])
def test_two_processes(name, pictures, tmp_path):
    results = script(["train_anomaly.py", *words(name, pictures, tmp_path / "two")], processes=2)
    assert set(KEYS) <= set(results)
    if name == "patchcore":  # no batch norm in training: two processes are one
        one = script(["train_anomaly.py", *words(name, pictures, tmp_path / "one")])
        states = [torch.load(tmp_path / x / "run" / "last.pt", weights_only=True) for x in ("one", "two")]
        torch.testing.assert_close(states[0]["model"]["bank"], states[1]["model"]["bank"])
        for key in METRICS:
            assert results[key] == pytest.approx(one[key], abs=1e-5)


def test_without_held_out_normals_there_is_no_threshold(pictures, tmp_path, capsys):
    train_anomaly.main(words("patchcore", pictures, tmp_path, "holdout=0"))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["threshold"] is None and results["n_train"] == 12 and results["image_auroc"] is not None


def test_mistakes_are_one_line(pictures, tmp_path):
    def error(name, *more):
        with pytest.raises(UserError) as caught:
            train_anomaly.main(words(name, pictures, tmp_path, *more))
        return str(caught.value)

    assert "did you mean 'coreset'" in error("patchcore", "detector.corset=0.1")
    assert "one of: embedding, patchcore, rd4ad" in error("patchcore", "detector.name=padim")
    assert "nothing" in error("patchcore", "data.category=nothing")
    assert "decoder for resnet18, resnet34" in error("rd4ad", "backbone.name=mobilenet_v2")
    assert "needs an optim section" in error("patchcore", "detector=rd4ad")
    assert "cannot read nowhere.pt" in error("patchcore", "backbone.weights=nowhere.pt")
