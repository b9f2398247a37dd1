"""The benchmark of a training step runs for every method, and counts its passes."""

import pytest
import torch

import train_ssl
from benchmarks.train_step import CONFIGS, measure
from models.ssl import SSL_METHODS
from runtime import config

FAST = "dino", "moco_v2"


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SSL_METHODS])
def test_every_method_has_a_row(name):
    words = CONFIGS.get(name, [f"configs/{name}_cifar10.yaml"])
    small = ["batch_size=8", "precision=fp32", "backbone=resnet18", "backbone.stem=imagenet"]
    small += ["method.splits=1"] if name == "moco_v2" else []
    row = measure(config.load(train_ssl.Config, [*words, *small]), torch.device("cpu"), 1)
    with_gradient, without = row[1].split(" + ")
    assert row[0] == name and len(row) == 10
    assert float(with_gradient) == {"triplet": 3, "patch_position": 9, "revd": 1, "moco_v2": 1, "psco": 1}.get(name, 2)
    assert float(without) == {"dino": 2, "moco_v2": 1, "moco_v3": 2, "byol": 2, "psco": 1}.get(name, 0)
    assert all(float(metric.rstrip("%").replace(",", "")) >= 0 for metric in row[3:8])
