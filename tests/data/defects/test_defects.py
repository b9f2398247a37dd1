"""All kinds of defects: no dependence on the batch, masks that hold all changes, differing draws, empty batches."""

import pytest
import torch

from data.defects import DEFECTS
from tests.data.defects.test_cutpaste import raw_images


@pytest.fixture(params=DEFECTS)
def defect(request):
    return DEFECTS[request.param]()


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_defects_do_not_depend_on_the_batch(defect, shape):
    images, ids, order = raw_images(13, *shape), torch.randperm(100)[:13], torch.randperm(13)
    whole, masks = defect(images, ids, 5, seed=3)
    for batch in (1, 4):
        parts = [defect(i, s, 5, seed=3) for i, s in zip(images.split(batch), ids.split(batch))]
        made, where = (torch.cat(part) for part in zip(*parts))
        assert torch.equal(whole, made) and torch.equal(masks, where)
    shuffled, _ = defect(images[order], ids[order], 5, seed=3)
    assert torch.equal(whole[order], shuffled)


def test_changes_lie_in_the_masks(defect):
    images, ids = raw_images(40, 64, 64), torch.arange(40)
    before = images.clone()
    made, masks = defect(images, ids, 0, seed=0)
    assert made.dtype == torch.uint8 and masks.dtype == torch.bool and masks.shape == (40, 64, 64)
    assert torch.equal(images, before)
    changed = (made != images).any(1)
    assert not (changed & ~masks).any()
    assert (changed & masks).sum() > 0.5 * masks.sum() > 0


def test_draws_differ_between_seeds_epochs_views_samples_and_kinds():
    images, masks = raw_images(1, 64, 64).expand(4, -1, -1, -1), []
    for make in DEFECTS.values():
        for seed, epoch, view in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            masks += make()(images, torch.arange(4), epoch, seed=seed, view=view)[0]
    drawn = {mask.numpy().tobytes() for mask in masks}
    assert len(drawn) >= 0.85 * len(masks)  # some kinds leave an image as it is now and then


def test_an_empty_batch(defect):
    made, masks = defect(raw_images(0, 64, 64), torch.arange(0), 0, seed=0)
    assert made.shape == (0, 3, 64, 64) and masks.shape == (0, 64, 64)


def test_what_the_programmer_may_not_give(defect):
    with pytest.raises(ValueError, match="uint8"):
        defect(raw_images(2, 64, 64).float(), torch.arange(2), 0, seed=0)
    with pytest.raises(ValueError, match="sample_ids"):
        defect(raw_images(2, 64, 64), torch.arange(3), 0, seed=0)


def test_autocast_changes_nothing(defect):
    images, ids = raw_images(6, 64, 64), torch.arange(6)
    made, _ = defect(images, ids, 0, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made, defect(images, ids, 0, seed=0)[0])
