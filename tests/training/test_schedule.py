"""Curves against official DINO's array form, written out here with numpy."""

import numpy as np
import pytest
import torch

from models.backbones.resnet import ResNet18
from models.ssl.dino import DINO
from runtime.errors import UserError
from training.optim import OptimConfig
from training.schedule import (
    check_lengths,
    linear_then_constant,
    warmup_constant,
    warmup_cosine,
    warmup_cosine_7_16,
    warmup_exponential,
    warmup_steps,
)


def official_cosine(start, end, total, warmup):
    rest = np.arange(total - warmup)
    curve = end + 0.5 * (start - end) * (1 + np.cos(np.pi * rest / len(rest)))
    return np.concatenate([np.linspace(0, start, warmup), curve])


@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_warmup_cosine_equals_the_official_array(warmup):
    ours = [warmup_cosine(i, 57, start=0.3, end=1e-3, warmup=warmup) for i in range(57)]
    np.testing.assert_allclose(ours, official_cosine(0.3, 1e-3, 57, warmup), rtol=1e-12)


def test_landmarks():
    assert warmup_cosine(0, 100, start=1.0, warmup=10) == 0.0
    assert warmup_cosine(9, 100, start=1.0, warmup=10) == 1.0
    assert warmup_cosine(10, 100, start=1.0, warmup=10) == 1.0
    assert 0.1 < warmup_cosine(99, 100, start=1.0, end=0.1) < 0.101


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_7_16_equals_torchs_lambda_of_the_official_formula(warmup):
    """TorchSSL's get_cosine_schedule_with_warmup, num_cycles 7/16; our warm-up is the others'."""
    optimizer, expected = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.03), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(np.pi * 7 / 16 * step / 33))
    for _ in range(33):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    config = OptimConfig(name="sgd", lr=0.03, schedule="cosine_7_16", warmup_epochs=warmup / 2)
    ours = [config.lr_at(i, 33 + warmup, 2, 16) for i in range(33 + warmup)]
    np.testing.assert_allclose(ours, [*np.linspace(0, 0.03, warmup), *expected], rtol=1e-12)
    assert warmup_cosine_7_16(10**6, 10**6, start=1.0) == pytest.approx(0.19509, abs=1e-5)


def test_constant_and_steps():
    assert [warmup_constant(i, 9, start=2.0, warmup=3) for i in (0, 1, 2, 8)] == [0.0, 1.0, 2.0, 2.0]
    steps = [warmup_steps(i, 10, start=1.0, at=(0.6, 0.8)) for i in range(10)]
    np.testing.assert_allclose(steps, [1.0] * 6 + [0.1] * 2 + [0.01] * 2)


def test_exponential_equals_torchs_and_the_config_names_steps_and_decay():
    ours = [warmup_exponential(i, 12, start=0.4, epoch_steps=3, factor=0.95) for i in range(12)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, expected = torch.optim.SGD([parameter], lr=0.4), []
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    for _ in range(4):
        expected += 3 * [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert [warmup_exponential(i, 9, start=2.0, epoch_steps=9, factor=0.5, warmup=3) for i in (0, 1, 2, 3)] == [
        0,
        1,
        2,
        2,
    ]
    config = OptimConfig(name="adamw", lr=0.4, schedule="exponential")
    np.testing.assert_allclose([config.lr_at(i, 12, 3, 16) for i in range(12)], expected, rtol=1e-12)
    config = OptimConfig(name="adam", lr=1.0, schedule="steps", steps=(0.8,))
    np.testing.assert_allclose([config.lr_at(i, 10, 1, 16) for i in (0, 7, 8, 9)], [1, 1, 0.1, 0.1])


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8])
def test_teacher_temperature_is_linspace_then_constant(length):
    """The official DINOLoss; of a warm-up of one epoch numpy's linspace has the start alone."""
    expected = np.concatenate([np.linspace(0.04, 0.07, length), [0.07] * (8 - length)])
    ours = [linear_then_constant(epoch, start=0.04, end=0.07, length=length) for epoch in range(8)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_warmup_of_one_epoch_begins_at_the_start_value():
    method = DINO(ResNet18(), prototypes=8, warmup_teacher_epochs=1, teacher_temperature=0.07)
    seen = []
    for epoch in range(3):
        method.set_epoch(epoch)
        seen.append(method.teacher_temperature.item())
    assert seen == pytest.approx([0.04, 0.07, 0.07])


def test_differences_from_other_codes_are_as_written_down():
    """schedule.py: i / (W - 1) here and i / W there; a cosine per epoch is higher by half an epoch on average."""
    assert [warmup_constant(i, 100, start=1.0, warmup=5) for i in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    ours = np.array([warmup_cosine(i, 400, start=1.0) for i in range(400)])
    per_epoch = np.repeat([0.5 * (1 + np.cos(np.pi * epoch / 10)) for epoch in range(10)], 40)
    assert (per_epoch >= ours).all()
    lag = (np.arccos(2 * ours - 1) - np.arccos(2 * per_epoch - 1)) / np.pi * 10  # in epochs
    assert lag.mean() == pytest.approx(0.5, abs=0.02)


def test_config_scales_with_the_batch_and_warms_up_in_epochs():
    optim = OptimConfig(name="sgd", lr=0.3, lr_scaling="linear", warmup_epochs=2, weight_decay=0.04)
    assert optim.lr_at(19, 100, 10, 512) == pytest.approx(0.6)
    assert optim.weight_decay_at(50, 100) == 0.04
    optim.final_weight_decay = 0.4
    assert optim.weight_decay_at(50, 100) == pytest.approx(0.22)


@pytest.mark.parametrize(
    ("epochs", "lengths", "message"),
    [
        (
            2,
            {"optim.warmup_epochs": 10.0},
            "optim.warmup_epochs=10 is longer than epochs=2: set optim.warmup_epochs=0.2",
        ),
        (
            25,
            {"optim.warmup_epochs": 25.5, "method.warmup_teacher_epochs": 30, "method.freeze_last_layer": 1},
            "optim.warmup_epochs=25.5 and method.warmup_teacher_epochs=30 are longer than epochs=25: "
            "set optim.warmup_epochs=2.5 method.warmup_teacher_epochs=2",
        ),
    ],
)
def test_parts_longer_than_the_run_are_an_error(epochs, lengths, message):
    with pytest.raises(UserError) as caught:
        check_lengths(epochs, lengths)
    assert str(caught.value) == message


def test_parts_as_long_as_the_run_are_none():
    check_lengths(1, {"optim.warmup_epochs": 1.0, "method.freeze_last_layer": 1, "nothing": 0})
