"""Augment: views that depend on nothing but (seed, epoch, view, sample), and the steps' order and odds."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.augment import color, resample
from data.augment.random_numbers import uniform
from data.augment.views import DRAWS, Augment, View
from data.normalize import MEAN, STD, Normalization, normalize, unnormalize
from runtime.errors import UserError

EVERYTHING = View(
    size=17,
    scale=(0.2, 1.0),
    interpolation="bicubic",
    flip_p=0.5,
    jitter_p=0.8,
    jitter=(0.4, 0.4, 0.2, 0.1),
    gray_p=0.3,
    blur_p=0.5,
    blur_kernel=7,
    solarize_p=0.3,
)
RATIO = EVERYTHING.ratio
UNIT = {"normalization": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}


def raw_images(count: int, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("size", "count", "threads"), [(12, 24, 1), (17, 24, 1), (32, 24, 1), (190, 4, 1), (190, 4, 2)]
)
def test_views_do_not_depend_on_the_batch(size, count, threads):
    """Bit for bit. Images of 190 x 190 are large enough for torch to split one image's sums between two threads."""
    views = [replace(EVERYTHING, size=size), EVERYTHING, replace(EVERYTHING, size=size)]
    images, ids, sizes = raw_images(count), torch.randperm(100)[:count], torch.randint(10, 90, (100, 2))
    augment, order, before = Augment(views, seed=3, sizes=sizes), torch.randperm(count), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = augment(images, ids, 5)
        for batch in (1, 3, 8):
            parts = [augment(i, s, 5) for i, s in zip(images.split(batch), ids.split(batch))]
            assert all(torch.equal(view, torch.cat(pieces)) for view, pieces in zip(whole, zip(*parts)))
        shuffled = augment(images[order], ids[order], 5)
        assert all(torch.equal(view[order], other) for view, other in zip(whole, shuffled))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("ratio", [RATIO, "own", "full_height"])
def test_rectangular_views_do_not_depend_on_the_batch(ratio):
    images, ids, sizes = raw_images(9), torch.randperm(100)[:9], torch.randint(10, 90, (100, 2))
    augment = Augment([replace(EVERYTHING, size=(40, 12), ratio=ratio), EVERYTHING], seed=3, sizes=sizes)
    whole, parts = augment(images, ids, 5), [augment(i, s, 5) for i, s in zip(images.split(2), ids.split(2))]
    assert all(torch.equal(view, torch.cat(pieces)) for view, pieces in zip(whole, zip(*parts)))


@pytest.mark.parametrize("size", [4, 9, 11])
def test_tiny_views_hardly_depend_on_the_batch(size):
    """MKL rounds products of tiny matrices by their address, so by their place in the batch."""
    images, ids = raw_images(12), torch.arange(12)
    augment = Augment([replace(EVERYTHING, size=size, blur_kernel=3)], 0, **UNIT)
    (whole,), parts = augment(images, ids, 0), [augment(i, s, 0)[0] for i, s in zip(images.split(1), ids.split(1))]
    inverted = (whole - torch.cat(parts)).abs() > 1e-3  # a last bit may tip a pixel over solarise's threshold
    torch.testing.assert_close(whole[~inverted], torch.cat(parts)[~inverted], atol=5e-6, rtol=0)
    assert inverted.sum() <= 3


def test_the_cpu_may_work_in_pieces(monkeypatch):
    images, ids, augment = raw_images(8), torch.arange(8), Augment([EVERYTHING, replace(EVERYTHING, size=12)], 0)
    whole = augment(images, ids, 0)
    for pixels in (1, 3 * 24 * 24):
        monkeypatch.setattr("data.augment.views.CPU_PIXELS", pixels)
        assert all(torch.equal(a, b) for a, b in zip(whole, augment(images, ids, 0)))


def test_views_differ_between_seeds_epochs_views_and_samples():
    images, ids = raw_images(1).expand(8, -1, -1, -1), torch.arange(8)
    crops = [view[i] for view in Augment([EVERYTHING] * 2, seed=0)(images, ids, 0) for i in range(8)]
    crops += [view[i] for view in Augment([EVERYTHING] * 2, seed=0)(images, ids, 1) for i in range(8)]
    crops += [view[i] for view in Augment([EVERYTHING] * 2, seed=1)(images, ids, 0) for i in range(8)]
    assert all(not torch.equal(a, b) for n, a in enumerate(crops) for b in crops[:n])


def test_a_view_does_not_depend_on_the_other_views():
    images, ids = raw_images(4), torch.arange(4)
    other = replace(EVERYTHING, size=9)
    alone, _ = Augment([EVERYTHING, other], seed=0)(images, ids, 0)
    together, _, again = Augment([EVERYTHING, other, EVERYTHING], seed=0)(images, ids, 0)
    assert torch.equal(alone, together) and not torch.equal(alone, again)


def drawn_boxes(ratio, crop: torch.Tensor, sizes: torch.Tensor) -> list[list[int]]:
    """Top, left, height and width of each crop, by the documented draws: share of the area first, place last."""
    if ratio == RATIO:
        return torch.cat(resample.draw_boxes(crop, sizes, EVERYTHING.scale, ratio=ratio), dim=1).int().tolist()
    boxes = []
    for u, (height, width) in zip(crop.tolist(), sizes.tolist()):
        share = 0.2 + 0.8 * u[0]
        sides = (height, share * width) if ratio == "full_height" else (share**0.5 * height, share**0.5 * width)
        h, w = (max(1, round(side)) for side in sides)
        boxes.append([int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w])
    return boxes


@pytest.mark.parametrize(("h", "w"), [(17, 17), (40, 9)])
@pytest.mark.parametrize("ratio", [RATIO, "own", "full_height"])
def test_views_equal_torchvision_step_by_step(h, w, ratio):
    """The whole chain, with the documented draws, by torchvision's functional ops of one float image at a time."""
    images, ids = raw_images(40, 32), torch.arange(100, 140)
    sizes, view = torch.tensor([32, 32]).expand(200, 2), replace(EVERYTHING, size=(h, w), ratio=ratio)
    (ours,) = Augment([view], seed=2, sizes=sizes)(images, ids, 7)
    crop, flip, jitter, gray, blur, solarize = uniform((2, 7, 0, ids), sum(DRAWS)).split(DRAWS, dim=1)
    options = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    ops = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for i, (image, box) in enumerate(zip(images.float() / 255, drawn_boxes(ratio, crop, sizes[ids]))):
        image = F.resized_crop(image, *box, [box[2], w], **options).clamp(0, 1)
        image = F.resize(image, [h, w], **options).clamp(0, 1)
        if flip[i] < 0.5:
            image = F.horizontal_flip(image)
        if jitter[i, 0] < 0.8:
            for op in jitter[i, 5:].argsort().tolist():
                spread, center = EVERYTHING.jitter[op], float(op != color.HUE)
                image = ops[op](image, center + spread * (2 * jitter[i, 1 + op].item() - 1))
        if gray[i] < 0.3:
            image = F.rgb_to_grayscale(image, 3)
        if blur[i, 0] < 0.5:
            sigma = 0.1 + 1.9 * blur[i, 1].item()
            image = F.gaussian_blur(image, [7, 7], [sigma, sigma])
        decided = (image - 128 / 255).abs() > 1e-3  # rounding may tip a pixel over solarise's threshold
        if solarize[i] < 0.3:
            image = F.solarize(image, 128 / 255)
        torch.testing.assert_close(ours[i][decided], F.normalize(image, MEAN, STD)[decided], atol=1e-3, rtol=0)


def test_a_pair_of_equal_sides_is_the_square():
    images, ids = raw_images(6), torch.arange(6)
    (square,) = Augment([EVERYTHING], 0)(images, ids, 0)
    (pair,) = Augment([replace(EVERYTHING, size=(17, 17))], 0)(images, ids, 0)
    assert torch.equal(square, pair)


def test_odds():
    """Each step alone changes the share of images that its probability says."""
    images, ids = raw_images(1, 8).expand(4000, -1, -1, -1), torch.arange(4000)
    images[0, 0, 0, 0] = 200  # something to solarise
    plain = normalize(images)
    steps = {
        "flip_p": {},
        "jitter_p": {"jitter": (0.4, 0.4, 0.4, 0.1)},
        "gray_p": {},
        "blur_p": {"blur_kernel": 3, "blur_sigma": (1.0, 2.0)},
        "solarize_p": {},
    }
    for name, options in steps.items():
        for p in (0.0, 0.2, 0.5, 1.0):
            (view,) = Augment([View(8, **{name: p}, **options)], seed=0)(images, ids, 0)
            changed = ((view - plain).abs() > 1e-4).flatten(1).any(1).sum().item()
            assert stats.binomtest(changed, 4000, p).pvalue > 1e-3 if 0 < p < 1 else changed == 4000 * p


def test_jitter_factors():
    view = View(8, jitter=(0.4, 1.8, 0.0, 0.1))
    low, high = view.jitter_factors(torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 4)).tolist()
    assert low == pytest.approx([0.6, 0.0, 1.0, -0.1]) and high == pytest.approx([1.4, 2.8, 1.0, 0.1])


def test_crops_are_drawn_in_the_original_geometry():
    """A tall image stored as a square: the crops' shape in original pixels is near 1, so they are wide as stored."""
    height, width, size = 90, 30, 45
    ramp = torch.linspace(0, 255, size).byte()
    images = torch.stack([ramp[:, None].expand(size, size), ramp.expand(size, size), torch.zeros(size, size).byte()])
    augment = Augment([View(2, scale=(0.1, 0.3))], 0, torch.tensor([[height, width]]).expand(500, 2), **UNIT)
    (views,) = augment(images.expand(500, -1, -1, -1), torch.arange(500), 0)  # (500, 3, 2, 2)
    # The two output pixels lie half a crop apart: their difference measures the crop's extent in stored pixels.
    down, across = views[:, 0, 1] - views[:, 0, 0], views[:, 1, :, 1] - views[:, 1, :, 0]
    aspect = (across.mean(1) * width) / (down.mean(1) * height)
    assert 3 / 4 - 0.1 < aspect.min() < 0.85 and 1.2 < aspect.max() < 4 / 3 + 0.1
    (square,) = Augment([View(2, scale=(0.1, 0.3))], 0, **UNIT)(images.expand(500, -1, -1, -1), torch.arange(500), 0)
    assert not torch.equal(square, views)


def test_a_view_of_nothing_only_normalizes_and_resizes():
    images, ids = raw_images(3, 24), torch.arange(3)
    (same,) = Augment([View(24)], 0)(images, ids, 0)
    torch.testing.assert_close(same, F.normalize(images.float() / 255, MEAN, STD))
    torch.testing.assert_close(same, normalize(images))
    torch.testing.assert_close(unnormalize(same), images.float() / 255)
    (small,) = Augment([View(10)], 0, **UNIT)(images, ids, 4)
    torch.testing.assert_close(small, F.resize(images.float() / 255, [10, 10], antialias=True), atol=1e-5, rtol=0)


def test_normalize_takes_bytes_alone_and_leaves_them():
    images = raw_images(2, 9)
    before = images.clone()
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalize(images).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before) and normalize(images[:0]).shape == (0, 3, 9, 9)
    for wrong in (images.float(), images.float() / 255, images.double(), images.bool()):
        kept = wrong.clone()
        with pytest.raises(ValueError, match="normalize takes uint8 images, got torch"):
            normalize(wrong)
        assert torch.equal(wrong, kept)


def test_empty_batch_and_one_image():
    tall = replace(EVERYTHING, size=(20, 10), ratio="full_height")
    augment = Augment([EVERYTHING, tall, EVERYTHING], 0)
    for count in (0, 1):
        views = augment(raw_images(count), torch.arange(count), 0)
        assert [tuple(v.shape[2:]) for v in views] == [(17, 17), (20, 10), (17, 17)]
        assert all(v.shape[:2] == (count, 3) for v in views)


def test_autocast_and_inputs_leave_no_trace():
    images, ids = raw_images(4), torch.arange(4)
    augment, before = Augment([EVERYTHING], 0), images.clone()
    (plain,) = augment(images, ids, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, ids, 0)[0], plain)
    assert torch.equal(images, before) and not plain.requires_grad


def test_programmer_errors():
    augment = Augment([View(8)], 0)
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\), got torch.float32 \(2, 3, 8, 8\)"):
        augment(torch.rand(2, 3, 8, 8), torch.arange(2), 0)
    with pytest.raises(ValueError, match=r"sample_ids must be \(2,\) on the CPU, got \(3,\)"):
        augment(raw_images(2), torch.arange(3), 0)


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"size": 0}, "size"),
        ({"size": (8, 0)}, "size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.8, 0.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"ratio": "square"}, "ratio"),
        ({"interpolation": "nearest"}, "bilinear, bicubic"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "hue"),
        ({"blur_kernel": 4}, "odd"),
        ({"blur_kernel": 65}, "twice the size"),
        ({"size": (32, 8), "blur_kernel": 17}, "twice the size"),
        ({"blur_sigma": (0.0, 1.0)}, "sigma"),
        ({"gray_p": 1.5}, "probabilities"),
    ],
)
def test_user_errors(option, rule):
    with pytest.raises(UserError, match=rule):
        View(**{"size": 32} | option)
