"""CDO's apprentice, noise patches, maps of both versions and training; the loss has its own test (tests/losses)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from data.defects.noise import NoisePatches
from data.normalize import normalize
from models.anomaly.cdo import CDO
from models.anomaly.detector import TrainingBatch
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18, ResNet34, WideResNet50
from runtime.errors import UserError
from tests.networks import Tokens


def detector(**options) -> CDO:
    torch.manual_seed(3)
    return CDO(ResNet18(), **options)


def train(model: CDO, images: Tensor, steps: int) -> list[dict[str, float]]:
    """Steps on images uint8 (B, 3, H, W), each an epoch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.5, 0.999))
    model.train()
    seen = []
    for epoch in range(steps):
        [inputs] = model.steps(TrainingBatch(images, None, torch.arange(len(images)), epoch, 0))
        loss, stats = model(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append({"loss": loss.item()} | {name: value.item() for name, value in stats.items()})
    return seen


@pytest.mark.parametrize("backbone", [ResNet18, WideResNet50, MobileNetV2])
def test_the_apprentice_has_the_experts_parameters_drawn_anew(backbone):
    expert = backbone()
    for parameter in expert.parameters():
        nn.init.constant_(parameter, 0.123)
    model = CDO(expert)
    names = [[n for n, _ in m.named_parameters()] for m in (model.backbone, model.apprentice)]
    assert names[0] == names[1]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model.backbone, model.apprentice)]
    assert sizes[0] == sizes[1]
    assert all((p == 0.123).all() for p in expert.parameters())
    assert not any((p == 0.123).any() for p in model.apprentice.parameters() if p.requires_grad)
    fresh = backbone().state_dict()
    for name, value in model.apprentice.state_dict().items():
        if value.ndim == 4 and value.numel() > 5000:  # of the constructor's distribution
            assert value.std().item() == pytest.approx(fresh[name].std().item(), rel=0.1), name
        elif "running" in name or "bn" in name:
            assert torch.equal(value, fresh[name]), name


@pytest.mark.parametrize("backbone", [ResNet18, MobileNetV2])
def test_all_that_is_trainable_gets_a_gradient_and_the_expert_never_moves(backbone):
    torch.manual_seed(0)
    model = CDO(backbone())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}  # DDP waits for every one
    assert trained and all(name.startswith("apprentice.") for name in trained)
    assert not any(module.training for module in model.backbone.modules()) and model.apprentice.training
    for name, value in model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, before[name]), name
        elif name in trained:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(("version", "enlarged"), [("v1", 1), ("v2", 4)])
def test_a_step_gets_the_versions_noise_of_every_image(version, enlarged):
    images, ids = torch.randint(256, (6, 3, 48, 64), dtype=torch.uint8), torch.arange(10, 16)
    [(noisy, abnormal)] = detector(version=version).steps(TrainingBatch(images, None, ids, 3, 5))
    made, masks = NoisePatches(enlarged=enlarged)(images, ids, 3, seed=5)
    assert torch.equal(noisy, normalize(made)) and torch.equal(abnormal, masks) and masks.any()
    alone = [*detector(version=version).steps(TrainingBatch(images[4:], None, ids[4:], 3, 5))]
    assert torch.equal(alone[0][0], noisy[4:])  # whatever batch or process an image is in


def test_patches_keep_off_the_background():
    model = detector(version="v1", skip_background=True)
    dark = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    [(_, abnormal)] = model.steps(TrainingBatch(dark, None, torch.arange(2), 0, 0))
    assert not abnormal.any()
    with pytest.raises(UserError, match="skip_background is of version v1"):
        detector(version="v2", skip_background=True)


def official_loss(version: str, expert: list[Tensor], apprentice: list[Tensor], mask: Tensor) -> Tensor:
    """caoyunkang/CDO with gamma 2: v2's model/cdo.py and loss/cdo_loss.py, v1's models/CDO.py, which has the same loss
    and no normalization in its forward pass. mask (B, H, W), 1 on noise."""
    if version == "v2":
        expert, apprentice = ([F.normalize(f, p=2, dim=1) for f in side] for side in (expert, apprentice))
    size, total = expert[0].shape[-2:], 0
    for fe, fa in zip(expert, apprentice):
        fe, fa = (F.interpolate(f, size=size, mode="bilinear", align_corners=True) for f in (fe, fa))
        where = F.interpolate(mask[:, None].double(), size, mode="nearest").flatten()
        fe, fa = (F.normalize(f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]), p=2, dim=1) for f in (fe, fa))
        d = ((fe - fa) ** 2).sum(1)
        normal, odd = d[where == 0], d[where != 0]
        w_normal, w_odd = ((normal / normal.mean()) ** 2).detach(), ((odd.mean() / odd) ** 2).detach()
        total = total + ((normal * w_normal).sum() - (odd * w_odd).sum()) / (w_normal.sum() + w_odd.sum()) * len(mask)
    return total


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_loss_and_gradient_are_the_versions(version):
    """Lengths that differ between positions, as after a ReLU: there the order of normalizing and enlarging matters."""
    torch.manual_seed(7)
    sides = [
        [torch.randn(2, c, s, s, dtype=torch.float64).relu() for c, s in ((8, 16), (12, 8), (20, 4))] for _ in "ea"
    ]
    expert, apprentice = [f * torch.rand(2, 1, *f.shape[2:], dtype=torch.float64) ** 3 for f in sides[0]], sides[1]
    apprentice = [f.requires_grad_() for f in apprentice]
    abnormal = torch.rand(2, 64, 64) < 0.2
    model = detector(version=version).double()
    model.networks = lambda _: (expert, apprentice)
    loss, _ = model(None, abnormal)
    expected = {name: official_loss(name, expert, apprentice, abnormal) for name in ("v1", "v2")}
    torch.testing.assert_close(loss, expected[version], rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, apprentice) for x in (loss, expected[version]))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert abs(expected["v1"] - expected["v2"]) > 0.01 * abs(expected["v2"])


def by_hand(model: CDO, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        outputs = model.eval().networks(images)
    total, size = 0, images.shape[-2:]
    for expert, apprentice in zip(*([x.double() for x in side] for side in outputs)):
        if model.version == "v1":
            first = outputs[0][0].shape[-2:]
            expert, apprentice = (
                F.interpolate(x, first, mode="bilinear", align_corners=True) for x in (expert, apprentice)
            )
        cosine = (expert * apprentice).sum(1) / (expert.norm(dim=1) * apprentice.norm(dim=1))
        level = 2 - 2 * cosine if model.version == "v1" else (1 - cosine) / 3
        total = (
            total + F.interpolate(level[:, None], size, mode="bilinear", align_corners=model.version == "v2")[:, 0]
        )  # (B, H, W)
    return np.stack([gaussian_filter(each, 4) for each in total.numpy()])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_maps_and_scores_are_the_versions(version):
    model, images = detector(version=version), torch.randn(2, 3, 64, 96)
    maps, scores = model.score(images)
    expected = by_hand(model, images)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)
    ordered = np.sort(expected.reshape(2, -1), axis=1)
    top = ordered[:, -1] if version == "v1" else ordered[:, -(64 * 96 // 100) :].mean(1)
    np.testing.assert_allclose(scores.numpy(), top, atol=1e-5)
    other = detector(version=version, image_score="mean")
    np.testing.assert_allclose(other.score(images)[1].numpy(), expected.mean((1, 2)), atol=1e-5)


def test_padding_enters_neither_map_nor_score():
    model, images = detector(), torch.randn(1, 3, 64, 64)
    valid = torch.zeros(1, 64, 64, dtype=torch.bool)
    valid[:, :40] = True
    found = model.examine(images, valid)
    assert (found.maps[~valid] == 0).all() and (found.maps[valid] > 0).all()
    assert found.scores.item() == pytest.approx(found.maps[valid].sort().values[-(40 * 64 // 100) :].mean().item())


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_it_learns_one_image_and_finds_what_does_not_belong(version):
    model = detector(version=version)
    image = 128 + 50 * torch.sin(torch.arange(64) / 2).expand(1, 3, 64, 64) + 5 * torch.randn(1, 3, 64, 64)
    image = image.to(torch.uint8)
    seen = train(model, image.expand(4, -1, -1, -1).contiguous(), 60)
    image = normalize(image)
    first, last = seen[0], seen[-1]
    assert last["discrepancy_normal"] < 0.3 * first["discrepancy_normal"]
    marked = [s for s in seen[-20:] if s["discrepancy_abnormal"] > 0]
    ratios = [s["discrepancy_abnormal"] / s["discrepancy_normal"] for s in marked]
    assert len(ratios) > 10 and np.mean(ratios) > 1.25  # patches are small beside the cells of stage 3
    spoilt = image.clone()
    spoilt[:, :, 24:40, 16:32] = 2 * torch.randn(1, 3, 16, 16)
    found, normal = model.examine(spoilt), model.examine(image)
    assert found.scores.item() > 1.5 * normal.scores.item()
    y, x = found.peaks[0].tolist()
    assert 20 <= y <= 44 and 12 <= x <= 36


def test_state_dict_round_trip():
    model, images = detector(), torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    train(model, images, 2)
    images = normalize(images)
    fresh = CDO(ResNet18())
    fresh.load_state_dict(model.state_dict())
    for a, b in zip(fresh.score(images), model.score(images)):
        assert torch.equal(a, b)


class Scaled(ResNet18):
    """A backbone with weights that no layer can draw anew."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def test_the_apprentice_may_be_another_network_of_the_experts_shapes():
    model = CDO(ResNet34(), apprentice="resnet18")
    assert len(model.backbone.layer3) == 6 and len(model.apprentice.layer3) == 2
    train(model, torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), 1)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    with pytest.raises(UserError, match=r"apprentice=resnet50 has stages \[\(256, 16, 16\)"):
        CDO(ResNet34(), apprentice="resnet50")
    with pytest.raises(UserError, match=r"detector\.apprentice='resnet' is unknown"):
        CDO(ResNet34(), apprentice="resnet")


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"stages of maps, this backbone gives \[\(8, 16\)"):
        CDO(Tokens())
    with pytest.raises(UserError, match="cannot draw new weights"):
        CDO(Scaled())
    with pytest.raises(UserError, match="version='v3' is unknown"):
        detector(version="v3")
    with pytest.raises(UserError, match=r"use a larger data\.size"):
        train(detector(version="v1"), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 1)
