"""One detector of several categories: train_anomaly.py, predict.py and scavenge.py on them."""

import csv
import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import predict
import scavenge
import train_anomaly
from runtime import config
from runtime.errors import UserError
from tests.data.datasets.layouts import write_ad2
from tests.images import write_mvtec
from tests.processes import kill_script, script
from tests.slow import leaving

NAMES = ("part", "tile")
DETECTORS = {
    "patchcore": ["configs/demo/patchcore_demo.yaml"],
    "padim": ["configs/demo/padim_demo.yaml", "holdout=0.2"],
    "rd4ad": ["configs/demo/rd4ad_demo.yaml", "epochs=2", "save_every=3", "log_every=1", "batch_size=4"],
    "tiles": ["configs/demo/patchcore_demo.yaml", "data.tile=32", "data.overlap=0", "holdout=0.2"],
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.anomaly.bootstrap.REPLICATES", 20)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, size in zip(NAMES, (48, 56)):
        write_mvtec(root, category=name, size=size)
    return root


def words(name, images, runs, *more):
    about = [f"data.root={images}", "data.category=all", "data.size=32", "device=cpu", f"runs={runs}", "run_name=run"]
    return config.overlay(DETECTORS[name], about, list(more))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run of PatchCore, and its results."""
    runs = tmp_path_factory.mktemp("runs")
    train_anomaly.main(words("patchcore", images, runs))
    return runs / "run", json.loads((runs / "run/results.json").read_text())


def rows_of(folder):
    with open(folder / "test_scores.csv") as file:
        return list(csv.DictReader(file))


def agrees_with_scikit_learn(folder, results):
    """Each category's image metrics and alarms, from its rows of test_scores.csv."""
    rows = rows_of(folder)
    assert list(results["per_category"]) == [*NAMES] and len(rows) == 16
    for name, own in results["per_category"].items():
        mine = [row for row in rows if row["category"] == name]
        assert all(f"/{name}/test/" in row["path"] for row in mine)
        assert {row["defect"] for row in mine} == {"good", f"{name}/spot"}
        labels, scores = ([kind(row[key]) for row in mine] for key, kind in (("label", int), ("score", float)))
        assert own["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert own["image_ap"] == pytest.approx(average_precision_score(labels, scores))
        low, high = own["image_auroc_interval"]
        assert low <= own["image_auroc"] <= high and own["aupro_interval"] is not None
        for key, threshold in (("", own["threshold"]), ("category_", own["category_threshold"])):
            alarms = [score > threshold for score, label in zip(scores, labels) if not label]
            assert own[f"{key}observed_false_alarms"] == np.mean(alarms)
        assert all(int(row["is_anomalous"]) == (float(row["score"]) > results["threshold"]) for row in mine)
    for key in ("image_auroc", "image_ap", "pixel_auroc", "aupro", "segmentation_f1"):
        values = [own[key] for own in results["per_category"].values()]
        assert results[f"{key}_category_mean"] == pytest.approx(np.mean(values))


def test_a_bank_of_two_categories(images, run, capsys):
    folder, results = run
    agrees_with_scikit_learn(folder, results)
    assert (results["n_train"], results["n_normals"], results["n_test_anomalous"]) == (24, 24, 8)
    assert sorted(results["per_defect"]) == ["part/spot", "tile/spot"]
    assert results["per_defect"]["tile/spot"]["image_auroc"] == results["per_category"]["tile"]["image_auroc"]
    train_anomaly.main(words("patchcore", images, folder.parent))  # finished
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    with pytest.raises(UserError, match=r"data\.category"):
        train_anomaly.main(words("patchcore", images, folder.parent, "data.category=part"))


@pytest.mark.parametrize("name", leaving(["padim", "rd4ad"], ["tiles", "padim", "rd4ad"]))
def test_other_detectors_and_tiles(name, images, tmp_path, capsys):
    train_anomaly.main(words(name, images, tmp_path))
    out, err = capsys.readouterr()
    agrees_with_scikit_learn(tmp_path / "run", json.loads(out.splitlines()[-1]))
    table = [line.split("|")[1].strip() for line in err.splitlines() if line.startswith("|")]
    assert table[table.index("category") + 2 :] == [*NAMES, "mean", "all together"]


@pytest.mark.slow
def test_two_processes_are_one(images, run, tmp_path):
    _, one = run
    two = script(["train_anomaly.py", *words("patchcore", images, tmp_path)], processes=2)
    agrees_with_scikit_learn(tmp_path / "run", two)
    for name, own in one["per_category"].items():
        for key in ("image_auroc", "pixel_auroc", "threshold", "category_threshold", "n_test_normal"):
            assert two["per_category"][name][key] == pytest.approx(own[key], abs=1e-5), (name, key)


@pytest.mark.slow
def test_killed_and_resumed(images, tmp_path):
    first = script(["train_anomaly.py", *words("rd4ad", images, tmp_path / "a")])
    kill_script(["train_anomaly.py", *words("rd4ad", images, tmp_path / "b")], tmp_path / "b/run/metrics.jsonl", 5)
    again = script(["train_anomaly.py", *words("rd4ad", images, tmp_path / "b")])
    assert again["per_category"] == first["per_category"]


@pytest.mark.slow
def test_a_category_is_added_to_a_bank_of_one(images, tmp_path, capsys):
    train_anomaly.main(words("patchcore", images, tmp_path, "data.category=part", "run_name=one"))
    results = json.loads((tmp_path / "one/results.json").read_text())
    assert "per_category" not in results and "category" not in rows_of(tmp_path / "one")[0]
    with pytest.raises(UserError, match="a run of one category, which needs no name"):
        scavenge.load_detector(tmp_path / "one", category="part", device="cpu")
    train_anomaly.main(words("patchcore", images, tmp_path, f"update={tmp_path / 'one'}/last.pt"))
    out, err = capsys.readouterr()
    assert "update: 12 images added, 0 removed, 24 in all" in err
    agrees_with_scikit_learn(tmp_path / "run", json.loads(out.splitlines()[-1]))


def test_a_new_category_is_another_set(images, run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(images, tmp_path / "set")
    write_mvtec(tmp_path / "set", category="new", size=30)
    with pytest.raises(UserError, match=r"resume=never"):
        train_anomaly.main(words("patchcore", tmp_path / "set", tmp_path))


def test_prediction_by_the_common_threshold_or_a_category_s_own(images, run, tmp_path, capsys):
    folder, results = run
    scores = {row["path"]: float(row["score"]) for row in rows_of(folder)}
    where = images / "part/test"
    for category in (None, *NAMES):
        more = [] if category is None else [f"category={category}"]
        predict.main([str(folder), str(where), f"out={tmp_path / str(category)}", "device=cpu", *more])
        with open(tmp_path / str(category) / "predictions.csv") as file:
            rows = list(csv.DictReader(file))
        limit = results["per_category"][category]["category_threshold"] if category else results["threshold"]
        assert len(rows) == 8 and {float(row["threshold"]) for row in rows} == {limit}
        said = scavenge.load_detector(folder, category=category, device="cpu")([where / row["path"] for row in rows])
        for row, prediction in zip(rows, said):
            assert float(row["score"]) == pytest.approx(scores[str(where / row["path"])], rel=1e-5)
            assert int(row["is_anomalous"]) == (float(row["score"]) > limit) == prediction.is_anomalous
            normals = 12 if category else 24
            assert round(prediction.p_value * (normals + 1)) == pytest.approx(prediction.p_value * (normals + 1))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"category=nut has no thresholds in .*, a run of part, tile"):
        predict.main([str(folder), str(where), f"out={tmp_path / 'nut'}", "category=nut", "device=cpu"])


def test_lightings_of_two_objects_of_ad2(tmp_path, capsys):
    for name in ("can", "vial"):
        write_ad2(tmp_path / name, size=40)
    more = ["data=mvtec_ad2", f"data.root={tmp_path}"]
    train_anomaly.main(words("patchcore", tmp_path, tmp_path, *more))
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert [*results["per_category"]] == ["can", "vial"] and results["n_normals"] == 8  # of `validation`
    assert [*results["per_lighting"]] == ["overexposed", "regular", "shift_1", "underexposed"]
    rows = rows_of(tmp_path / "run")
    for lighting, own in results["per_lighting"].items():
        mine = [row for row in rows if row["lighting"] == lighting]
        assert own["n_test_normal"] + own["n_test_anomalous"] == len(mine) > 0
    assert 0 <= results["segmentation_f1_3sigma"] <= 1 and "| lighting " in err and "| category " in err
