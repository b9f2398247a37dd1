"""Unfreezing, layer by layer: what is frozen does not move by a bit, statistics included, and the rest does."""

import pytest
import torch
from torch import nn

from losses.supervised import cross_entropy, soft_targets
from models.backbones import BACKBONES
from models.classifier import HEADS, Classifier
from tests.slow import leaving
from training.optim import OptimConfig, build_optimizer, set_rates
from training.unfreezing import Layers, UnfreezeConfig

# (options, image side, layers from the top by the names of their parameters)
NETWORKS = {
    "resnet18": ({"drop_path": 0.1}, 33, ["layer4", "layer3", "layer2", "layer1", "conv1 bn1"]),
    "mobilenet_v2": ({"width": 0.25}, 33, [f"features.{i}" for i in range(18, -1, -1)]),
    "vit_tiny": (
        {"patch": 8, "size": 16},
        16,
        ["blocks.11 norm", *(f"blocks.{i}" for i in range(10, -1, -1)), "cls_token pos_embed patch_embed"],
    ),
    "convnext_atto": ({"patch": 2}, 16, ["stages.3 head.norm", "stages.2", "stages.1", "stages.0", "stem"]),
}
CASES = [("resnet18", "sgd"), ("convnext_atto", "adamw"), ("resnet18", "adamw"), ("convnext_atto", "sgd")]
CASES += [(name, optimizer) for name in ("mobilenet_v2", "vit_tiny") for optimizer in ("sgd", "adamw")]


def test_when_layers_learn():
    every = UnfreezeConfig(head_epochs=2, layer_epochs=3, layers=None)
    assert [every.layers_at(epoch, 3) for epoch in range(12)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [every.is_last(epoch, 3) for epoch in (0, 7, 8, 11)] == [False, False, True, True]
    few = UnfreezeConfig(head_epochs=1, layer_epochs=1, layers=2)
    assert [few.layers_at(epoch, 5) for epoch in range(5)] == [0, 1, 2, 2, 2] and few.is_last(2, 5)
    assert [UnfreezeConfig().layers_at(epoch, 5) for epoch in (0, 9)] == [5, 5]
    assert [UnfreezeConfig(head_epochs=1).layers_at(epoch, 5) for epoch in (0, 1)] == [0, 5]
    never = UnfreezeConfig(layers=0, layer_epochs=1)
    assert [never.layers_at(epoch, 5) for epoch in (0, 9)] == [0, 0] and never.is_last(0, 5)
    assert UnfreezeConfig(layers=9).layers_at(0, 5) == 5


def belongs(name: str, layer: str) -> bool:
    return any(f"{name}.".startswith(f"backbone.{part}.") for part in layer.split())


@pytest.mark.parametrize(("name", "optimizer_name"), leaving(CASES[2:], CASES))
def test_frozen_layers_do_not_move_by_a_bit(name, optimizer_name):
    """One step for each stage, with weight decay, which moves what has a gradient of zero."""
    torch.manual_seed(0)
    options, side, order = NETWORKS[name]
    backbone = BACKBONES[name](**options)
    model = Classifier(backbone, HEADS["mlp"](backbone.num_features, 3, hidden=8, dropout=0.5))
    optimizer = build_optimizer(OptimConfig(name=optimizer_name, lr=0.1, weight_decay=0.1), model)
    layers = Layers(model, model.backbone)
    assert layers.count == len(order)
    names = {n for n, _ in [*model.backbone.named_parameters(prefix="backbone"), *model.named_buffers()]}
    assert all(any(belongs(n, layer) for layer in order) for n in names), "the table above has all"
    images, targets = torch.randn(6, 3, side, side), soft_targets(torch.arange(6) % 3, 3)
    for count in range(len(order) + 1):
        before = {n: value.clone() for n, value in model.state_dict().items()}
        assert layers.train(count) and not layers.train(count)
        set_rates(optimizer, 0.1, 0.1)
        cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        learning = order[:count]
        wrong = [n for n in moved if n.startswith("backbone.") and not any(belongs(n, layer) for layer in learning)]
        assert wrong == [], f"moved with {count} layers"
        assert any(n.startswith("head.") for n in moved)
        for layer in learning:
            own = {n for n in before if belongs(n, layer)}
            assert {n for n in own if "running" in n} <= moved and moved & own, f"{layer} stands still"
        for n, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                free = n.startswith("head.") or any(belongs(n, layer) for layer in learning)
                assert module.training == free, n


def test_what_never_learns_stays_without_a_gradient():
    backbone = BACKBONES["vit_moco_small"](patch=8, size=16)  # its positions are fixed sines
    fixed = [n for n, p in backbone.named_parameters() if not p.requires_grad]
    model = Classifier(backbone, HEADS["linear"](backbone.num_features, 2))
    Layers(model, model.backbone).train(99)
    assert fixed and [n for n, p in model.backbone.named_parameters() if not p.requires_grad] == fixed


def test_a_backbone_without_stages_is_one_layer():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    layers = Layers(model := Classifier(backbone, nn.Flatten()), backbone)
    assert layers.count == 1
    layers.train(0)
    assert not any(p.requires_grad for p in model.parameters()) and not backbone[1].training
    layers.train(1)
    assert all(p.requires_grad for p in model.parameters()) and backbone[1].training
