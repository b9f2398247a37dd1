"""Trained detectors and subspace find the demo's defects better than the distance of the same backbone's embedding."""

import json

import pytest

import sweep
import train_anomaly
from data.demo.generate import generate

BASELINES = {  # the backbone, and the embedding at the size, or of the shots, that the detector has
    "rd4ad": ("imagenet", "embedding_128"),
    "cdo": ("imagenet", "embedding_64"),
    "cflow": ("imagenet", "embedding_128"),
    "subspace": ("imagenet", "embedding_128"),
    "cutpaste": ("imagenet", "embedding_96"),
    "nsa": ("random", "embedding_64"),  # its paper trains from random weights, too
    "regad_4_shots": ("random", "embedding_4_shots"),
}
CLEARLY = 0.05  # image AUROC


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    generate(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", ["liner", "rings"])
@pytest.mark.parametrize("detector", BASELINES)
def test_detectors_beat_the_embedding(detector, task, demo, real_weights, tmp_path):
    """Of the sweep in configs/ the two cells that are compared."""
    backbone, baseline = BASELINES[detector]
    weights = f"backbone.weights={real_weights}/mobilenet_v2_imagenet.pth"
    words = [f"also=data.root={demo}/condition", f"runs={tmp_path}"]
    words += [f"pretraining.imagenet=backbone.name=mobilenet_v2 {weights}"]
    _, cells = sweep.plan(sweep.load(["configs/sweeps/condition.yaml", *words]))
    words_of = {cell.name: cell.words for cell in cells}

    def auroc(name: str) -> float:
        cell = f"{task}/{name}/{backbone}"
        train_anomaly.main(words_of[cell][1:])
        return json.loads((tmp_path / "condition" / cell / "results.json").read_text())["image_auroc"]

    assert auroc(detector) > auroc(baseline) + CLEARLY
