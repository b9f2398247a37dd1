"""DefectiveView: the recipe's views stay, and the negative differs from the last of them in the defect's mask alone."""

import pytest
import torch

from data.augment.negatives import DefectiveView
from data.augment.patch_grid import PatchGrid
from data.augment.recipes import RECIPES
from data.augment.spd_views import SpotTheDifference
from data.augment.views import Augment, View
from data.defects import DEFECTS
from data.normalize import MEAN, STD, unnormalize
from runtime.errors import UserError
from tests.data.augment.test_spd_views import Seen
from tests.data.defects.test_cutpaste import raw_images

RECIPE = {
    "moco": {"size": 32, "views": 3},
    "dino": {"size": 40, "local_size": 16, "local_crops": 1, "strips": 1, "strip_size": (48, 30)},
    "none": {"size": 24},
}


def build(recipe="moco", defect="smooth_blend", sizes=None):
    seen = Seen(defect)
    plain = Augment(RECIPES[recipe](**RECIPE[recipe]), 5, sizes)
    return plain, DefectiveView(plain, seen), seen


@pytest.mark.parametrize("recipe", RECIPE)
def test_the_recipes_views_stay_and_one_follows(recipe):
    plain, augment, _ = build(recipe)
    images, ids = raw_images(6, 48, 48), torch.arange(10, 16)
    expected, views = plain(images, ids, 3), augment(images, ids, 3)
    assert [view.shape for view in augment.views] == [tuple(view.shape[2:]) for view in views]
    assert len(views) == len(expected) + 1
    assert all(torch.equal(a, b) for a, b in zip(views[:-2], expected[:-1]))
    assert ((unnormalize(views[-2]) - unnormalize(expected[-1])).abs() <= 0.5 / 255 + 1e-6).all()


@pytest.mark.parametrize("recipe", ["moco", "dino"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_negative_differs_in_the_mask_and_nowhere_else(recipe, defect):
    _, augment, seen = build(recipe, defect)
    *_, last, negative = augment(raw_images(40, 48, 48), torch.arange(40), 0)
    masks = seen.masks[:, None].expand_as(last)
    assert torch.equal(last[~masks], negative[~masks])
    changed, masked = (last != negative).flatten(1).any(1), seen.masks.flatten(1).any(1)
    assert changed.sum() > 0.9 * masked.sum() > 5  # a little patch may fall on its like


def test_both_are_whole_bytes():
    """So that nothing but the defect tells them apart: neither has values that the other could not have."""
    _, augment, seen = build()
    *_, last, negative = augment(raw_images(5, 48, 48), torch.arange(5), 2)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(last, (seen.given / 255 - mean) / std)
    torch.testing.assert_close(negative, (seen.made / 255 - mean) / std)
    for view in (last, negative):
        levels = (view * std + mean) * 255
        assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.parametrize("defect", DEFECTS)
def test_views_depend_on_seed_epoch_and_image_alone(defect):
    sizes = torch.tensor([[48, 48], [40, 90], [300, 200]])[torch.arange(30) % 3]
    _, augment, seen = build(defect=defect, sizes=sizes)
    images, ids = raw_images(9, 48, 48), torch.arange(11, 20)
    together = augment(images, ids, 1)
    masks = seen.masks
    for rows in (slice(0, 9), slice(3, 4), slice(2, 7)):
        alone = augment(images[rows], ids[rows], 1)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together))
    augment(images, ids, 2)
    assert not torch.equal(seen.masks, masks)
    DefectiveView(Augment(augment.augment.views, 6, sizes), seen)(images, ids, 1)
    assert not torch.equal(seen.masks, masks)


def test_empty_batch_and_one_image():
    _, augment, _ = build()
    for count in (0, 1):
        views = augment(raw_images(count, 48, 48), torch.arange(count), 0)
        assert [tuple(view.shape) for view in views] == [(count, 3, 32, 32)] * 4


def test_only_plain_views_can_have_a_defect():
    _, augment, seen = build()
    for wrapper in (DefectiveView, SpotTheDifference):
        for wrapped in (PatchGrid(0), augment):
            with pytest.raises(UserError, match="one of the two, and another recipe than patches"):
                wrapper(wrapped, seen)


def test_a_defect_that_finds_no_room_says_so():
    augment = DefectiveView(Augment([View(12)], 0), DEFECTS["scar"]())
    with pytest.raises(UserError, match="12 x 12 pixels are too small"):
        augment(raw_images(2, 48, 48), torch.arange(2), 0)
