"""Every pretraining method: its gradients on two processes, its loss at a collapse, no reading of values, its options,
RevD's rates."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from losses.supcon import sup_con
from models.backbones.resnet import ResNet18
from models.ssl import SSL_METHODS
from models.ssl.method import MANY
from runtime.distributed import data_parallel
from runtime.errors import UserError
from tests.processes import run_processes
from training.optim import clip_gradients, parameter_groups

SMALL = {  # a method without a line here has its defaults
    "barlow_twins": {"hidden": 12, "out": 5},
    "byol": {"hidden": 12, "out": 8},
    "dino": {"prototypes": 16, "hidden": 12, "bottleneck": 6},
    "moco_v2": {"queue": 24, "out": 8},
    "moco_v3": {"hidden": 12, "out": 8},
    "patch_position": {"hidden": 12},
    "psco": {"queue": 24, "shots": 2, "hidden": 12, "out": 8},
    "revd": {},
    "simclr": {"out": 8},
    "simsiam": {"out": 8, "bottleneck": 4},
    "supcon": {"out": 8},
    "triplet": {"out": 8, "margin": 1.0},
    "vicreg": {"hidden": 12, "out": 5},
}
VARIANTS = {  # a method with other options, by a name of its own
    "moco_v2 symmetric": {"queue": 24, "out": 8, "symmetric": True, "head": "linear", "gamma": 2.0},
    "simclr with a bank": {"out": 8, "bank": 24, "gamma": 0.5},
    "supcon with a bank": {"out": 8, "bank": 24, "form": "in", "gamma": 2.0},
    "supcon with gamma": {"out": 8, "gamma": 2.0},
    "moco_v3 with gamma": {"hidden": 12, "out": 8, "gamma": 2.0},
    "simsiam of three views": {"out": 8, "bottleneck": 4},
    "byol of three views": {"hidden": 12, "out": 8},
    "barlow_twins of three views": {"hidden": 12, "out": 5},
    "vicreg of three views": {"hidden": 12, "out": 5},
    "simclr of three views": {"out": 8, "head": "linear"},
}
CASES = {name: SMALL.get(name, {}) for name in SSL_METHODS} | VARIANTS
LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])


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
    method = name.split()[0]
    method = SSL_METHODS[method](BACKBONES.get(method, Backbone)(), **CASES[name]).double()
    for module in method.modules():  # heads have batch norm
        for child, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, child, nn.Identity())
    return method


def views(name):
    torch.manual_seed(4)
    counted = 3 if "three views" in name else max(2, SSL_METHODS[name.split()[0]].takes[0])
    sizes = {"dino": [8, 8, 5, 5, 5], "revd": [16]}.get(name, [8] * counted)
    return [torch.randn(8, 3, size, size, dtype=torch.float64) for size in sizes]


def gradients(rank, world_size, name, steps=1):
    """Of the last step; those before it fill the queues."""
    method = build(name)
    model = data_parallel(method)
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for _ in range(steps):
        method.zero_grad()
        loss, stats = model([view[mine] for view in views(name)], LABELS[mine])
        loss.backward()
        method.after_step(1.0)
    assert stats["embeddings"].ndim == 3 and not any(value.requires_grad for value in stats.values())
    assert all(value.ndim == 0 for key, value in stats.items() if key != "embeddings")
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    return grads, dict(method.named_buffers()), stats.get("chance_loss")


def every_case(rank, world_size):
    return {name: gradients(rank, world_size, name, 2) for name in CASES}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(request):
    return run_processes(every_case, request.param)


@pytest.mark.parametrize("name", CASES)
def test_processes_on_different_shards_have_the_gradients_of_one(name, processes):
    expected, buffers, chance = gradients(0, 1, name, 2)
    assert len(expected) > 3
    for grads, others, its_chance in (results[name] for results in processes):
        assert its_chance == chance
        assert grads.keys() == expected.keys() and others.keys() == buffers.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-10)
        for key, buffer in others.items():
            torch.testing.assert_close(buffer, buffers[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_network_that_says_the_same_of_every_image_has_the_chance_loss(name):
    method = build(name)
    same = tuple(torch.ones_like(embedding).double() for embedding in method.embed(views(name)))
    for _ in range(5):  # until queues hold nothing else
        loss, stats = method.criterion(same, LABELS)
        method.after_step(1.0)
    if name.split()[0] in ("byol", "simsiam", "revd", "barlow_twins"):  # their best; D, which a healthy run may cross
        assert "chance_loss" not in stats
    else:
        assert loss.item() == pytest.approx(stats["chance_loss"].item(), rel=1e-6)


def test_supcon_of_one_view_has_no_chance_loss():
    loss, stats = build("supcon").criterion((torch.ones(8, 1, 8).double(),), LABELS)
    assert "chance_loss" not in stats  # the anchor alone in its class costs nothing
    assert loss.item() == pytest.approx(7 / 8 * math.log(7) * 0.1 / 0.07)


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal"}


class Waits(TorchDispatchMode):
    """Collects operations whose value or size the host needs, for which it would wait for a CUDA device. Copies (cpu,
    tolist, numpy) dispatch nothing on a CPU and are not seen: benchmarks/train_step.py counts those on CUDA."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITING or boolean:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_waits_are_seen():
    with Waits() as waits:
        x = torch.ones(3)
        float(x.sum()), x[x > 0], x.nonzero(), x.unique()
    assert waits.found[:3] == ["_local_scalar_dense", "index", "nonzero"] and len(waits.found) >= 4


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_read_between_forward_and_update(name):
    method, images = build(name), views(name)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], foreach=True)
    for _ in range(2):
        method.set_epoch(0)
        with Waits() as waits:
            loss, _ = method(images, LABELS)
            loss.backward()
            clip_gradients(method.parameters(), 3.0, "global")
            clip_gradients(method.parameters(), 3.0, "tensor")
            list(method.frozen())
            method.after_step(0.9)
        assert not waits.found
        optimizer.step()  # torch's own, which counts its steps on the host
        optimizer.zero_grad()


@pytest.mark.parametrize("name", SSL_METHODS)
def test_options_are_keyword_only_and_have_defaults(name):
    parameters = list(inspect.signature(SSL_METHODS[name]).parameters.values())
    assert parameters[0].name == "backbone"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[1:])


@pytest.mark.parametrize("name", SSL_METHODS)
def test_a_number_of_views_that_a_method_has_no_use_for_is_refused(name):
    method = build(name)
    least, most, recipe = method.takes
    for number in {least - 1, most + 1} - {0, MANY + 1}:
        with pytest.raises(UserError, match=rf"takes .* views, and augment makes {number}: use augment={recipe}"):
            method.check_views(number)
    for number in (least, max(least, min(most, 5))):
        method.check_views(number)
    if least == 2:
        with pytest.raises(UserError, match="views"):
            method([torch.zeros(2, 3, 8, 8).double()], torch.zeros(2))


OPTIONS = {
    "supcon": {"form": "middle"},
    "triplet": {"mining": "none"},
    "barlow_twins": {"gradient": "none"},
    "vicreg": {"form": "none"},
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name]])
def test_an_unknown_option_names_the_known_ones(name, option):  # the others are checked by the configuration alone
    with pytest.raises(UserError, match=rf"method\.{option}='(none|middle)' is unknown; one of: \w+, "):
        SSL_METHODS[name](Backbone(), **{option: OPTIONS[name][option]})


def test_supcon_takes_any_number_of_views_and_keeps_each_with_its_image():
    method, labels = build("supcon"), torch.tensor([0, 1, 2, 0, 3, 1, 0, 2])
    images = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    z = torch.stack([method.online(view) for view in images], dim=1)  # (B, 3, D)
    torch.testing.assert_close(method(images, labels)[0], sup_con(z, labels, 0.1))


def test_revd_loss_is_that_of_both_and_reaches_both():
    """A plain loop: 1 - cosine of the flattened stages, mean over images, summed over stages, nothing detached."""
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
    assert {"loss_stage1", "loss_stage2", "loss_stage3", "embeddings"} == stats.keys()
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
