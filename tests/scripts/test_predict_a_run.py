"""predict.py on the test images of a run of train_anomaly.py says what that run said of them."""

import csv
import json
import os

import pytest

import eval as evaluate
import predict
import train_anomaly
from runtime.errors import UserError
from tests.images import write_mvtec


@pytest.mark.slow
def test_scores_alarms_and_neighbors_are_those_of_the_run(tmp_path, capsys):
    root = write_mvtec(tmp_path / "set")
    words = [f"data.root={root}", "data.category=part", "data.size=64", f"runs={tmp_path}", "run_name=run"]
    train_anomaly.main(["configs/demo/patchcore_demo.yaml", *words, "batch_size=4", "device=cpu"])
    os.rename(root, tmp_path / "moved")  # the run folder is all that is needed
    images = tmp_path / "moved" / "part" / "test"
    capsys.readouterr()
    predict.main([str(tmp_path / "run"), str(images), f"out={tmp_path / 'out'}", "batch_size=3", "device=cpu"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    tables = []
    for path in (tmp_path / "run" / "test_scores.csv", tmp_path / "out" / "predictions.csv"):
        with open(path, newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == len(tables[1]) == results["images"] == 8
    for then, now in zip(*tables):
        assert then["path"].endswith(now["path"])
        assert abs(float(then["score"]) - float(now["score"])) < 1e-4
        assert then["is_anomalous"] == now["is_anomalous"]
        assert then["nearest_training_image"].endswith(now["nearest_training_image"])
        assert now["nearest_training_image"].startswith("part/train/good/")
    assert results["anomalous"] == sum(row["is_anomalous"] == "1" for row in tables[0])

    # beside the set lie the run and what predict.py drew: neither is examined
    predict.main([str(tmp_path / "run"), str(tmp_path), f"out={tmp_path / 'tuesday'}", "batch_size=3", "device=cpu"])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["images"] == 12 + 8 + 4  # training and test images, and the masks
    assert "left out 1 file of other kinds (1 .csv" in err and "2 folders of runs and heat maps" in err


def test_a_detector_of_positions_refuses_images_that_would_be_padded(tmp_path):
    root = write_mvtec(tmp_path / "set")
    words = [f"data.root={root}", "data.category=part", "data.size=64", "data.fit=pad", f"runs={tmp_path}"]
    train_anomaly.main(["configs/demo/padim_demo.yaml", *words, "run_name=run", "batch_size=4", "device=cpu"])
    write_mvtec(tmp_path / "wide", width=80, normal=1)
    with pytest.raises(UserError, match="position by position, which padding shifts"):
        predict.main([str(tmp_path / "run"), str(tmp_path / "wide"), f"out={tmp_path / 'out'}", "device=cpu"])
    assert not (tmp_path / "out" / "predictions.csv").exists()


@pytest.mark.slow
def test_a_run_folder_and_its_last_checkpoint_do_alike(tmp_path, capsys):
    """Where a run is asked for and where a checkpoint is: predict.py, update, detector.weights, task=compare."""

    def last(main, *words):
        main(list(words))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    root = write_mvtec(tmp_path / "set")
    about = [f"data.root={root}", "data.category=part", "data.size=32", f"runs={tmp_path}", "device=cpu"]
    run, file = tmp_path / "run", tmp_path / "run" / "last.pt"
    patchcore = ["configs/demo/patchcore_demo.yaml", *about]
    last(train_anomaly.main, *patchcore, "run_name=run")
    for number, (place, path) in enumerate(((run, file), (file, run))):
        found = last(predict.main, str(place), str(root / "part/test"), f"out={tmp_path}/out{number}", "device=cpu")
        assert found["images"] == 8
        updated = last(train_anomaly.main, *patchcore, f"run_name=update{number}", f"update={path}")
        assert updated["image_auroc"] is not None
    assert (tmp_path / "out0/predictions.csv").read_bytes() == (tmp_path / "out1/predictions.csv").read_bytes()
    compared = last(evaluate.main, "task=compare", f"runs={file},{tmp_path}/update0")
    assert compared["task"] == "compare" and (run / "eval_compare" / "results.json").exists()

    rd4ad = ["configs/demo/rd4ad_demo.yaml", *about]
    trained = last(train_anomaly.main, *rd4ad, "run_name=trained", "epochs=1", "batch_size=4")
    tested = last(train_anomaly.main, *rd4ad, "run_name=tested", "epochs=0", f"detector.weights={tmp_path}/trained")
    assert tested["image_auroc"] == trained["image_auroc"]


def test_advice_names_keys_that_predict_has(tmp_path, capsys):
    root = write_mvtec(tmp_path / "set", size=64)
    about = [f"data.root={root}", "data.category=part", f"runs={tmp_path}", "run_name=run", "device=cpu"]
    vit = ["backbone=vit_tiny", "backbone.patch=14", "backbone.size=56", "data.size=56"]
    train_anomaly.main(["configs/demo/patchcore_demo.yaml", *about, *vit])
    images = root / "part" / "test"
    (images / "good" / "broken.png").write_bytes(b"no image")
    out = [str(tmp_path / "run"), str(images), f"out={tmp_path / 'out'}", "device=cpu"]
    predict.main(out)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert "not an image of a known format" in line and "data." not in line
    with pytest.raises(UserError, match=r"tile=192 does not suit the networks of this run: take tile=224"):
        predict.main([*out, "tile=192"])
