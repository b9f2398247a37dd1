"""Stochastic depth: its rate, its mean, whom it spares."""

import pytest
import torch

from models.backbones import BACKBONES
from models.backbones.drop_path import DropPath, drop_rates
from models.ssl.dino import DINO


def test_an_image_is_dropped_whole_or_scaled():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    out = DropPath(0.3).train()(x)
    dropped = (out == 0).all(dim=2).all(dim=1)
    assert torch.equal(out[~dropped], x[~dropped] * True / 0.7)
    assert abs(dropped.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert not (out[~dropped] == 0).any()


def test_nothing_happens_in_testing_or_at_rate_zero():
    x = torch.randn(8, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    state = torch.get_rng_state()
    DropPath(0.0).train()(x)
    assert torch.equal(torch.get_rng_state(), state)  # a network without it draws as it did before there was any


def test_rates_rise_in_equal_steps():
    assert drop_rates(0.1, 12) == pytest.approx(torch.linspace(0, 0.1, 12).tolist())  # official DINO
    assert drop_rates(0.5, 1) == [0.0]
    assert drop_rates(0.0, 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["resnet18", "cbam_resnet18", "unet_resnet18", "convnext_atto", "vit_tiny"])
def test_backbones_have_it_and_targets_do_not(name):
    with torch.device("meta"):
        backbone = BACKBONES[name](drop_path=0.2)
        rates = [module.p for module in backbone.modules() if isinstance(module, DropPath)]
        assert rates[0] == 0.0 and rates[-1] == pytest.approx(0.2) and rates == sorted(rates)
        method = DINO(backbone, prototypes=8, hidden=8, bottleneck=4)
    assert [m.p for m in method.online.modules() if isinstance(m, DropPath)] == rates
    assert {m.p for m in method.target.modules() if isinstance(m, DropPath)} == {0.0}


def test_a_residual_block_that_is_dropped_is_its_shortcut():
    block = BACKBONES["resnet18"]().layer1[1].train()
    block.drop_path.p = 1 - 1e-12
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(block(x), x)  # the input is not negative
