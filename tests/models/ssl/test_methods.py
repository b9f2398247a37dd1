"""Every pretraining method: a step, its gradients on two processes, DINO's frozen layer, RevD's rates."""

import inspect

import pytest
import torch
from torch import nn

from losses.sup_con import sup_con
from models.resnet import ResNet18
from models.ssl import SSL_METHODS
from models.ssl.dino import multi_crop
from tests.processes import run_processes
from training.errors import UserError
from training.optim import parameter_groups

SMALL = {
    "dino": {"prototypes": 16, "hidden": 12, "bottleneck": 6},
    "revd": {},
    "simclr": {"out": 8},
    "supcon": {"out": 8},
}


class Backbone(nn.Module):
    """A stand-in without batch norm, which sees one process's part only and would spoil the comparison."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return self.conv1(x).square().mean(dim=(2, 3))


class Staged(nn.Module):
    """A stand-in with three stages that halve each other, and a fourth that is not used."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2, self.conv3, self.conv4 = (nn.Conv2d(c, 8, 3, stride=2, padding=1) for c in (4, 8, 8))

    def forward_stages(self, x, last=4):
        maps = []
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4)[:last]:
            x = conv(x).tanh()
            maps.append(x)
        return maps


BACKBONES = {"revd": Staged}


def build(name):
    torch.manual_seed(2)
    method = SSL_METHODS[name](BACKBONES.get(name, Backbone)(), **SMALL[name]).double()
    for module in method.modules():  # heads have batch norm
        for child, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, child, nn.Identity())
    return method


def views(name):
    torch.manual_seed(4)
    sizes = {"dino": [8, 8, 5, 5, 5], "revd": [16]}.get(name, [8, 8])
    return [torch.randn(8, 3, size, size, dtype=torch.float64) for size in sizes]


def gradients(rank, world_size, name):
    method = build(name)
    model = nn.parallel.DistributedDataParallel(method) if world_size > 1 else method
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    loss, stats = model([view[mine] for view in views(name)], torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])[mine])
    loss.backward()
    assert all(value.ndim == 0 for value in stats.values())
    return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}, dict(method.named_buffers())


@pytest.mark.parametrize("name", SSL_METHODS)
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_on_different_shards_have_the_gradients_of_one(name, world_size):
    expected, buffers = gradients(0, 1, name)
    assert len(expected) > 3
    for grads, others in run_processes(gradients, world_size, name):
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-10)
        for key, buffer in others.items():
            torch.testing.assert_close(buffer, buffers[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SSL_METHODS)
def test_options_are_keyword_only_and_have_defaults(name):
    parameters = list(inspect.signature(SSL_METHODS[name]).parameters.values())
    assert parameters[0].name == "backbone"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[1:])


@pytest.mark.parametrize("name", SSL_METHODS)
def test_a_few_pictures_are_learnt_by_heart(name):
    method, images = build(name).float(), [view.float() for view in views(name)]
    nn.init.normal_(method.online.backbone.conv1.weight)  # away from DINO's teacher, its equal at the start
    if name == "dino":
        method.loss.center_momentum = 1.0  # a teacher that stays as it is
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        loss, _ = method(images, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_dino_target_starts_equal_and_never_has_gradients():
    method = build("dino")
    for a, b in zip(method.online.parameters(), method.target.parameters()):
        assert torch.equal(a, b) and not b.requires_grad
    assert method.backbone is method.target.backbone
    assert method.target.training


def test_dino_leaves_the_prototypes_alone_in_the_first_epoch():
    method = build("dino")
    method(views("dino"), torch.zeros(8))[0].backward()
    method.epoch = 0
    method.cancel_gradients()
    assert method.online.head.last_layer.weight_v.grad is None
    assert method.online.backbone.conv1.weight.grad is not None
    method(views("dino"), torch.zeros(8))[0].backward()
    method.epoch = 1
    method.cancel_gradients()
    assert method.online.head.last_layer.weight_v.grad is not None


def test_dino_temperature_follows_the_epoch():
    method = SSL_METHODS["dino"](
        Backbone(), **SMALL["dino"], teacher_temperature=0.07, warmup_teacher_temperature=0.04, warmup_teacher_epochs=4
    )
    images = [view.float() for view in views("dino")]
    seen = []
    for method.epoch in (0, 1, 3, 9):
        seen.append(method(images, torch.zeros(8))[1]["teacher_temperature"].item())
    assert seen == pytest.approx([0.04, 0.05, 0.07, 0.07])


def test_multi_crop_keeps_the_order_and_groups_by_size():
    method, images = build("dino"), views("dino")
    calls = []
    method.online.backbone.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    together = multi_crop(method.online, images)
    assert calls == [(16, 3, 8, 8), (24, 3, 5, 5)]
    apart = torch.cat([method.online(view) for view in images])
    torch.testing.assert_close(together, apart)


def test_simclr_refuses_another_number_of_views():
    with pytest.raises(UserError, match="2 views, and the augment recipe makes 3"):
        build("simclr")([torch.zeros(2, 3, 8, 8).double()] * 3, torch.zeros(2))


def test_supcon_takes_any_number_of_views_and_keeps_each_with_its_picture():
    method, labels = build("supcon"), torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])
    images = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    z = torch.stack([method.online(view) for view in images], dim=1)  # (B, 3, D)
    torch.testing.assert_close(method(images, labels)[0], sup_con(z, labels, 0.1))
    linear = SSL_METHODS["supcon"](Backbone(), head="linear", out=5)
    assert linear.online.head.weight.shape == (5, 6)
    for options in ({"form": "middle"}, {"head": "none"}):
        with pytest.raises(UserError, match="it is out or in, and mlp or linear"):
            SSL_METHODS["supcon"](Backbone(), **options)


def test_revd_loss_is_that_of_both_and_reaches_both():
    """A plain loop: 1 - cosine of the flattened stages, mean over pictures, summed over stages, nothing detached."""
    method, [images] = build("revd"), views("revd")
    teacher, student = method.online(images)
    expected = 0
    for t, s in zip(teacher, student):
        for a, b in zip(t.flatten(1), s.flatten(1)):
            expected = expected + (1 - (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()) / len(images)
    loss, stats = method([images], torch.zeros(8))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    weights = [method.online.backbone.conv1.weight, method.online.head["decoder"].layer3[0].conv1.weight]
    for ours, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert ours.abs().max() > 0
    assert {"loss_stage1", "loss_stage2", "loss_stage3", "teacher_spread"} == stats.keys()
    assert not method.online.backbone.conv4.weight.requires_grad  # no step moves what the student does not see
    two, _ = method([images[:4], images[4:]], torch.zeros(4))
    torch.testing.assert_close(two, loss)


def test_revd_trains_the_teacher_more_slowly_and_its_early_stages_more_slowly_still():
    method = SSL_METHODS["revd"](ResNet18())
    groups = parameter_groups(method, layer_decay=0.1)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    rates = {name: scale[id(p)] for name, p in method.named_parameters() if p.requires_grad}
    assert rates["online.head.decoder.layer1.0.conv1.weight"] == rates["online.head.bn.conv1.weight"] == 1
    for stage, rate in ((3, 0.1), (2, 0.01), (1, 0.001)):
        assert rates[f"online.backbone.layer{stage}.0.conv1.weight"] == pytest.approx(rate)
    assert rates["online.backbone.conv1.weight"] == pytest.approx(1e-4)
    assert not any("layer4" in name for name in rates if "backbone" in name)
