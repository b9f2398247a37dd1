"""The protocols of DINO, MoCo, SimCLR and VICReg against torch's own optimizers and schedules."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from data.augment.views import Augment, View
from data.loading import Loader
from evaluation.protocols import PROTOCOLS, Probed, train_classifier
from models.backbones.vit import ViTBase, ViTSmall, ViTTiny
from tests.evaluation.test_features import Images, make_backbone
from tests.processes import run_processes

VIEW = View(8, scale=(0.08, 1.0), flip_p=0.5)
EPOCHS, BATCH, CLASSES = 5, 4, 5


class Sized(Images):
    sizes = torch.full((99, 2), 8)


def trained(name: str, n: int = 11, batch: int = BATCH, **more) -> torch.Tensor:
    loader = Loader(Sized(n), batch, "cpu", shuffle=True, seed=3)
    settings = {"n_classes": CLASSES, "epochs": EPOCHS, "seed": 7}
    return train_classifier(make_backbone(), loader, VIEW, PROTOCOLS[name], **settings, **more)


def schedule(name: str, optimizer, epoch_steps: int):
    """torch's, and whether it moves at each step."""
    if name == "moco":  # main_lincls.py's 60 and 80 of 100 epochs
        return lr_scheduler.MultiStepLR(optimizer, [round(0.6 * EPOCHS), round(0.8 * EPOCHS)]), False
    if name == "simclr":
        return lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * epoch_steps), True
    return lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS), False


@pytest.mark.parametrize("name", PROTOCOLS)
def test_equals_torch(name):
    """Autograd, nn.Linear, torch's SGD and schedules."""
    dataset, backbone = Sized(11), make_backbone().eval()
    linear = nn.Linear(6, CLASSES)
    with torch.no_grad():
        start = 0.01 * torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(7))
        linear.weight.copy_(start[:-1].T)
        if name == "simclr":  # --zero_init_logits_layer=True
            linear.weight.zero_()
        linear.bias.zero_()
    rate = {"dino": 1e-3 * BATCH / 256, "moco": 30.0, "simclr": 0.1 * BATCH / 256, "vicreg": 0.02}[name]
    options = {"nesterov": name == "simclr", "weight_decay": 1e-6 if name == "vicreg" else 0.0}
    optimizer = torch.optim.SGD(linear.parameters(), rate, momentum=0.9, **options)
    augment, loader = Augment([VIEW], 7, dataset.sizes), Loader(dataset, BATCH, "cpu", shuffle=True, seed=3)
    (each, by_step), losses, rates = schedule(name, optimizer, len(loader)), [], []
    for epoch in range(EPOCHS):
        total = 0.0
        for images, labels, ids in loader.epoch(epoch):
            with torch.no_grad():
                features = backbone(augment(images, ids, epoch)[0])
            loss = F.cross_entropy(linear(features), labels)
            optimizer.zero_grad()
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            total += loss.item() * len(labels)
            if by_step:
                each.step()
        if not by_step:
            each.step()
        losses.append(total / 11)
    said = []
    weight = trained(name, log=lambda *values: said.append(values))
    torch.testing.assert_close(weight[:-1].T, linear.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight[-1], linear.bias, rtol=1e-4, atol=1e-6)
    assert [epoch for epoch, *_ in said] == [1, 2, 3, 4, 5]
    assert [loss for _, loss, _ in said] == pytest.approx(losses, rel=1e-4)
    assert [lr for *_, lr in said] == pytest.approx(rates[2::3])


@pytest.mark.parametrize(
    "name, batch, peak", [("dino", 1024, 0.004), ("moco", 256, 30), ("simclr", 4096, 1.6), ("vicreg", 256, 0.02)]
)
def test_the_official_rates(name, batch, peak):
    protocol = PROTOCOLS[name]
    assert protocol.batch_size == batch and protocol.epochs == (90 if name == "simclr" else 100)
    assert protocol.rate(0, 0, protocol.epochs, 10, batch) == pytest.approx(peak)
    half = protocol.rate(protocol.epochs // 2, 0, protocol.epochs, 10, batch)
    assert half == pytest.approx(peak if name == "moco" else peak / 2)
    if name == "moco":
        rates = [protocol.rate(epoch, 0, 100, 10, batch) for epoch in (59, 60, 79, 80, 99)]
        assert rates == pytest.approx([30, 3, 3, 0.3, 0.3])
    one_on = protocol.rate(30, 5, 90, 10, batch) != protocol.rate(30, 0, 90, 10, batch)
    assert one_on == (name == "simclr")


SETS = ((11, 4), (9, 8), (3, 2))  # images, batch; of 9 rank 1 has none in the last step


def of_half_a_batch(_rank: int, world_size: int) -> list[torch.Tensor]:
    return [trained("vicreg", n, batch // world_size) for n, batch in SETS]


def test_two_processes_equal_one():
    first, second = run_processes(of_half_a_batch, 2)
    for one, other, (n, batch) in zip(first, second, SETS):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, trained("vicreg", n, batch), rtol=1e-4, atol=1e-6)


def test_the_backbone_does_not_change():
    backbone = make_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    loader = Loader(Sized(8), 4, "cpu", shuffle=True)
    train_classifier(backbone, loader, VIEW, PROTOCOLS["moco"], n_classes=5, epochs=1, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("kind, width", [(ViTTiny, 4 * 192), (ViTSmall, 4 * 384), (ViTBase, 2 * 768)])
def test_dino_takes_four_blocks_of_a_small_vit(kind, width):
    torch.manual_seed(0)
    backbone, images = kind(patch=8, size=16).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, x, outputs = Probed(backbone, PROTOCOLS["dino"])(images), backbone.tokens(images), []
        for block in backbone.blocks:
            x = block(x)
            outputs.append(backbone.norm(x))
    expected = [x[:, 0] for x in outputs[-4:]]
    if kind is ViTBase:
        expected = [outputs[-1][:, 0], outputs[-1][:, 1:].mean(1)]
    assert found.shape == (2, width)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    other = Probed(backbone, PROTOCOLS["moco"])(images)
    torch.testing.assert_close(other, outputs[-1][:, 0])


def test_the_rates_of_a_cosine_end_near_zero():
    last = PROTOCOLS["vicreg"].rate(99, 0, 100, 10, 256)
    assert last == pytest.approx(0.01 * (1 + math.cos(math.pi * 0.99)))
