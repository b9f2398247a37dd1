"""Blurred views: what is said of them against crops that torchvision draws, and the gradient energy of the crops."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from data.augment.patch_grid import PatchGrid
from data.augment.recipes import RECIPES
from data.augment.view_detail import blur_note, enlargement
from data.augment.views import Augment, View
from data.geometry import Geometry
from data.normalize import unnormalize


def sizes_of(*size, count=400):
    return torch.tensor([size]).expand(count, 2)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.05, 0.14)])
@pytest.mark.parametrize(
    ("size", "stored"), [((1200, 1600), (256, 256)), ((400, 300), (400, 300)), ((90, 900), (64, 96))]
)
def test_enlargement_against_torchvisions_crops(size, stored, scale):
    view, sizes = View(224, scale=scale), sizes_of(*size, count=1000)
    ours = enlargement(Augment([view], 0, sizes), view, Geometry(*stored), sizes)
    torch.manual_seed(0)
    crop, image = RandomResizedCrop(224, scale), torch.empty(3, *size)
    drawn = [crop.make_params([image]) for _ in range(2000)]
    for one, side in zip(ours, (stored, size)):
        times = [max(224 * size[0] / (d["height"] * side[0]), 224 * size[1] / (d["width"] * side[1])) for d in drawn]
        assert one == pytest.approx(np.median(times), rel=0.05)


def test_the_note_names_a_size_that_ends_it():
    sizes = sizes_of(1200, 1600, count=1000)
    augment = Augment(RECIPES["simclr"](), 0, sizes)
    note = blur_note(augment, Geometry(256, 256), sizes)
    assert "views of 224 x 224 pixels is enlarged 1.5" in note and "images of 1200 x 1600 (median)" in note
    assert "data.size=416 keeps the detail and takes 0.48 GiB for 1,000 images, not 0.18 GiB" in note
    assert note.endswith("(data.size=native: 5.4 GiB)") and "\n" not in note
    for side in (416, 384):
        assert blur_note(augment, Geometry(side, side), sizes) is None
    sizes = torch.cat([sizes, sizes_of(1000, 1000)])
    assert "native" not in blur_note(Augment(RECIPES["simclr"](), 0, sizes), Geometry(256, 256), sizes)
    note = blur_note(augment, Geometry(150, 200), sizes[:1000])
    height, width = map(int, re.search(r"data\.size=(\d+),(\d+) keeps", note).groups())
    assert height % 32 == width % 32 == 0 and blur_note(augment, Geometry(height, width), sizes[:1000]) is None


def test_the_note_is_for_detail_that_the_original_has():
    small = sizes_of(100, 100)
    assert blur_note(Augment(RECIPES["simclr"](), 0, small), Geometry(100, 100), small) is None  # nothing to gain
    note = blur_note(Augment(RECIPES["simclr"](), 0, small), Geometry(50, 50), small)
    assert "data.size=128 keeps" in note  # twice 50, rounded up to what networks like
    assert blur_note(Augment([View(64)], 0, small), Geometry(64, 64), small) is None
    local = sizes_of(1000, 1000)
    note = blur_note(Augment(RECIPES["dino"](local_size=160), 0, local), Geometry(256, 256), local)
    assert "views of 160 x 160" in note  # the worst of the views
    assert blur_note(PatchGrid(0), Geometry(256, 256), local) is None


def gradient(views: torch.Tensor) -> float:
    """Mean square of the differences of neighbors."""
    return float(views.diff(dim=-1).square().mean() + views.diff(dim=-2).square().mean())


def test_at_native_size_crops_are_as_sharp_as_torchvisions():
    """A texture of all frequencies, 240 x 320; stored in a smaller square it has lost most of its gradients."""
    rng = np.random.default_rng(0)
    image = sum(np.kron(rng.normal(size=(240 // k, 320 // k)), np.ones((k, k))) * k**0.5 for k in (1, 2, 4, 8, 16))
    image = np.clip(128 + 12 * image, 0, 255).astype(np.uint8)[..., None].repeat(3, 2)
    count, view = 40, View(48, scale=(0.08, 1.0), interpolation="bicubic")
    torch.manual_seed(0)
    official = RandomResizedCrop(48, (0.08, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    whole = torch.from_numpy(image).permute(2, 0, 1)
    theirs = gradient(torch.stack([TF.to_dtype(official(whole), torch.float32, scale=True) for _ in range(count)]))

    found = {}
    for side in ((240, 320), (48, 48)):
        stored = np.array(Geometry(*side).apply(Image.fromarray(image)))
        images = torch.from_numpy(stored).permute(2, 0, 1)[None].expand(count, 3, *side)
        (views,) = Augment([view], 0, sizes_of(240, 320, count=count))(images, torch.arange(count), 0)
        found[side] = gradient(unnormalize(views))
    assert found[240, 320] == pytest.approx(theirs, rel=0.06) and found[48, 48] < 0.5 * theirs
