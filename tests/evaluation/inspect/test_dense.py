"""Patch features of CNNs and ViTs."""

import pytest
import torch
import torch.nn.functional as F

from data.normalize import Normalization
from evaluation.inspect.dense import DenseFeatures, Flattened, without_margin
from models.backbones.resnet import ResNet18
from models.backbones.vit import ViTTiny
from tests.networks import FourStages


def test_the_cosine_of_patches_is_the_mean_of_the_stages_cosines():
    dense = DenseFeatures(FourStages().eval(), (3, 2))
    x = torch.randn(2, 3, 64, 96)
    maps = dense(x)
    assert dense.stages == (2, 3) and maps.shape == (2, 48, 16, 24)
    found = dense.backbone.forward_stages(F.pad(x, [32] * 4, mode="reflect"))
    own = [without_margin(found[stage], 32, torch.Size((128, 160))) for stage in (1, 2)]
    assert [some.shape[2:] for some in own] == [(16, 24), (8, 12)]
    own[1] = F.interpolate(F.normalize(own[1], dim=1), (16, 24), mode="bilinear")
    expected = sum(F.cosine_similarity(some[0, :, 3, 5], some[1, :, 9, 20], dim=0) for some in own) / 2
    torch.testing.assert_close(F.cosine_similarity(maps[0, :, 3, 5], maps[1, :, 9, 20], dim=0), expected)
    torch.testing.assert_close(maps.square().mean(1), torch.ones(2, 16, 24))


@pytest.mark.parametrize("size", [(64, 64), (70, 45), (20, 33), (1, 1)])
def test_the_grid_is_that_without_a_margin(size):
    network = ResNet18().eval()
    x = torch.randn(1, 3, *size)
    for stages in ((1,), (2, 3), (4,)):
        assert DenseFeatures(network, stages)(x).shape[2:] == network.forward_stages(x)[stages[0] - 1].shape[2:]


def test_a_margin_of_the_mirrored_image_takes_the_border_away():
    """Of a uniform image all patches are alike, which with zeros beyond the border they are not."""
    network, x = FourStages().eval(), torch.ones(1, 3, 64, 64)
    plain = network.forward_stages(x)[2]
    assert (plain[..., 0, 0] - plain[..., 4, 4]).abs().max() > 1e-3
    maps = DenseFeatures(network, (3,))(x)
    torch.testing.assert_close(maps, maps[..., 4:5, 4:5].expand_as(maps))


def test_a_vit_gives_its_last_tokens_unless_stages_are_asked_for():
    network = ViTTiny(patch=8, size=32).eval()
    x = torch.randn(2, 3, 32, 48)
    maps = DenseFeatures(network)(x)
    tokens = network.forward_tokens(x)[1]
    assert maps.shape == (2, 192, 4, 6)
    torch.testing.assert_close(F.normalize(maps[1, :, 2, 5], dim=0), F.normalize(tokens[1, 2 * 6 + 5], dim=0))
    stage = DenseFeatures(network, (4,))(x)
    theirs = network.forward_stages(x)[3]
    torch.testing.assert_close(F.normalize(stage, dim=1), F.normalize(theirs, dim=1))


def test_rows_are_the_maps_and_the_normalization_is_the_backbones():
    network = FourStages().eval()
    network.normalization = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    dense = DenseFeatures(network)
    rows, x = Flattened(dense), torch.randn(2, 3, 32, 32)
    assert rows.normalization == dense.normalization == network.normalization
    torch.testing.assert_close(rows(x).unflatten(1, rows.shape), dense(x))
