"""LARS against two steps by hand, groups, layer-wise rates, both clippings, EMA in closed form."""

import pytest
import torch
from torch import nn

from training.ema import ema_update
from training.optim import (
    LARS,
    OptimConfig,
    _depth,
    build_optimizer,
    clip_gradients,
    parameter_groups,
    set_rates,
)


def lars_by_hand(p, grads, lrs, wd, momentum=0.9, eta=1e-3):
    buffer = torch.zeros_like(p)
    for g, lr in zip(grads, lrs):
        if p.ndim > 1:
            g = g + wd * p
            if p.norm() > 0 and g.norm() > 0:
                g = g * eta * p.norm() / g.norm()
        buffer = momentum * buffer + g
        p = p - lr * buffer
    return p


@pytest.mark.parametrize("start", [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64),
                                   torch.zeros(2, 2, dtype=torch.float64)])  # fmt: skip
def test_lars_two_steps_with_changing_rate(start):
    grads = [torch.randn_like(start), torch.zeros_like(start), torch.randn_like(start)]
    lrs = [0.5, 0.2, 0.1]
    p = nn.Parameter(start.clone())
    optimizer = LARS([p], weight_decay=0.01)
    for g, lr in zip(grads, lrs):
        p.grad = g.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    torch.testing.assert_close(p.data, lars_by_hand(start, grads, lrs, 0.01), rtol=1e-12, atol=1e-14)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Module()
        self.online.backbone = nn.Module()
        self.online.backbone.conv1 = nn.Conv2d(3, 4, 3)
        for i in (1, 2, 3, 4):
            setattr(self.online.backbone, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
        self.online.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_decay_matrices_only_and_scale_by_depth():
    model = Tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["decayed"], g["lr_scale"]) for g in parameter_groups(model, layer_decay=0.5)
             for p in g["params"]}  # fmt: skip
    assert "frozen.weight" not in found
    assert found["online.head.weight"] == (True, 1.0)
    assert found["online.head.bias"] == (False, 1.0)
    assert found["online.backbone.layer4.0.weight"] == (True, 0.5)
    assert found["online.backbone.layer1.1.weight"] == (False, 0.5**4)
    assert found["online.backbone.conv1.weight"] == (True, 0.5**5)
    assert len(parameter_groups(model)) == 2


@pytest.mark.parametrize("name", ["decoder", "student.decoder", "head.features", "apprentice"])
def test_stages_outside_a_backbone_belong_to_the_head(name):
    """RD4AD's decoder and CDO's apprentice have layers 1 to 3 as well."""
    model, part = Tiny(), nn.Module()
    for stage in ("layer1", "layer3", "blocks", "0"):
        setattr(part, stage, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    *parents, last = name.split(".")
    place = model
    for parent in parents:
        setattr(place, parent, nn.Module())
        place = getattr(place, parent)
    setattr(place, last, part)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g["lr_scale"] for g in parameter_groups(model, layer_decay=0.5) for p in g["params"]}
    outside = {n: scale for n, scale in found.items() if "backbone" not in n}
    assert len(outside) == 4 * 4 + 2 and set(outside.values()) == {1.0}, outside
    assert found["online.backbone.layer4.0.weight"] == 0.5 and found["online.backbone.conv1.weight"] == 0.5**5


def test_depths_of_published_names():
    """Whatever holds the backbone; a stage counts from 1, the stem is 0, and only whole words are a backbone."""
    depths = {
        "backbone.conv1.weight": 0,
        "backbone.layer4.1.conv2.weight": 4,
        "target.backbone.features.0.0.weight": 1,
        "online.backbone.features.18.1.bias": 19,
        "online.backbone.blocks.11.mlp.fc1.weight": 12,
        "online.backbone.patch_embed.proj.weight": 0,
        "backbone.stages.3.blocks.2.gamma": 4,
        "layer1.0.conv1.weight": None,
        "decoder.layer1.0.conv1.weight": None,
        "head.decoder.layer1.0.conv1.weight": None,
        "backbones.layer1.0.weight": None,
    }
    assert {name: _depth(name) for name in depths} == depths


def test_rates_reach_the_groups():
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1.0, layer_decay=0.5), Tiny())
    set_rates(optimizer, 0.8, 0.1)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.8 * group["lr_scale"]
        assert group["weight_decay"] == (0.1 if group["decayed"] else 0.0)


def gradients():
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.randn(3, 2) * 10, torch.randn(4) * 0.01
    return parameters


def test_global_clipping_equals_torch():
    ours, theirs = gradients(), gradients()
    for a, b in zip(ours, theirs):
        b.grad = None if a.grad is None else a.grad.clone()
    norm = clip_gradients(ours, 1.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 1.5))
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad)


def test_per_tensor_clipping_as_in_official_dino():
    parameters = gradients()
    large, small = parameters[0].grad.clone(), parameters[1].grad.clone()
    clip_gradients(parameters, 3.0, "tensor")
    torch.testing.assert_close(parameters[0].grad, large * 3.0 / (large.norm() + 1e-6))
    torch.testing.assert_close(parameters[1].grad, small)
    before = parameters[0].grad.clone()
    clip_gradients(parameters, None)
    torch.testing.assert_close(parameters[0].grad, before)


def test_ema_closed_form_and_buffers_left_alone():
    online, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    start, end = torch.randn(3), torch.randn(3)
    target.weight.data.copy_(start)
    online.weight.data.copy_(end)
    online.running_mean.fill_(7.0)
    for _ in range(5):
        ema_update(target, online, 0.9)
    torch.testing.assert_close(target.weight.data, 0.9**5 * start + (1 - 0.9**5) * end)
    assert (target.running_mean == 0).all()
