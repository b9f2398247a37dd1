"""The programs in examples/ have the loss of the scripts at every step, bit for bit."""

import json

import pytest
import torch

import examples.classifier
import examples.dino
import examples.simclr
import train_classifier
import train_ssl
from models.backbones.resnet import ResNet18
from models.weights.load import load_weights
from runtime import checkpoint
from runtime.config import overlay
from tests.images import write_classes
from tests.slow import leaving

EXAMPLES = {
    "simclr": (examples.simclr.train, {"crop": 24, "lr": 0.01}, ["augment.size=24", "optim.lr=0.01"]),
    "dino": (
        examples.dino.train,
        {"crop": 24, "local_crop": 16, "prototypes": 32},
        ["augment.size=24", "augment.local_crops=2", "augment.local_size=16", "method.prototypes=32"],
    ),
}


@pytest.mark.parametrize("name", leaving(["dino"], EXAMPLES))
def test_an_example_has_the_script_s_loss_at_every_step(name, tmp_path, monkeypatch):
    """Its defaults are those of the YAML, so only sizes are given; the second epoch is past the warm-up."""
    train, options, words = EXAMPLES[name]
    images = write_classes(tmp_path / "images")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    same = {"size": 36, "batch_size": 12, "epochs": 2}
    losses = train(str(images), str(tmp_path / "backbone.pth"), **same, **options)
    about = [f"data.root={images}", f"runs={tmp_path}", "run_name=run", "holdout=0", "device=cpu"]
    about += ["data.size=36", "batch_size=12", "epochs=2"]
    train_ssl.main(overlay([f"configs/demo/{name}_demo.yaml"], words, about))
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == [point["loss"] for point in points] and len(losses) == 6 and losses[0] != losses[-1]
    load_weights(ResNet18(), tmp_path / "backbone.pth")


@pytest.mark.parametrize("imported", leaving([True], [False, True]))
def test_the_classifier_has_the_script_s_losses_and_accuracy(imported, tmp_path, monkeypatch):
    """The first epoch is the head's alone. From random and from imported weights."""
    images = write_classes(tmp_path / "images")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights, words = None, ["holdout=0", "data.size=36", "augment.size=36", "batch_size=12", "epochs=3"]
    if imported:
        torch.manual_seed(7)
        weights = str(tmp_path / "weights.pth")
        torch.save(ResNet18().state_dict(), weights)
        words.append(f"backbone.weights={weights}")
    out = str(tmp_path / "backbone.pth")
    losses, accuracy = examples.classifier.train(str(images), out, weights, size=36, batch_size=12, epochs=3)
    about = [f"data.root={images}", f"runs={tmp_path}", "run_name=run", "device=cpu"]
    train_classifier.main(overlay(["configs/demo/classifier_demo.yaml"], words, about))
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses == [point["loss"] for point in points] and len(losses) == 9 and losses[0] != losses[-1]
    assert accuracy == json.loads((tmp_path / "run" / "results.json").read_text())["top1"]
    backbone = checkpoint.load(tmp_path / "run")["model"]
    for name, value in torch.load(out, weights_only=True).items():
        assert torch.equal(value, backbone[f"backbone.{name}"]), name


def test_examples_are_short():
    """To copy and to read: 100 lines or fewer each."""
    for example in (examples.simclr, examples.dino, examples.classifier):
        with open(example.__file__, encoding="utf-8") as file:
            assert len(file.readlines()) <= 100
