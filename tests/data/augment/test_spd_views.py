"""SPot-the-Difference's views: the recipe's own stay; positive and negative differ in the defect's mask alone."""

import pytest
import torch

from data.augment.patch_grid import PatchGrid
from data.augment.recipes import RECIPES
from data.augment.spd_views import SpotTheDifference, weak
from data.augment.views import Augment, View
from data.defects import DEFECTS
from data.normalize import MEAN, STD, unnormalize
from runtime.errors import UserError
from tests.data.defects.test_cutpaste import raw_images

RECIPE = {
    "simclr": {"size": 32},
    "dino": {"size": 40, "local_size": 16, "local_crops": 2},
    "none": {"size": 24},
}


class Seen:
    """A defect that remembers what it was given and what it made."""

    def __init__(self, name):
        self.defect = DEFECTS[name]()

    def __call__(self, images, sample_ids, epoch, *, seed, view=0):
        made = self.defect(images, sample_ids, epoch, seed=seed, view=view)
        self.given, (self.made, self.masks) = images, made
        return made


def build(recipe="simclr", defect="smooth_blend", sizes=None):
    seen = Seen(defect)
    plain = Augment(RECIPES[recipe](**RECIPE[recipe]), 5, sizes)
    return plain, SpotTheDifference(plain, seen), seen


@pytest.mark.parametrize("recipe", RECIPE)
def test_the_recipes_views_stay_and_three_follow(recipe):
    plain, augment, _ = build(recipe)
    images, ids = raw_images(6, 48, 48), torch.arange(10, 16)
    expected, (*views, anchor, positive, negative) = plain(images, ids, 3), augment(images, ids, 3)
    assert len(views) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(views, expected))
    size = RECIPE[recipe]["size"]
    assert {tuple(view.shape) for view in (anchor, positive, negative)} == {(6, 3, size, size)}
    (resized,) = Augment([View(size, interpolation=plain.views[0].interpolation)], 0)(images, ids, 0)
    assert torch.equal(anchor, resized)


@pytest.mark.parametrize("defect", DEFECTS)
def test_positive_and_negative_differ_in_the_mask_and_nowhere_else(defect):
    _, augment, seen = build(recipe="dino", defect=defect)
    *_, positive, negative = augment(raw_images(40, 48, 48), torch.arange(40), 0)
    masks = seen.masks[:, None].expand_as(positive)
    assert torch.equal(positive[~masks], negative[~masks])
    changed, masked = (positive != negative).flatten(1).any(1), seen.masks.flatten(1).any(1)
    assert changed.sum() > 0.9 * masked.sum() > 10  # a little patch may fall on its like


def test_a_smooth_blend_leaves_most_of_every_image_alone():
    _, augment, seen = build()
    *_, positive, negative = augment(raw_images(200, 48, 48), torch.arange(200), 0)
    assert (positive != negative).any(1).flatten(1).float().mean(1).max() <= seen.masks.flatten(1).float().mean(1).max()
    assert seen.masks.flatten(1).float().mean(1).max() < 0.07  # 5 % of the area, rounded to whole pixels


def test_the_positive_is_the_weak_view_in_bytes():
    plain, augment, seen = build()
    images, ids = raw_images(5, 48, 48), torch.arange(5)
    *_, positive, negative = augment(images, ids, 2)
    exact = Augment([*plain.views, View(32), weak(plain.views[0])], 5)(images, ids, 2)[-1]
    assert ((unnormalize(exact) - unnormalize(positive)).abs() <= 0.5 / 255 + 1e-6).all()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(positive, (seen.given / 255 - mean) / std)
    torch.testing.assert_close(negative, (seen.made / 255 - mean) / std)


def test_the_global_change_is_weak():
    """Nearer to the image than the recipe's own views, flipped or not, and yet not the image."""
    _, augment, _ = build()
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 48), indexing="ij")
    images = torch.stack([x, y, (x + y) / 2]).mul(255).to(torch.uint8).expand(200, 3, 48, 48)
    strong, _, anchor, positive, _ = augment(images, torch.arange(200), 0)

    def away(view):
        return torch.stack([(view - a).square().flatten(1).mean(1) for a in (anchor, anchor.flip(3))])  # (2, 200)

    assert away(positive).min() > 0
    assert away(positive).amin(0).mean() < 0.15 * away(strong).amin(0).mean()
    assert 0.35 < away(positive).argmin(0).float().mean() < 0.65  # as many flipped as not


@pytest.mark.parametrize("defect", DEFECTS)
def test_views_depend_on_seed_epoch_and_image_alone(defect):
    sizes = torch.tensor([[48, 48], [40, 90], [300, 200]])[torch.arange(30) % 3]
    _, augment, seen = build(defect=defect, sizes=sizes)
    images, ids = raw_images(9, 48, 48), torch.arange(11, 20)
    together = augment(images, ids, 1)
    assert all(torch.equal(a, b) for a, b in zip(together, augment(images, ids, 1)))
    for rows in (slice(3, 4), slice(2, 7)):
        alone = augment(images[rows], ids[rows], 1)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together))
    augment(images, ids, 1)
    masks, other = seen.masks, augment(images, ids, 2)
    assert torch.equal(other[-3], together[-3]) and not torch.equal(other[-2], together[-2])
    assert not torch.equal(seen.masks, masks)  # the defects' own draws


def test_left_stays_left_where_the_recipe_says_so():
    ramp = torch.arange(48).mul(5).byte().expand(200, 3, 48, 48)
    augment = SpotTheDifference(Augment(RECIPES["simclr"](size=32, flip_p=0.0), 0), DEFECTS["smooth_blend"]())
    *_, positive, _ = augment(ramp, torch.arange(200), 0)
    assert (positive[..., 16:].mean((1, 2, 3)) > positive[..., :16].mean((1, 2, 3))).all()


def test_views_are_described():
    _, augment, _ = build(recipe="dino")
    made = augment(raw_images(1, 48, 48), torch.arange(1), 0)
    assert [view.shape for view in augment.views] == [tuple(view.shape[2:]) for view in made]


def test_patches_are_refused():
    with pytest.raises(UserError, match="plain views"):
        SpotTheDifference(PatchGrid(0), DEFECTS["smooth_blend"]())
