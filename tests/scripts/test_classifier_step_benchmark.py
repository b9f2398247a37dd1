"""The benchmark of a classifier's step runs, with all layers frozen and with all of them learning."""

import pytest
import torch

import train_classifier
from benchmarks.classifier_step import measure
from runtime import config


@pytest.mark.parametrize("count", [0, 19])
def test_a_row(count):
    words = ["configs/classifier_neu.yaml", "batch_size=2", "data.size=33", "augment.size=33", "mix.cutmix=1"]
    row = measure(config.load(train_classifier.Config, words), torch.device("cpu"), count, 1)
    assert row[:3] == ["mobilenet_v2", str(count), "33"] and len(row) == 8
    assert all(float(metric.rstrip("%").replace(",", "")) >= 0 for metric in row[3:])
