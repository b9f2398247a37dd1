"""DINO: its target, frozen prototypes and those in use, the teacher's temperature, crops of several sizes."""

import math

import pytest
import torch

from models.ssl import SSL_METHODS
from models.ssl.dino import prototype_usage
from models.ssl.method import multi_crop
from models.ssl.spd import SPD
from tests.models.ssl.test_methods import LABELS, SMALL, Backbone, build, views
from training.optim import OptimConfig, apply_gradients


def test_dino_target_starts_equal_and_never_has_gradients():
    method = build("dino")
    for a, b in zip(method.online.parameters(), method.target.parameters()):
        assert torch.equal(a, b) and not b.requires_grad
    assert method.backbone is method.target.backbone
    assert method.target.training


def test_dino_leaves_the_prototypes_alone_in_the_first_epoch():
    """With SPD, too, whose loss reaches them; and the weight decay."""
    method = build("dino")
    optimizer = torch.optim.AdamW(method.online.parameters(), lr=0.1, weight_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    last, first = method.online.head.last_layer.weight_v, method.online.backbone.conv1.weight
    for objective, more, epoch in ((method, [], 0), (SPD(method, 0.5), views("dino")[:1] * 3, 0), (method, [], 1)):
        before = last.detach().clone(), first.detach().clone()
        method.set_epoch(epoch)
        objective(views("dino") + more, torch.zeros(8))[0].backward()
        norm = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]).norm()
        config = OptimConfig(name="adamw", lr=0.1, clip=3.0)
        given = apply_gradients(optimizer, scaler, method.parameters(), config, frozen=method.frozen())
        torch.testing.assert_close(given, norm)  # the frozen ones count, as in official DINO
        assert torch.equal(last, before[0]) == (epoch == 0) and not torch.equal(first, before[1])
        assert all(p.grad is None for p in method.parameters())


def test_prototypes_in_use_are_those_of_the_centered_outputs():
    far = torch.zeros(4)
    far[3] = 50  # what all images have in common, and the center takes away
    method = build("dino")
    method.loss.center = far.repeat(4)[None].double()
    teacher = torch.eye(16)[torch.arange(16)].unflatten(0, (8, 2)).double()  # (8, 2, 16): one prototype each
    _, stats = method.criterion((torch.zeros(8, 5, 16).double(), teacher + method.loss.center), LABELS)
    assert stats["prototypes_used"].item() == pytest.approx(1)
    assert prototype_usage(teacher * 0).item() == pytest.approx(1 / 16)
    halves = torch.eye(16)[torch.arange(16) % 2].unflatten(0, (8, 2))  # two prototypes, half each
    assert prototype_usage(halves).item() == pytest.approx(2 / 16)
    assert prototype_usage(torch.eye(4).expand(8, 4, 4)[:, :2]).item() == pytest.approx(2 / 4)  # K < 2 B
    three = torch.eye(4)[torch.tensor([[0, 0], [0, 1]])]
    assert prototype_usage(three).item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 4)


def test_dino_temperature_follows_the_epoch():
    method = SSL_METHODS["dino"](
        Backbone(), **SMALL["dino"], teacher_temperature=0.07, warmup_teacher_temperature=0.04, warmup_teacher_epochs=4
    )
    images = [view.float() for view in views("dino")]
    seen = []
    for epoch in (0, 1, 3, 9):
        method.set_epoch(epoch)
        seen.append(method(images, torch.zeros(8))[1]["teacher_temperature"].item())
    assert seen == pytest.approx([0.04, 0.05, 0.07, 0.07])


def test_multi_crop_keeps_the_order_and_groups_by_size():
    method, images = build("dino"), views("dino")
    calls = []
    method.online.backbone.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    together = multi_crop(method.online, images)  # (B, V, K)
    assert calls == [(16, 3, 8, 8), (24, 3, 5, 5)]
    apart = torch.stack([method.online(view) for view in images], dim=1)
    torch.testing.assert_close(together, apart)
