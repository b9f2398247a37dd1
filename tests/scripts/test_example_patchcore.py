"""examples/patchcore.py: its scores and maps are those of train_anomaly.py, and it runs as its first lines say."""

import csv

import pytest
import torch

import train_anomaly
from data.image_files import find_images
from data.images import decode
from examples import patchcore
from models.anomaly import DETECTORS
from models.backbones.resnet import ResNet18
from tests.images import write_mvtec


def test_its_scores_and_maps_are_those_of_the_script(tmp_path):
    images = write_mvtec(tmp_path)
    words = ["configs/demo/patchcore_demo.yaml", f"data.root={images}", "data.category=part", "data.size=64"]
    words += ["holdout=0", "batch_size=16", "device=cpu", f"runs={tmp_path}", "run_name=run"]
    train_anomaly.main(words)
    with open(tmp_path / "run" / "test_scores.csv") as file:
        expected = {row["path"]: float(row["score"]) for row in csv.DictReader(file)}

    torch.manual_seed(0)
    backbone = ResNet18().eval()
    normal, paths = find_images(images / "part/train/good"), find_images(images / "part/test")
    bank = patchcore.fit(backbone, torch.stack([decode(path, 64) for path in normal]))
    tested = torch.stack([decode(path, 64) for path in paths])
    scores, maps = patchcore.score(backbone, bank, tested)
    assert {*paths} == {*expected}
    assert dict(zip(paths, scores.tolist())) == pytest.approx(expected, rel=1e-5)

    detector = DETECTORS["patchcore"](ResNet18())
    detector.load_state_dict(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"])
    torch.testing.assert_close(bank, detector.bank.entries, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps, detector.score(patchcore.normalize(tested))[0], rtol=1e-4, atol=1e-5)


def test_it_prints_the_most_anomalous_image_first(tmp_path, monkeypatch, capsys):
    images = write_mvtec(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patchcore, "SIZE", 64)
    patchcore.main(str(images / "part/train/good"), str(images / "part/test"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("/spot/" in line for line in lines[:4])
    assert (tmp_path / "most_anomalous.png").exists()
