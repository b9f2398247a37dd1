"""Every trained detector finds the demo's defects better than the distance of the same backbone's embedding."""

import json

import pytest

import sweep
from data.demo.generate import generate

BASELINES = {  # the backbone, and the embedding at the size, or of the shots, that the detector has
    "rd4ad": ("imagenet", "embedding_128"),
    "cdo": ("imagenet", "embedding_64"),
    "cflow": ("imagenet", "embedding_128"),
    "cutpaste": ("imagenet", "embedding_96"),
    "nsa": ("random", "embedding_64"),  # its paper trains from random weights, too
    "regad_4_shots": ("random", "embedding_4_shots"),
}
CLEARLY = 0.05  # image AUROC


@pytest.mark.slow
def test_trained_detectors_beat_the_embedding(real_weights, tmp_path):
    generate(tmp_path / "demo")
    weights = f"backbone.weights={real_weights}/mobilenet_v2_imagenet.pth"
    words = [f"also=data.root={tmp_path}/demo/condition", f"runs={tmp_path}"]
    sweep.main(["configs/sweeps/condition.yaml", *words, f"pretraining.imagenet=backbone.name=mobilenet_v2 {weights}"])

    def auroc(*cell: str) -> float:
        file = tmp_path.joinpath("condition", *cell, "results.json")
        return json.loads(file.read_text())["image_auroc"]

    for detector, (backbone, baseline) in BASELINES.items():
        for task in ("liner", "rings"):
            assert auroc(task, detector, backbone) > auroc(task, baseline, backbone) + CLEARLY, (task, detector)
