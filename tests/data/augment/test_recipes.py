"""The recipes' constants against the official ones, and what flips, strips and aligned views do to images."""

from dataclasses import replace

import pytest
import torch
from PIL import ImageFilter
from scipy import stats
from torchvision.transforms.v2 import functional as F

from data import AugmentConfig, build_augment
from data.augment import resample
from data.augment.patch_grid import PatchGrid
from data.augment.recipes import RECIPES
from data.augment.views import Augment, View
from data.normalize import HALF, Normalization
from runtime import config

UNIT = {"normalization": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}
VIEWS = [name for name in RECIPES if name != "patches"]
FLIPPED = ["simclr", "moco", "byol", "psco", "dino", "crop"]
SMALL = {"dino": {"size": 48, "local_size": 24, "local_crops": 1, "strips": 1, "strip_size": (40, 12)}}

COUNTS = {"simclr": 2, "moco": 2, "byol": 2, "psco": 2, "aligned": 2, "dino": 11, "patches": 9, "crop": 1, "none": 1}
COUNTS["randaugment"] = 1

# recipe, options: for each view crop, jitter, gray_p, blur_p, solarize_p, interpolation (reference: official files)
OFFICIAL = {
    ("simclr", ()): [((0.08, 1.0), (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0.0, "bicubic")] * 2,
    ("moco", ()): [((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0, "bilinear")] * 2,
    ("byol", ()): [
        ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0, "bicubic"),
        ((0.08, 1.0), (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2, "bicubic"),
    ],
    ("psco", ()): [
        ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.2, 0.0, 0.0, "bicubic"),
        ((0.2, 1.0), (0.0, 0.0, 0.0, 0.0), 0.0, 0.0, 0.0, "bicubic"),
    ],
    ("crop", ()): [((0.08, 1.0), (0.0, 0.0, 0.0, 0.0), 0.0, 0.0, 0.0, "bilinear")],
    ("dino", ("local_crops", 1)): [
        ((0.4, 1.0), (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0, "bicubic"),
        ((0.4, 1.0), (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2, "bicubic"),
        ((0.05, 0.4), (0.4, 0.4, 0.2, 0.1), 0.2, 0.5, 0.0, "bicubic"),
    ],
}


def raw_images(count: int, size: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def small(name: str, **options) -> list[View]:
    return RECIPES[name](**({"size": 32} | SMALL.get(name, {}) | options))


def geometry_only(view: View) -> View:
    return replace(view, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0, interpolation="bilinear")


@pytest.mark.parametrize("recipe", OFFICIAL)
def test_constants_are_the_official_ones(recipe):
    name, options = recipe
    views = RECIPES[name](**dict([options] if options else []))
    ours = [(v.scale, v.jitter, v.gray_p, v.blur_p, v.solarize_p, v.interpolation) for v in views]
    assert ours == OFFICIAL[recipe]
    for view in views:
        assert view.jitter_p == (0.8 if any(view.jitter) else 0.0) and view.flip_p == 0.5
        assert view.ratio == (3 / 4, 4 / 3) and view.blur_sigma == (0.1, 2.0)
        assert view.size == (96 if view.scale[1] == 0.4 else 84 if name == "psco" else 224)
        assert view.blur_kernel == (23 if name == "simclr" else 1 if view.jitter_p == 0 else 17)


def test_the_first_recipes_are_as_ever():
    """Changed defaults would change the views of configs that exist."""
    shared = {"jitter_p": 0.8, "gray_p": 0.2, "flip_p": 0.5, "interpolation": "bicubic"}
    view = View(224, (0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5, blur_kernel=23, **shared)
    assert RECIPES["simclr"]() == [view, view] and RECIPES["none"]() == [View(224)]
    view = View(32, (0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur_kernel=3, **shared)
    assert RECIPES["simclr"](size=32, strength=0.5, blur_p=0.0) == [view, view]
    shared |= {"jitter": (0.4, 0.4, 0.2, 0.1), "blur_kernel": 17}
    first, second = (View(224, (0.4, 1.0), blur_p=b, solarize_p=s, **shared) for b, s in ((1.0, 0.0), (0.1, 0.2)))
    assert RECIPES["dino"]() == [first, second] + [View(96, (0.05, 0.4), blur_p=0.5, **shared)] * 8
    views = RECIPES["dino"](blur=False)
    assert all(view.blur_p == 0 for view in views) and [view.solarize_p for view in views[:3]] == [0.0, 0.2, 0.0]


def test_counts_of_views():
    for name in ("simclr", "moco", "byol", "aligned"):
        kinds = RECIPES[name](views=2)
        assert RECIPES[name]() == kinds
        assert RECIPES[name](views=5) == [*kinds, *kinds, kinds[0]] and RECIPES[name](views=1) == kinds[:1]


def test_options_reach_the_views():
    first, second = RECIPES["byol"](size=32, scale=(0.2, 1.0), blur_p=(0.0, 0.3), solarize_p=(0.1, 0.4))
    assert (first.size, first.scale, first.blur_p, first.solarize_p) == (32, (0.2, 1.0), 0.0, 0.1)
    assert second == replace(first, blur_p=0.3, solarize_p=0.4)
    (light,) = RECIPES["crop"](size=32, jitter=0.3)
    assert (light.size, light.jitter_p, light.jitter) == (32, 1.0, (0.3, 0.3, 0.3, 0.0))
    strong, weak = RECIPES["psco"](size=224, blur_p=0.5, scale=(0.3, 0.9))
    assert (strong.blur_p, weak.blur_p, weak.size, weak.scale) == (0.5, 0.0, 224, (0.3, 0.9))
    assert {v.interpolation for n in FLIPPED for v in RECIPES[n](interpolation="bilinear")} == {"bilinear"}


@pytest.mark.parametrize("name", FLIPPED)
def test_flips_are_off_when_told(name):
    """Where the right half of every image is the brighter one, it stays the brighter one in every view."""
    ramp, ids = torch.arange(48).mul(5).byte().expand(300, 3, 48, 48), torch.arange(300)
    for p in (0.0, 0.5):
        for view in Augment([replace(v, solarize_p=0.0) for v in small(name, flip_p=p)], 0, **UNIT)(ramp, ids, 0):
            left, right = view.chunk(2, dim=3)
            mirrored = (left.mean((1, 2, 3)) > right[..., -left.shape[3] :].mean((1, 2, 3))).sum().item()
            assert mirrored == 0 if p == 0 else stats.binomtest(mirrored, 300, 0.5).pvalue > 1e-3


def located(view: View, sizes: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin and extent of each crop as shares of the image's height and width, (count, 2) each, read off ramps."""
    ramp, (h, w) = (torch.arange(250) + 0.5) / 250, view.shape
    images = torch.stack([ramp[:, None].expand(250, 250), ramp.expand(250, 250), ramp.expand(250, 250)])
    images = (images * 255).byte().expand(count, 3, 250, 250)  # each byte within 1/255 of where it is
    (views,) = Augment([geometry_only(view)], 0, torch.tensor([sizes]).expand(count, 2), **UNIT)(
        images, torch.arange(count), 0
    )
    down, across = views[:, 0].mean(2), views[:, 1].mean(1)  # (count, h), (count, w)
    begin, extent = [], []
    for line, size in ((down, h), (across, w)):
        step = (line[:, -2] - line[:, 1]) / (size - 3)  # but for the ends, where the kernel is cut off
        begin.append(line[:, 1] - 1.5 * step)
        extent.append(step * size)
    return torch.stack(begin, 1).double(), torch.stack(extent, 1).double()


def test_strips_have_the_whole_height_and_a_uniform_share_of_the_width():
    *others, strip = RECIPES["dino"](strips=1, strip_size=(60, 20), strip_width=(0.2, 0.5), flip_p=0.0)
    assert others == RECIPES["dino"](flip_p=0.0) and strip == replace(others[-1], **strip_fields(strip))
    (top, left), (height, width) = (x.T for x in located(strip, (3000, 2000), 1500))
    assert top.abs().max() < 0.01 and (height - 1).abs().max() < 0.015
    assert 0.195 < width.min() < 0.21 and 0.49 < width.max() < 0.51
    assert stats.kstest(width, stats.uniform(0.2, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(left / (1 - width), "uniform").pvalue > 1e-3


def strip_fields(strip: View) -> dict:
    assert (strip.size, strip.scale, strip.ratio) == ((60, 20), (0.2, 0.5), "full_height")
    return {name: getattr(strip, name) for name in ("size", "scale", "ratio")}


def test_strips_leave_the_other_views_alone_and_do_not_depend_on_the_batch():
    images, ids, sizes = raw_images(7), torch.arange(7), torch.randint(30, 90, (7, 2))
    plain = Augment(small("dino", strips=0), 4, sizes)(images, ids, 2)
    augment = Augment(small("dino", strips=3), 4, sizes)
    views = augment(images, ids, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, views[:3])) and len(views) == 6
    assert [tuple(v.shape) for v in views] == [(7, 3, 48, 48)] * 2 + [(7, 3, 24, 24)] + [(7, 3, 40, 12)] * 3
    assert not torch.equal(views[3], views[4]) and not torch.equal(views[4], views[5])
    alone = [augment(images[i : i + 1], ids[i : i + 1], 2) for i in range(7)]
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*alone), views))


def test_aligned_views_move_nothing_far():
    view, _ = RECIPES["aligned"](size=64)
    assert view.flip_p == 0 and view.jitter[3] == 0 and view.gray_p == view.solarize_p == 0
    begin, extent = located(view, (3000, 1000), 800)
    assert (extent[:, 0] - extent[:, 1]).abs().max() < 0.01  # the image's own proportions, whatever they are
    assert extent.min() > 0.8**0.5 - 0.01 and extent.max() < 1.01
    assert stats.kstest(extent.mean(1) ** 2, stats.uniform(0.8, 0.2).cdf).pvalue > 1e-3
    assert begin.min() > -0.01 and (begin + extent).max() < 1.01
    part = begin.new_tensor([0.3, 0.7])
    assert ((part - begin) / extent - part).abs().max() < 0.12  # where a part lies in the view


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("value", [0, 255])
def test_one_colored_images_stay_within_range(name, value):
    images = torch.full((64, 3, 32, 32), value, dtype=torch.uint8)
    for view in Augment(small(name), 0, **UNIT)(images, torch.arange(64), 0):
        assert view.isfinite().all() and view.min() >= -1e-5 and view.max() <= 1 + 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_built_from_a_config(name):
    """Every recipe's signature is a schema, and its views are what the description says."""
    options = {"size": "16"} | ({"strips": "1", "strip_size": "20,9"} if name == "dino" else {})
    section = config.build(AugmentConfig, {"name": name, **options}, "augment.")
    sizes = torch.randint(30, 90, (9, 2))
    augment = build_augment(section, 7, sizes, HALF)
    images, ids = raw_images(3, 80), torch.arange(3)
    views = augment(images, ids, 1)
    assert len(augment.views) == len(views) == COUNTS.get(name, len(views))
    assert [(3, 3, *view.shape) for view in augment.views] == [tuple(view.shape) for view in views]
    assert augment.views[0].size == 16 and {view.dtype for view in views} == {torch.float32}
    if name == "patches":
        expected = PatchGrid(7, HALF, size=16)(images, ids, 1)
    else:
        expected = Augment(RECIPES[name](**section.options), 7, sizes, normalization=HALF)(images, ids, 1)
    assert all(torch.equal(a, b) for a, b in zip(views, expected))


def test_dino_blur_is_near_the_official_one():
    """PIL's blur of uint8 images, away from the borders, which it extends and we reflect."""
    image = F.resize(torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8), [96, 96])
    for sigma in (0.1, 0.5, 1.0, 2.0):
        official = F.pil_to_tensor(F.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma)))
        ours = resample.gaussian_blur(image[None].float() / 255, torch.tensor([sigma]), kernel=17)[0] * 255
        assert (ours - official)[:, 8:-8, 8:-8].abs().max() < 3
