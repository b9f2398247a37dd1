"""train_anomaly.py and predict.py on MVTec LOCO AD and MVTec AD 2: sPRO, thresholds of `validation`, a submission."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_anomaly
from runtime.errors import UserError
from tests.data.datasets.layouts import write_ad2, write_loco
from tests.evaluation.anomaly.test_submission import read_tiff

SMALL = ["backbone=mobilenet_v2", "backbone.width=0.25", "detector=patchcore", "data.size=32", "device=cpu"]


@pytest.mark.slow
def test_loco(tmp_path, capsys):
    write_loco(tmp_path / "box", size=40)
    words = ["data=mvtec_loco", f"data.root={tmp_path}", "data.category=box", f"runs={tmp_path}", "run_name=run"]
    train_anomaly.main([*words, *SMALL])
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert results["n_train"] == 6 and results["n_normals"] == 4  # all of `train`; thresholds of `validation`
    assert f"data: validation of {tmp_path}: 4 images (4 good)" in err
    kinds = results["per_defect"]
    assert list(kinds) == ["logical_anomalies", "structural_anomalies"]
    for key in ("spro_005", "spro_001", "spro_100"):
        assert results[key] == pytest.approx(np.mean([kind[key] for kind in kinds.values()]))
    assert results["image_auroc_mean"] == pytest.approx(np.mean([kind["image_auroc"] for kind in kinds.values()]))
    assert "sPRO to a rate of 0.05, each against the good images: mean: " in err
    assert results["aupimo"] is None and "AUPIMO: none, for the good test images have fewer than 100,000 pixels" in err
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["validation"] == [f"box/validation/good/{i:03}.png" for i in range(4)]
    train_anomaly.main([*words[:-1], "run_name=left_out", "holdout=0", *SMALL])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n_normals"] == 6  # as the user says


def test_submission_of_ad2(tmp_path, capsys):
    write_ad2(tmp_path / "can", size=40)
    words = ["data=mvtec_ad2", f"data.root={tmp_path}", "data.category=can", f"runs={tmp_path}", "run_name=run"]
    train_anomaly.main([*words, *SMALL])
    sent = tmp_path / "sent"
    for split in ("test_private", "test_private_mixed"):
        place = [str(tmp_path / "can" / split), f"out={tmp_path / split}", f"submission={sent}"]
        predict.main([str(tmp_path / "run"), *place, "device=cpu"])
    files = sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file())
    stems = ["can/test_private/000_regular", "can/test_private/001_regular", "can/test_private_mixed/000_mixed"]
    folders = ("anomaly_images", "anomaly_images_thresholded")
    assert files == [f"{folders[0]}/{stem}.tiff" for stem in stems] + [f"{folders[1]}/{stem}.png" for stem in stems]
    calibration = torch.load(tmp_path / "run/last.pt", weights_only=True)["calibration"]
    low, high = calibration["low"], calibration["high"]
    for stem in stems:
        values = read_tiff((sent / f"{folders[0]}/{stem}.tiff").read_bytes()).astype(np.float64) * (high - low) + low
        with Image.open(sent / f"{folders[1]}/{stem}.png") as png:
            above = np.array(png)
        assert values.shape == above.shape == (40, 40) and set(np.unique(above)) <= {0, 255}
        clear = np.abs(values - calibration["pixel_threshold"]) > 0.01 * (high - low)  # float16 is coarse
        assert ((values > calibration["pixel_threshold"]) == (above == 255))[clear].all() and clear.any()
    with open(tmp_path / "test_private/predictions.csv") as file:
        assert len(list(csv.DictReader(file))) == 2
    capsys.readouterr()
    public = [str(tmp_path / "can/test_public"), f"out={tmp_path / 'public'}", f"submission={sent}", "device=cpu"]
    with pytest.raises(UserError, match="lies in no folder <object>/test_private or test_private_mixed of MVTec AD 2"):
        predict.main([str(tmp_path / "run"), *public])
    assert not (tmp_path / "public").exists()
