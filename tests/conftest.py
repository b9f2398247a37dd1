"""Fixtures shared by all tests: fixed seeds, one thread count, and the real data when `.ci/run` names its folder."""

import runtime.threads  # before torch

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """Folder with magnetic_tile/, neu_steel/ and cifar10.tar.xz, from the environment variable SCAVENGE_DATA."""
    if "SCAVENGE_DATA" not in os.environ:
        pytest.skip("real images are not in the repository; set SCAVENGE_DATA to their folder")
    return Path(os.environ["SCAVENGE_DATA"])


@pytest.fixture
def real_weights() -> Path:
    """Folder with mobilenet_v2_imagenet.pth, from the environment variable SCAVENGE_WEIGHTS."""
    if "SCAVENGE_WEIGHTS" not in os.environ:
        pytest.skip("ImageNet weights are not in the repository; set SCAVENGE_WEIGHTS to their folder")
    return Path(os.environ["SCAVENGE_WEIGHTS"])
