"""The hash against plain-integer splitmix64, and the quality of its numbers where neighbors would show."""

import pytest
import torch
from scipy import stats

from data.augment import random_numbers
from data.augment.mixing import Mix, MixConfig
from data.augment.patch_grid import PatchGrid
from data.augment.random_numbers import KINDS, stream, uniform
from data.augment.views import Augment, View
from data.corruptions import CORRUPTIONS, corrupt
from data.defects import DEFECTS
from models.anomaly.detector import TrainingBatch
from models.anomaly.nsa import NSA
from models.backbones.resnet import ResNet18
from runtime.memory import send
from tests.models.anomaly import test_by_gradient as detectors

MASK = (1 << 64) - 1


def step(state: int) -> int:
    """splitmix64 in Python integers: the output for a state that is still to be incremented."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_oracle_is_splitmix64():
    state, stream = 1234567, []
    for _ in range(3):
        stream.append(step(state))
        state += 0x9E3779B97F4A7C15
    assert stream == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published test vector


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (3, 17, 1, 123456789), (-1, 2**62, 5, -7)])
def test_equals_plain_integers(key):
    state = 0
    for part in key:
        state = step(state ^ (part & MASK))
    expected = [(step(state + draw * 0x9E3779B97F4A7C15) >> 40) / 2**24 for draw in range(5)]
    assert uniform(key, 5)[0].tolist() == expected
    assert uniform((*key[:3], torch.tensor([9, key[3]])), 5)[1].tolist() == expected


@pytest.mark.parametrize("key", [(0, 0), (3, 17, -5), (-1, 2**62, 123456789)])
def test_the_stream_on_a_device_is_the_same(key):
    ids = torch.cat([torch.randint(-(2**62), 2**62, (40,)), torch.arange(3)])
    numbers = stream((*key, ids), 300, torch.device("cpu"))
    assert torch.equal(numbers.double() / 2**24, uniform((*key, ids), 300))
    assert stream((0, ids[:0]), 5, torch.device("cpu")).shape == (0, 5)


def test_rows_do_not_depend_on_the_batch_nor_on_later_draws():
    ids = torch.randint(0, 10**6, (50,))
    every = uniform((1, 2, ids), 6)
    assert torch.equal(every.flip(0), uniform((1, 2, ids.flip(0)), 6))
    assert torch.equal(every[7:8], uniform((1, 2, ids[7:8]), 6))
    assert torch.equal(every[:, :2], uniform((1, 2, ids), 2))
    assert uniform((1, 2, ids[:0]), 6).shape == (0, 6)


def test_uniform_in_the_half_open_interval():
    numbers = uniform((0, 0, torch.arange(20000)), 4)
    assert numbers.min() >= 0 and numbers.max() < 1 and numbers.float().max() < 1
    for draw in numbers.T:
        assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("part", ["seed", "epoch", "view", "id"])
def test_neighboring_keys_are_independent(part):
    ids = torch.arange(20000)
    zero = torch.zeros_like(ids)
    here = {"seed": zero, "epoch": zero, "view": zero, "id": ids} | {part: ids}
    for distance in (1, 2, 256):
        there = here | {part: ids + distance}
        first, second = (uniform(tuple(key.values()), 3) for key in (here, there))
        for a, b in [(0, 0), (0, 1), (2, 2)]:
            x, y = first[:, a].numpy(), second[:, b].numpy()
            assert stats.pearsonr(x, y).pvalue > 1e-3
            assert stats.kstest((y - x) % 1, "uniform").pvalue > 1e-3  # a shift would pass the correlation


def test_draws_of_a_row_are_independent():
    numbers = uniform((5, 1, 0, torch.arange(20000)), 8)
    correlation = torch.corrcoef(numbers.T) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / 20000**0.5


def test_parts_do_not_commute():
    values = {uniform(key, 1).item() for key in [(1, 2, 3), (3, 2, 1), (2, 1, 3), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3)]}
    assert len(values) == 6


def test_send_to_the_cpu_is_the_identity():
    numbers = torch.rand(3)
    assert send(numbers, torch.device("cpu")) is numbers


def test_no_two_kinds_draw_the_same_numbers():
    names = {}
    for name, key in KINDS.items():
        names.setdefault(key, []).append(name)
    assert [twice for twice in names.values() if len(twice) > 1] == [["patches_noise", "cutpaste_good"]]
    for alone in ("cflow", "corruption"):  # a stage or a layer follows it
        assert [name for name, key in KINDS.items() if key[:1] == KINDS[alone]] == [alone]


def test_all_that_is_drawn_is_in_the_table(monkeypatch):
    """Every recipe, defect and detector that draws for an image: what follows its number in the keys they absorb."""
    absorbed = set()
    absorb = random_numbers.absorb

    def note(key):
        if len(key) > 3:  # RegAD's is shorter
            absorbed.add((len(key), *key[4:]))
        return absorb(key)

    monkeypatch.setattr(random_numbers, "absorb", note)
    images, ids = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.arange(2)
    Augment([View(16, operations=1)], 0)(images, ids, 0)
    PatchGrid(0, size=12, gap=2, jitter=1)(images, ids, 0)
    Mix(MixConfig(mixup=1.0), 0)(images.float(), torch.eye(2), ids, 0)
    for make in DEFECTS.values():
        make()(images, ids, 0, seed=0)
    for skipping in (DEFECTS["nsa"](background=(0.0, 1.0)), DEFECTS["noise"](skip_background=True)):
        skipping(images, ids, 0, seed=0)
    batch = TrainingBatch(images, torch.zeros(2, dtype=torch.int64), ids, 0, 0)
    for detector in (*map(detectors.build, detectors.NAMES), NSA(ResNet18(), turn=5.0)):
        list(detector.steps(batch))
    for name in CORRUPTIONS:
        corrupt(images[:, :, :24, :24], ids, name, 1, seed=0)
    stages = {(6, *KINDS["cflow"], stage) for stage in (2, 3)}
    stages |= {(6, *KINDS["corruption"], layer) for layer in (0, 1, 2)}
    assert absorbed == {(4 + len(key), *key) for key in KINDS.values()} | stages
