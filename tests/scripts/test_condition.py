"""Every trained detector finds the demo's defects better than the distance of the same backbone's embedding."""

import json

import pytest

import sweep
from data.demo import generate

BASELINES = {  # the embedding at the size, or of the shots, that the detector has
    "rd4ad": "embedding_128",
    "cdo": "embedding_64",
    "cflow": "embedding_128",
    "cutpaste": "embedding_96",
    "nsa": "embedding_64",
    "regad_4_shots": "embedding_4_shots",
}
CLEARLY = 0.05  # image AUROC


@pytest.mark.slow
def test_trained_detectors_beat_the_embedding(real_weights, tmp_path):
    generate(tmp_path / "demo")
    weights = f"backbone.weights={real_weights}/mobilenet_v2_imagenet.pth"
    words = [f"also=data.root={tmp_path}/demo/condition", f"runs={tmp_path}"]
    sweep.main(["configs/sweep_condition.yaml", *words, f"pretraining.imagenet=backbone.name=mobilenet_v2 {weights}"])

    def auroc(task: str, detector: str) -> float:
        file = tmp_path / "condition" / task / detector / "imagenet" / "results.json"
        return json.loads(file.read_text())["image_auroc"]

    for detector, baseline in BASELINES.items():
        for task in ("liner", "rings"):
            assert auroc(task, detector) > auroc(task, baseline) + CLEARLY, (task, detector)
