"""CutPaste's network, batches and loss against the official ones, and what it learns."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from torch import Tensor, nn

from data.augment.random_numbers import uniform
from data.defects import DEFECTS
from data.normalize import normalize
from models.anomaly.cutpaste import VARIANTS, CutPaste
from models.anomaly.detector import TrainingBatch
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.images import batches
from tests.networks import Tokens


class Tiny(nn.Module):
    """Four stages of 4, 6, 8 and 12 channels, the last with both signs, and batch norm."""

    def __init__(self):
        super().__init__()
        widths = (3, 4, 6, 8, 12)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.Tanh()) for a, b in pairwise(widths)
        )

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        maps = []
        for layer in self.layers[:last]:
            x = layer(x)
            maps.append(x)
        return maps


def detector(backbone: type[nn.Module] = Tiny, **options) -> CutPaste:
    torch.manual_seed(3)
    return CutPaste(backbone(), **options)


def raw_images(count: int = 6, size: tuple[int, int] = (64, 48), seed: int = 0) -> Tensor:
    """Smooth random textures with noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(torch.randn(count, 3, 4, 4, generator=generator), size, mode="bicubic")
    return (128 + 40 * coarse + 10 * torch.randn(count, 3, *size, generator=generator)).clamp(0, 255).to(torch.uint8)


def step_of(model: CutPaste, images: Tensor, ids: Tensor | None = None, epoch: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(images)) if ids is None else ids
    [inputs] = model.steps(TrainingBatch(images, torch.zeros(len(images), dtype=torch.int64), ids, epoch, 7))
    return inputs


class Official(nn.Module):
    """The layers of pytorch-cutpaste's model.ProjectionNet, of torch's and torchvision's own."""

    def __init__(self, head_layers: int, classes: int):
        super().__init__()
        self.resnet18, layers, width = torchvision.models.resnet18(), [], 512
        for neurons in [512] * head_layers + [128]:
            layers += [nn.Linear(width, neurons), nn.BatchNorm1d(neurons), nn.ReLU()]
            width = neurons
        self.resnet18.fc, self.head, self.out = nn.Identity(), nn.Sequential(*layers), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.resnet18(x)))


@pytest.mark.parametrize(
    ("variant", "head_layers", "head"),  # (512 + 1 + 2) 512 a hidden layer, (512 + 1 + 2) 128, (128 + 1) classes
    [("normal", 0, 65_920 + 258), ("union", 1, 263_680 + 65_920 + 258), ("3way", 8, 8 * 263_680 + 65_920 + 387)],
)
def test_network_and_loss_are_the_official_ones(variant, head_layers, head):
    theirs = Official(head_layers, 3 if variant == "3way" else 2).train()
    ours = detector(ResNet18, variant=variant, head_layers=head_layers).train()
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == 11_176_512 + head
    ours.load_trained(theirs.state_dict(), "theirs.tch")
    images, classes = step_of(ours, raw_images(3))
    logits = theirs(images)
    loss, stats = ours(images, classes)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, classes).item(), rel=1e-5)
    assert stats["accuracy"].item() == pytest.approx((logits.argmax(1) == classes).double().mean().item())
    theirs_now = theirs.state_dict()  # batch norm saw good and pasted images together in both
    torch.testing.assert_close(ours.head.state_dict(), theirs.head.state_dict(), rtol=1e-4, atol=1e-5)
    for name, value in ours.backbone.state_dict().items():
        torch.testing.assert_close(value, theirs_now[f"resnet18.{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_has_every_image_good_and_with_each_defect(variant):
    model, images, ids = detector(variant=variant), raw_images(40), torch.arange(100, 140)
    made, classes = step_of(model, images, ids)
    good, *bad = made.split(40)
    assert classes.tolist() == sorted([*range(len(bad) + 1)] * 40) and len(bad) == (2 if variant == "3way" else 1)
    raw = jitter_by_torchvision(images, ids, 2)
    byte = 1.01 / 255 / 0.224  # between the two roundings, in normalized units
    assert ((good - normalize(raw)).abs() > byte).float().mean() < 0.02
    whole = (good * torch.tensor((0.229, 0.224, 0.225))[:, None, None] * 255).round()  # up to the mean of ImageNet
    raw = (whole + torch.tensor((0.485, 0.456, 0.406))[:, None, None] * 255).round().to(torch.uint8)
    torch.testing.assert_close(normalize(raw), good)
    expected = [normalize(DEFECTS[name]()(raw, ids, 2, seed=7)[0]) for name in VARIANTS[variant]]
    if variant == "union":
        first, second = ((bad[0] == each).flatten(1).all(1) for each in expected)
        assert (first ^ second).all() and 10 < first.sum() < 30
        assert torch.equal(step_of(model, images[5:9], ids[5:9])[0][4:], bad[0][5:9])
    else:
        assert all(torch.equal(a, b) for a, b in zip(bad, expected, strict=True))
    alone, _ = step_of(model, images[5:6], ids[5:6])  # whatever batch or process an image is in
    assert all(torch.equal(alone[i], part[5]) for i, part in enumerate([good, *bad]))
    assert not torch.equal(step_of(model, images, ids, epoch=3)[0][:40], good)


def jitter_by_torchvision(images: Tensor, ids: Tensor, epoch: int) -> Tensor:
    """ColorJitter(0.1, 0.1, 0.1, 0.1) with our random numbers, image by image."""
    made = []
    for image, draws in zip(images, uniform((7, epoch, 0, ids, 0), 8)):
        spread = 0.1 * (2 * draws[:4] - 1)
        apply = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        pixels = image.float() / 255
        for which in draws[4:].argsort().tolist():
            pixels = apply[which](pixels, float(spread[which] + (which < 3)))
        made.append((pixels * 255).round().to(torch.uint8))
    return torch.stack(made)


def test_the_loss_is_the_mean_log_probability_and_full_precision_in_autocast():
    model = detector().double().train()
    images, classes = step_of(model, raw_images(4))
    with torch.no_grad():
        logits = model.out(model.head(model.backbone.forward_stages(images.double())[3].mean((2, 3))))
        loss, stats = model(images.double(), classes)
    rows = [
        [row[k] - math.log(sum(math.exp(v) for v in row)) for k in range(3)] for row in logits.tolist()
    ]  # log softmax
    assert loss.item() == pytest.approx(-np.mean([row[k] for row, k in zip(rows, classes.tolist())]), rel=1e-12)
    assert stats["accuracy"].item() == pytest.approx(np.mean([np.argmax(r) == k for r, k in zip(rows, classes)]))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(images, classes)[0].dtype == torch.float32


@pytest.mark.slow
def test_it_learns_to_tell_pasted_images_and_scores_them_higher():
    stripes = 128 + 50 * torch.sin(torch.arange(32) / 2).expand(36, 3, 32, 32)
    train, test = (stripes + 10 * torch.randn(36, 3, 32, 32)).to(torch.uint8).split([12, 24])
    model = detector(ResNet18, variant="normal").train()
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for epoch in range(40):
        loss, stats = model(*step_of(model, train, epoch=epoch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(stats["accuracy"].item())
    assert np.mean(seen[:4]) < 0.7 < 0.8 < np.mean(seen[-4:])
    model.fit(batches(normalize(train), 12), 12)
    good, bad = model.score(step_of(model, test)[0])[1].split(24)
    assert (bad[:, None] > good).float().mean() > 0.7  # AUROC


def test_what_the_last_stage_does_not_read_is_not_trained():
    model = detector(MobileNetV2)
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert idle == {f"backbone.features.18.{name}" for name in ("0.weight", "1.weight", "1.bias")}
    assert model.head[0].in_features == 320 and model.train().backbone.training


def test_mistakes_are_one_line():
    for options, text in (
        ({"variant": "4way"}, "variant='4way' is unknown.*; one of: normal, scar, union, 3way"),
        ({"density": "gde"}, "density='gde' is unknown; one of: gaussian, kde"),
        ({"image_score": "patch"}, "image_score='patch' is unknown; one of: density, max, top1, mean"),
    ):
        with pytest.raises(UserError, match=text):
            detector(**options)
    with pytest.raises(UserError, match=r"cutpaste pools a map .* \(8, 16\)"):
        detector(Tokens)
    with pytest.raises(UserError, match="CutPaste is not fitted"):
        detector().examine(normalize(raw_images(1)))
    with pytest.raises(UserError, match=r"longest scar needs 30 pixels; use a larger data\.size"):
        step_of(detector(), raw_images(1, (32, 29)))
    with pytest.raises(UserError, match=r"1 training image.* singular.* density=kde"):
        detector().fit(batches(normalize(raw_images(1)), 1), 1)
    with pytest.raises(UserError, match="singular"):
        detector().fit(batches(normalize(raw_images(1)).expand(4, -1, -1, -1), 2), 4)
    alone = detector(density="kde").train()
    assert alone(*step_of(alone, raw_images(1)))[0].isfinite()  # a batch of one, with its defects
    alone.fit(batches(normalize(raw_images(1)), 1), 1)
    assert alone.examine(normalize(raw_images(2))).scores.isfinite().all()
    broken = normalize(raw_images(3))
    broken[1] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        detector().fit(batches(broken, 3), 3)
