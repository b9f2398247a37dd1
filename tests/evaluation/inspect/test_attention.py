"""Attention of a vision transformer against plain loops in float64."""

import pytest
import torch

from evaluation.inspect.attention import attention, mass_mask
from models.backbones.resnet import ResNet18
from models.backbones.vit import ViTTiny
from runtime.errors import UserError


def network(**options) -> ViTTiny:
    """With weights large enough that no head looks everywhere alike."""
    vit = ViTTiny(size=32, patch=8, **options).double().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return vit


@pytest.mark.parametrize(("size", "options"), [((32, 32), {}), ((48, 24), {"registers": 2, "layer_scale": 0.5})])
@torch.no_grad()
def test_heads_and_rollout_are_plain_products(size, options):
    vit = network(**options)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found = attention(vit, images)
    grid = size[0] // 8, size[1] // 8
    assert found.heads.shape == (2, 3, *grid) and found.rollout.shape == (2, *grid)  # positions of another size, too
    x, n = vit.tokens(images), grid[0] * grid[1]
    whole = torch.eye(x.shape[1], dtype=torch.float64).expand(2, -1, -1)
    for block in vit.blocks:
        y = block.norm1(x)
        qkv, weights, seen = block.attn.qkv(y), [], []
        for head in range(3):
            q, k, v = (qkv[..., part * 192 + head * 64 : part * 192 + (head + 1) * 64] for part in range(3))
            weights.append(torch.softmax(q @ k.transpose(1, 2) / 8, dim=-1))
            seen.append(weights[-1] @ v)
        # the attention that is computed anew is the one that the block uses
        torch.testing.assert_close(block.attn(y), block.attn.proj(torch.cat(seen, dim=-1)))
        torch.testing.assert_close(block.attn.maps(y), torch.stack(weights, 1))
        mixed = sum(weights) / 3 / 2 + torch.eye(x.shape[1], dtype=torch.float64) / 2
        whole = mixed @ whole
        x = block(x)
    torch.testing.assert_close(whole.sum(2), torch.ones_like(whole.sum(2)))
    torch.testing.assert_close(found.rollout.flatten(1), whole[:, 0, -n:])
    for head in range(3):
        torch.testing.assert_close(found.heads[:, head].flatten(1), weights[head][:, 0, -n:])


def kept(values: list[float], mass: float) -> set[int]:
    """The largest ones, one after the other, until they hold the mass."""
    chosen, held = set(), 0.0
    for i in sorted(range(len(values)), key=lambda i: (values[i], i), reverse=True):
        if held >= mass * sum(values):
            break
        chosen.add(i)
        held += values[i]
    return chosen


@pytest.mark.parametrize("mass", [0.01, 0.3, 0.6, 0.99])
def test_the_fewest_patches_hold_the_mass(mass):
    maps = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    mask = mass_mask(maps, mass)
    for values, chosen in zip(maps.flatten(0, 1).flatten(1).tolist(), mask.flatten(0, 1).flatten(1)):
        assert {*chosen.nonzero()[:, 0].tolist()} == kept(values, mass)


def test_equal_patches_one_patch_and_all_of_the_mass():
    assert mass_mask(torch.ones(1, 5)).tolist() == [[False, False, True, True, True]]
    assert mass_mask(torch.full((1, 1), 0.2)).tolist() == [[True]]
    assert mass_mask(torch.tensor([[0.5, 0.0], [0.25, 0.25]]), 1.0).tolist() == [[True, False], [True, True]]
    assert mass_mask(torch.tensor([[9.0, 1.0]])).tolist() == [[True, False]]


def test_a_network_without_attention_is_named():
    with pytest.raises(UserError, match="ResNet18 has none: use task=gradcam"):
        attention(ResNet18(), torch.zeros(1, 3, 32, 32))
