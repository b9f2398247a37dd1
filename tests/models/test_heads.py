"""Heads against torch's own layers and the official DINO head, rebuilt here from torch's weight_norm."""

import copy
import warnings

import pytest
import torch
from torch import nn

from models.heads import DINOHead, WeightNormLinear, projection_head
from models.resnet import ResNet18


def official_head(in_features, prototypes, hidden, bottleneck, use_bn):
    """The computation of facebookresearch/dino vision_transformer.DINOHead, with torch's deprecated weight_norm."""
    layers = []
    for width in (in_features, hidden):
        layers += [nn.Linear(width, hidden)] + ([nn.BatchNorm1d(hidden)] if use_bn else []) + [nn.GELU()]
    head = nn.Module()
    head.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
    head.forward = lambda x: head.last_layer(nn.functional.normalize(head.mlp(x), dim=-1, p=2))
    return head


@pytest.mark.parametrize("use_bn", [False, True])
def test_dino_head_is_the_official_one(use_bn):
    ours = DINOHead(12, 40, hidden=16, bottleneck=8, use_bn=use_bn, norm_last_layer=False).double()
    theirs = official_head(12, 40, 16, 8, use_bn).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.last_layer.weight_g.shape == (40, 1)
    assert ours.last_layer.weight_v.shape == (40, 8)
    nn.init.uniform_(theirs.last_layer.weight_g, 0.5, 2)  # not 1, so that its role shows
    ours.load_state_dict(theirs.state_dict(), strict=True)

    x = torch.randn(6, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.forward(x), rtol=1e-12, atol=1e-12)
    weights = torch.randn(6, 40, dtype=torch.float64)
    (ours(x) * weights).sum().backward()
    (theirs.forward(x) * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-12)


def test_dino_head_number_of_parameters():
    with torch.device("meta"):
        head = DINOHead(384, 65536)  # ViT-S, ImageNet: 22.35 million
    mlp = (384 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 256
    assert sum(p.numel() for p in head.parameters()) == mlp + 65536 * 256 + 65536 == 22_352_128


def test_norm_last_layer_freezes_the_lengths_at_one():
    frozen, free = (
        DINOHead(4, 10, hidden=8, bottleneck=6),
        DINOHead(4, 10, hidden=8, bottleneck=6, norm_last_layer=False),
    )
    assert not frozen.last_layer.weight_g.requires_grad
    assert frozen.last_layer.weight_v.requires_grad
    assert free.last_layer.weight_g.requires_grad
    for head in (frozen, free):
        assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1))
    x = torch.randn(32, 4)
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=1.0)
    frozen(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(frozen.last_layer.weight_g, torch.ones(10, 1))
    assert frozen(x).abs().max() <= 1 + 1e-6  # logits are cosines


def test_only_the_mlp_is_truncated_normal():
    head = DINOHead(256, 512, hidden=256, bottleneck=256)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
            assert not layer.bias.any()
    bound = 256**-0.5  # Linear's own: uniform in +-1 / sqrt(in_features)
    assert head.last_layer.weight_v.abs().max() <= bound
    assert head.last_layer.weight_v.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_head_can_be_copied_after_a_forward_and_a_backward():
    """An EMA target is a deep copy; torch's old weight_norm refuses that."""
    head = DINOHead(4, 10, hidden=8, bottleneck=6)
    x = torch.randn(3, 4)
    head(x).sum().backward()
    twin = copy.deepcopy(head)
    assert torch.equal(twin(x), head(x))
    assert twin.last_layer.weight_v.data_ptr() != head.last_layer.weight_v.data_ptr()


def test_weight_norm_linear_ignores_the_length_of_v():
    layer = WeightNormLinear(5, 7).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.weight_v.mul_(13.0)
    torch.testing.assert_close(layer(x), before)
    v, x = layer.weight_v.tolist(), x.tolist()
    rows = [[sum(a * b for a, b in zip(row, item)) / sum(a * a for a in row) ** 0.5 for row in v] for item in x]
    torch.testing.assert_close(before, torch.tensor(rows, dtype=torch.float64))


def test_simclr_head():
    backbone = ResNet18()
    head = projection_head(backbone.num_features, 512, 128)
    assert sum(p.numel() for p in [*backbone.parameters(), *head.parameters()]) == 11_505_856
    head.double()
    x = torch.randn(6, 512, dtype=torch.float64)
    h = x @ head[0].weight.T + head[0].bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()  # a new BatchNorm has weight 1 and bias 0
    torch.testing.assert_close(head(x), h.clamp(min=0) @ head[3].weight.T + head[3].bias)
    head(x).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())
