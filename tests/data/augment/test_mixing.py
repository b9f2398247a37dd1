"""mixup and CutMix: the pixels and targets of each image against a plain loop, their distributions, and that neither
the batch nor the number of processes matters."""

import numpy as np
import pytest
import torch
from scipy import stats

from data.augment.mixing import Mix, MixConfig, beside
from losses.supervised import soft_targets
from runtime.errors import UserError


def batch(count: int, height: int = 9, width: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, generator=generator)
    return images, soft_targets(torch.arange(count) % 3, 3), torch.randperm(1000, generator=generator)[:count]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_an_image_is_what_its_numbers_say(mixup, cutmix):
    mix, (images, targets, ids) = Mix(MixConfig(mixup=mixup, cutmix=cutmix, p=0.8), 3), batch(40)
    mixed, shares = mix(images, targets, ids, 5)
    kinds = set()
    for i, (own, *box) in enumerate(mix.draw(ids, 5, 9, 7).tolist()):
        other, (top, bottom, left, right) = images[i ^ 1], map(int, box)
        expected = images[i].clone()
        if bottom > top:
            expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            assert own == pytest.approx(1 - (bottom - top) * (right - left) / 63)
            assert torch.equal(mixed[i], expected)
            kinds.add("cutmix")
        else:
            torch.testing.assert_close(mixed[i], own * images[i] + (1 - own) * other)
            kinds.add("mixup" if own < 1 else "as it is")
        torch.testing.assert_close(shares[i], own * targets[i] + (1 - own) * targets[i ^ 1])
        assert 0 <= own <= 1 and float(shares[i].sum()) == pytest.approx(1)
    wanted = {"as it is"} | ({"mixup"} if mixup else set()) | ({"cutmix"} if cutmix else set())
    assert kinds == wanted


def test_the_share_is_beta_distributed_and_its_box_too():
    ids = torch.arange(4000)
    for alpha in (0.2, 1.0, 4.0):
        own = Mix(MixConfig(mixup=alpha), 0).draw(ids, 0, 32, 32)[:, 0].numpy()
        assert stats.kstest(own, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    drawn = Mix(MixConfig(cutmix=1.0), 0).draw(ids, 0, 1000, 500).double().numpy()
    rng = np.random.default_rng(0)  # the paper's rand_bbox
    sides = np.sqrt(1 - rng.beta(1, 1, 4000))[:, None] * (1000, 500) / 2
    centre = rng.random((4000, 2)) * (1000, 500)
    low, high = ((centre + sign * sides).round().clip(0, (1000, 500)) for sign in (-1, 1))
    assert stats.ks_2samp(drawn[:, 0], 1 - (high - low).prod(1) / 5e5).pvalue > 1e-3
    assert stats.ks_2samp(drawn[:, 1], low[:, 0]).pvalue > 1e-3


def test_half_are_of_each_kind_and_p_of_all():
    drawn = Mix(MixConfig(mixup=1.0, cutmix=1.0, p=0.5), 0).draw(torch.arange(4000), 0, 64, 64)
    cut, same = (drawn[:, 2] > drawn[:, 1]), drawn[:, 0] == 1
    assert stats.binomtest(int((~same).sum()), 4000, 0.5).pvalue > 1e-3
    assert stats.binomtest(int(cut.sum()), int((~same).sum()), 0.5).pvalue > 1e-3
    nothing = Mix(MixConfig(mixup=1.0, cutmix=1.0, p=0.0), 0)
    images, targets, ids = batch(6)
    mixed, shares = nothing(images, targets, ids, 0)
    assert torch.equal(mixed, images) and torch.equal(shares, targets)


def test_two_processes_mix_as_one_and_epochs_and_seeds_differ():
    mix, (images, targets, ids) = Mix(MixConfig(mixup=0.5, cutmix=0.5), 1), batch(8)
    whole = mix(images, targets, ids, 2)
    parts = [mix(images[part], targets[part], ids[part], 2) for part in (slice(0, 4), slice(4, 8))]
    for together, *halves in zip(whole, *parts):
        assert torch.equal(together, torch.cat(halves))
    assert not torch.equal(whole[0], mix(images, targets, ids, 3)[0])
    assert not torch.equal(whole[0], Mix(mix.config, 2)(images, targets, ids, 2)[0])


def test_pairs():
    assert beside(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(ValueError, match="in pairs"):
        Mix(MixConfig(mixup=1.0), 0)(*batch(3), 0)
    with pytest.raises(UserError, match=r"mix needs mix\.mixup or mix\.cutmix above 0"):
        MixConfig()
