"""Each corruption against that of benchmarks/plain_corruptions.py: within a level, given the same random numbers, and
as strong as often with numpy's own."""

from typing import get_args

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import plain_corruptions as plain
from data.augment.random_numbers import stream, uniform
from data.corruptions import BENCHMARK, CORRUPTIONS, EXPOSURES, constants_for, corrupt
from data.corruptions.fields import normal_field, uniform_field
from data.datasets.cifar import Corruption
from tests.pretended_cuda import pretended_cuda

SIZES = {32: (24, 33), 224: (44, 57)}  # of the images that get the constants
KEY = (3, 2, 1, torch.tensor([5, 9]), 10)
CPU = torch.device("cpu")


def images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colors with some texture, black and white corners, and a gray stripe."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5)))
    made = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    made = (made + torch.from_numpy(rng.normal(0, 12, made.shape))).clamp(0, 255)
    made[:, :, :3, :3], made[:, :, -3:, -3:] = 0, 255
    made[:, :, 8] = made[:, :1, 8]
    return made.round().byte()


def field(draw, key, shape):
    """What the batched code drew for its second image, float64."""
    return draw(key, shape, CPU)[1].double().numpy()


def drawn(name: str, size: tuple[int, int], values: tuple) -> dict:
    """The random numbers of the second image as the plain one takes them."""
    height, width = size
    angle = uniform(KEY, 1)[1, 0].item()
    side = 1 << (max(size) - 1).bit_length()
    return {
        "fog": lambda: {"noise": 2 * field(uniform_field, KEY, (side, side)) - 1},
        "motion_blur": lambda: {"angle": -45 + 90 * angle},
        "snow": lambda: {
            "normal": field(normal_field, (*KEY, 0), size),
            "angle": -135 + 90 * uniform((*KEY, 1), 1)[1, 0].item(),
        },
        "spatter": lambda: {"normal": field(normal_field, KEY, size)},
        "elastic_transform": lambda: {
            "moves": 2 * uniform((*KEY, 0), 6)[1].view(3, 2).numpy() - 1,
            "noise": 2 * field(uniform_field, (*KEY, 1), (2, *size)) - 1,
        },
        "glass_blur": lambda: {
            "moves": [
                (stream((*KEY, n), 2 * height * width, CPU)[1] * (2 * values[1]) // 2**24 - values[1])
                .view(2, height, width)
                .numpy()
                for n in range(values[2])
            ]
        },
    }.get(name, dict)()


def of_noise(name: str, x: np.ndarray, amount: float) -> np.ndarray:
    """The four noises, whose plain form is one line each; (H, W, 3)."""
    shape = (3, *x.shape[:2])
    normal = field(normal_field, KEY, shape).transpose(1, 2, 0)
    numbers = field(uniform_field, KEY, shape).transpose(1, 2, 0)
    if name == "impulse_noise":
        return np.where(numbers < amount / 2, 1, np.where(numbers < amount, 0, x))
    if name == "shot_noise":
        return stats.poisson.ppf(np.maximum(numbers, 2**-25), amount * x) / amount
    return x + normal * amount * (x if name == "speckle_noise" else 1)


def expected(name: str, x: np.ndarray, values: tuple) -> np.ndarray:
    if name.endswith("_noise"):
        return of_noise(name, x, *values)
    if name == "gaussian_blur":
        return plain.gaussian(x, *values)
    if name in EXPOSURES:
        return np.clip(((x**2.2) * 2.0 ** values[0]) ** (1 / 2.2), 0, 1)
    return getattr(plain, name)(x, *values, **drawn(name, x.shape[:2], values))


CASES = [(name, size, s) for name in CORRUPTIONS if name != "frost" for size in SIZES for s in range(1, 6)]
QUICK = {(name, size, 5) for name, size, _ in CASES} | {("spatter", 224, 1)}


@pytest.mark.parametrize(
    ("name", "constants", "severity"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES],
)
def test_as_the_plain_one_within_a_level(name, constants, severity):
    pixels = images(2, *SIZES[constants])
    make, at_32, at_224 = CORRUPTIONS[name]
    values = (at_32 if constants == 32 else at_224)[severity - 1]
    found = make(pixels.float() / 255, KEY, *values)[1].clamp(0, 1) * 255
    wanted = np.clip(expected(name, pixels[1].permute(1, 2, 0).double().numpy() / 255, values), 0, 1) * 255
    assert found.shape == (3, *SIZES[constants])
    assert np.abs(found.permute(1, 2, 0).numpy() - wanted).max() <= 1.0
    assert np.abs(found.permute(1, 2, 0).numpy() - wanted).mean() < 0.02


def test_the_pieces_are_cut_off_as_by_numpy():
    pixels = images(2, 20, 20)
    found = corrupt(pixels, torch.arange(2), "contrast", 2, seed=0)
    x = pixels[1].permute(1, 2, 0).double().numpy() / 255
    assert np.array_equal(
        found[1].permute(1, 2, 0).numpy(), np.uint8(np.clip(plain.contrast(x, 0.5), 0, 1) * 255 + 2e-3)
    )


RANDOM = ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "fog"]
RANDOM_SLOW = ["glass_blur", "snow", "elastic_transform", "spatter"]


@pytest.mark.parametrize("name", [*RANDOM, *(pytest.param(name, marks=pytest.mark.slow) for name in RANDOM_SLOW)])
def test_random_ones_are_as_often_so_strong(name):
    """80 times an image: its mean and how far its pixels move, against those with numpy's numbers."""
    pixels, rng = images(1, 16, 20).expand(80, -1, -1, -1), np.random.default_rng(1)
    x = pixels[0].permute(1, 2, 0).double().numpy() / 255
    found = corrupt(pixels, torch.arange(80), name, 3, seed=1).double() / 255  # (80, 3, H, W)
    values = CORRUPTIONS[name].at_32[2]
    wanted = np.stack([np.uint8(np.clip(plain.corrupted(name, x, values, rng), 0, 1) * 255) / 255 for _ in range(80)])
    for measure in (lambda y: y.mean((1, 2, 3)), lambda y: np.abs(y - x).mean((1, 2, 3))):
        pair = measure(found.permute(0, 2, 3, 1).numpy()), measure(wanted)
        assert stats.ks_2samp(*pair).pvalue > 1e-3


def test_normal_and_uniform_fields_are_what_they_say():
    key = (0, 1, 2, torch.arange(50), 10)
    normal, numbers = normal_field(key, (21, 33), CPU), uniform_field(key, (21, 33), CPU)
    assert normal.shape == numbers.shape == (50, 21, 33)
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    both = normal.flatten(1)[:, :692]  # a pair's two numbers are made of the same two
    assert abs(torch.corrcoef(both.unflatten(1, (2, -1)).transpose(0, 1).flatten(1))[0, 1]) < 0.03


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_does_not_depend_on_its_batch(name):
    pixels, ids = images(3, 32, 20), torch.tensor([4, 100, 7])
    together = corrupt(pixels, ids, name, 4, seed=2).int()
    alone = corrupt(pixels[1:2], ids[1:2], name, 4, seed=2).int()
    assert (together[1:2] - alone).abs().max() <= 1 and (together[1:2] != alone).float().mean() < 0.002
    is_random = name in (*RANDOM, *RANDOM_SLOW, "frost")
    same = corrupt(pixels[1:2], torch.tensor([0]), name, 4, seed=2).int()
    other = corrupt(pixels[1:2], ids[1:2], name, 4, seed=3).int()
    for another in (same, other):
        assert torch.equal(another, alone) != is_random


def test_frost_is_the_weighted_sum_of_the_image_and_frost():
    make = CORRUPTIONS["frost"].make
    black, white = make(torch.zeros(2, 3, 40, 30), KEY, 0.7, 0.5), make(torch.ones(2, 3, 40, 30), KEY, 0.7, 0.5)
    torch.testing.assert_close(white - black, torch.full_like(black, 0.7))
    assert black.amin() > 0.1 and black.amax() <= 0.5
    assert (black[:, 2] >= black[:, 0]).all()  # bluish
    assert black.std() > 0.03


def test_all_names_and_constants_are_there():
    assert list(CORRUPTIONS) == [*get_args(Corruption), "overexposure", "underexposure"]
    assert list(BENCHMARK) == list(get_args(Corruption)[:15])
    assert all(len(row) == 5 for one in CORRUPTIONS.values() for row in (one.at_32, one.at_224))
    assert [constants_for(*size) for size in ((32, 32), (64, 300), (65, 65), (224, 224))] == [32, 32, 224, 224]


def test_zoom_blur_has_as_many_zooms_as_the_official_code():
    counts = [[len(np.arange(1, *values)) for values in rows] for rows in CORRUPTIONS["zoom_blur"][1:]]
    assert counts == [[7, 12, 16, 21, 26], [12, 16, 11, 13, 11]]


def test_no_image_and_one_pixel():
    none = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert corrupt(none, torch.empty(0, dtype=torch.int64), "fog", 1, seed=0).shape == none.shape
    one = torch.full((1, 3, 1, 1), 100, dtype=torch.uint8)
    for name in set(CORRUPTIONS) - {"elastic_transform"}:
        assert corrupt(one, torch.tensor([0]), name, 5, seed=0).shape == one.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, "uint8"),
        ({"images": torch.zeros(3, 8, 8, dtype=torch.uint8)}, r"\(B, 3, H, W\)"),
        ({"ids": torch.arange(3)}, r"ids must be \(2,\)"),
        ({"severity": 6}, "from 1 to 5"),
    ],
)
def test_what_is_no_batch_is_refused(change, message):
    given = {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "ids": torch.arange(2), "severity": 1} | change
    with pytest.raises(ValueError, match=message):
        corrupt(**given, name="fog", seed=0)


def test_on_a_device_only_the_rims_of_drops_are_waited_for():
    pixels, ids = images(2, 24, 30), torch.tensor([3, 8])
    with pretended_cuda() as cuda:
        there = pixels.to("cuda")
        made = {name: corrupt(there, ids, name, 1, seed=0) for name in CORRUPTIONS}
        waited = {function for _, function in cuda.reads}
        made = {name: images.cpu() for name, images in made.items()}
    assert waited <= {"edges"}
    for name, found in made.items():
        assert (found.int() - corrupt(pixels, ids, name, 1, seed=0).int()).abs().max() <= 1, name
