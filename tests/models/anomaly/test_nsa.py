"""NSA's network against the official layers, its steps, loss, maps and training; the patches are in tests/data."""

import numpy as np
import pytest
import torch
import torchvision
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from data.defects.nsa import NSADefect as Defects
from data.normalize import normalize
from models.anomaly import DetectorConfig, build_detector
from models.anomaly.detector import TrainingBatch
from models.anomaly.nsa import NSA, LocalizationDecoder
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18, ResNet50
from runtime.errors import UserError
from tests.networks import Tokens


def detector(**options) -> NSA:
    torch.manual_seed(3)
    return NSA(ResNet18(), **options)


def raw_images(count: int, height: int, width: int) -> Tensor:
    """Stripes and noise: uint8 (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(count)
    stripes = 128 + 50 * torch.sin(torch.arange(width) / 2).expand(count, 3, height, width)
    return (stripes + 20 * torch.randn(stripes.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def batch(images: Tensor, epoch: int = 0, first: int = 0) -> TrainingBatch:
    return TrainingBatch(images, None, torch.arange(first, first + len(images)), epoch, 0)


class OfficialBlock(nn.Module):
    """The official TransposeBasicBlock with stride 2."""

    def __init__(self, inputs, planes):
        super().__init__()
        about = {"stride": 2, "output_padding": 1, "bias": False}
        self.conv1 = nn.ConvTranspose2d(inputs, planes, kernel_size=3, padding=1, dilation=1, **about)
        self.bn1, self.relu = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.upsample = nn.Sequential(nn.ConvTranspose2d(inputs, planes, 1, **about), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.upsample(x)
        return self.relu(out)


class Official(nn.Module):
    """resnet18_enc_dec(final_activation="sigmoid") of model/resnet.py: torchvision's ResNet-18 and the decoder."""

    def __init__(self):
        super().__init__()
        for name, layer in torchvision.models.resnet18().named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, layer)
        one, two = nn.Conv2d(512, 256, 1, bias=False), nn.Conv2d(256, 128, 1, bias=False)
        self.nin = nn.Sequential(one, nn.ReLU(inplace=True), two, nn.ReLU(inplace=True))
        for number, (inputs, planes) in enumerate(((128, 64), (64, 32), (32, 16)), start=1):
            self.add_module(f"uplayer{number}", nn.Sequential(OfficialBlock(inputs, planes)))
        self.upsample = nn.UpsamplingBilinear2d(scale_factor=2)
        self.convtranspose1 = nn.ConvTranspose2d(16, 1, 7, stride=2, padding=3, bias=False, output_padding=1)
        self.final_activation = nn.Sigmoid()

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def test_the_network_is_the_official_one(tmp_path):
    torch.manual_seed(0)
    official, images = Official(), torch.randn(2, 3, 64, 96)
    for _ in range(2):
        official(images)  # statistics of batch norm that are not the first
    torch.save(official.state_dict(), tmp_path / "final_bottle.pt")
    ours, _ = build_detector(DetectorConfig(name="nsa", weights=str(tmp_path / "final_bottle.pt")), ResNet18())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in official.parameters()) == 11_497_712
    assert sum(p.numel() for p in ours.decoder.parameters()) == 321_200
    with torch.no_grad():
        expected = official.eval()(images)[:, 0]
        found = ours.examine(images)
    torch.testing.assert_close(found.maps, expected)
    torch.testing.assert_close(found.scores, expected.mean((1, 2)))  # test_real_anomalies: mean over the map


def test_the_decoder_starts_as_the_official_one():
    torch.manual_seed(1)
    for name, value in LocalizationDecoder(512).named_parameters():
        if "convtranspose1" in name or ("conv1" in name or "upsample.0" in name):  # PyTorch's default
            bound = (value.shape[1] * value[0, 0].numel()) ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
        elif value.ndim == 4:  # He, fan out
            assert value.std().item() == pytest.approx((2 / (value.shape[0] * value[0, 0].numel())) ** 0.5, rel=0.1)
            assert value.abs().max() > 2.5 * value.std(), name  # normal, not uniform


@pytest.mark.parametrize(("backbone", "channels"), [(ResNet18, 512), (ResNet50, 2048), (MobileNetV2, 320)])
def test_any_backbone_of_stride_32_and_all_of_it_that_is_used_is_trained(backbone, channels):
    model = NSA(backbone()).train()
    assert model.decoder.nin[0].weight.shape == (256, channels, 1, 1)
    [inputs] = model.steps(batch(raw_images(2, 64, 96)))
    loss, _ = model(*inputs)
    loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith("backbone.features.18.") for name in idle) == (backbone is MobileNetV2 or not idle)
    assert model.backbone.training and model.networks(torch.zeros(1, 3, 64, 128)).shape == (1, 64, 128)


def test_building_it_leaves_weights_and_statistics_alone():
    torch.manual_seed(3)
    before = {name: value.clone() for name, value in ResNet18().state_dict().items()}
    for name, value in detector().backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_step_blends_patches_of_the_image_before():
    images = raw_images(4, 64, 64)
    options = {"gradients": "source", "patches": 2, "bounds": (0.1, 0.3), "widths": (0.05, 0.2), "resize": (0.7, 1.3)}
    options |= {"steepness": 0.5, "middle": 3.0, "background": (128.0, 1.0), "min_object": 0.3}
    [(made, labels)] = detector(**options).steps(batch(images, epoch=2, first=10))
    defects, ids = Defects(**options), torch.arange(10, 14)
    sources = torch.stack([images[3], images[0], images[1], images[2]])
    expected, masks = defects(images, ids, 2, seed=0, sources=sources)
    assert torch.equal(made, normalize(expected)) and masks.any()
    assert torch.equal(labels, defects.labels(images, expected, masks)) and labels.max() > 0.5
    model, few = detector(shift=3), batch(images)
    moved, others = model.varied(images, few, 0), model.varied(images.roll(1, 0), few, 1)  # each by its own numbers
    expected, _ = Defects()(moved, few.ids, 0, seed=0, sources=others)
    assert torch.equal(next(model.steps(few))[0], normalize(expected))
    [(alone, _)] = detector().steps(batch(images[:1]))
    assert torch.equal(alone, normalize(Defects()(images[:1], torch.arange(1), 0, seed=0)[0]))  # its own source


def test_images_are_shifted_turned_and_flipped():
    images = raw_images(200, 64, 48)
    assert detector().varied(images, batch(images), 0) is images
    moved = detector(shift=3).varied(images, batch(images), 0)
    padded = nn.functional.pad(images.float(), [3] * 4, mode="replicate").to(torch.uint8)
    found = set()
    for one, larger in zip(moved, padded):
        places = [(y, x) for y in range(7) for x in range(7) if torch.equal(one, larger[:, y : y + 64, x : x + 48])]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 45  # of 49
    assert not torch.equal(moved, detector(shift=3).varied(images, batch(images), 1))  # sources have their own
    assert torch.equal(moved[7:9], detector(shift=3).varied(images[7:9], batch(images[7:9], first=7), 0))
    flipped = (detector(flip=True).varied(images, batch(images), 0) != images).flatten(1).any(1)
    assert torch.equal(detector(flip=True).varied(images, batch(images), 0)[flipped], images[flipped].flip(2))
    assert 0.4 < flipped.double().mean() < 0.6
    rim = (torch.arange(64)[:, None] - 31.5) ** 2 + (torch.arange(48) - 23.5) ** 2
    turned = detector(turn=5.0).varied(images, batch(images), 0)
    near = rim < 2  # a turn of 5 degrees moves them by less than half a pixel
    assert torch.equal(turned[..., near], images[..., near])
    ramp = torch.arange(64, dtype=torch.uint8)[:, None].expand(200, 3, 64, 48).contiguous()
    slope = (ramp.float() - detector(turn=5.0).varied(ramp, batch(ramp), 0).float())[:, 0, 32]  # (200, 48)
    degrees = torch.rad2deg(torch.atan((slope[:, -1] - slope[:, 0]) / 47))
    assert degrees.abs().max() < 6.5 and degrees.min() < -3.5 and degrees.max() > 3.5 and abs(degrees.mean()) < 0.8


def test_loss_and_gradients_are_the_cross_entropy_pixel_by_pixel():
    model = detector().double().train()
    images = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    labels = torch.rand(2, 32, 64, dtype=torch.float64) * (torch.rand(2, 32, 64) < 0.3)
    loss, stats = model(images, labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    p = model.networks(images).sigmoid()
    flat = [(q, y) for q, y in zip(p.flatten(), labels.flatten().tolist())]
    naive = -sum(y * q.log() + (1 - y) * (1 - q).log() for q, y in flat) / len(flat)
    torch.testing.assert_close(loss, naive)
    for ours, theirs in zip(gradients, torch.autograd.grad(naive, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)
    assert stats["probability_defect"].item() == pytest.approx(p[labels > 0].mean().item())
    assert stats["probability_normal"].item() == pytest.approx(p[labels == 0].mean().item())
    assert model(images, labels * 0)[1]["probability_defect"] == 0


def test_autocast_leaves_the_loss_in_float32():
    model = detector().train()
    [(images, labels)] = model.steps(batch(raw_images(2, 64, 64)))
    exact, _ = model(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(images, labels)
        maps = model.examine(images).maps
    assert loss.dtype == maps.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_map_score_and_peak():
    images = torch.randn(2, 3, 64, 96)
    for how, expected in (("mean", np.mean), ("max", np.max)):
        model = detector(image_score=how).eval()
        with torch.no_grad():
            maps = 1 / (1 + np.exp(-model.networks(images).double().numpy()))
        found = model.examine(images)
        np.testing.assert_allclose(found.maps.numpy(), maps, atol=1e-6)
        np.testing.assert_allclose(found.scores.numpy(), [expected(m) for m in maps], atol=1e-6)
        for peak, one in zip(found.peaks.tolist(), found.maps.numpy()):
            assert tuple(peak) == tuple(np.add(np.unravel_index(one.argmax(), one.shape), 0.5))
    valid = torch.zeros(2, 64, 96, dtype=torch.bool)
    valid[:, :40, :70] = True
    found = detector().examine(images, valid)
    assert (found.maps[~valid] == 0).all()
    np.testing.assert_allclose(found.scores, found.maps[:, :40, :70].mean((1, 2)), atol=1e-6)


@pytest.mark.slow
def test_it_learns_to_find_patches_in_images_that_it_has_not_seen():
    """Dark on the left, bright on the right: a patch with an edge elsewhere does not belong."""
    torch.manual_seed(0)
    halves = torch.where(torch.arange(32) > 16, 210.0, 40.0).expand(32, 3, 32, 32)
    images = (halves + 5 * torch.randn(halves.shape)).clamp(0, 255).to(torch.uint8)
    options = {"gradients": "source", "bounds": (0.15, 0.35), "resize": (0.7, 1.3)}
    model = NSA(ResNet18(), **options).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(50):
        [inputs] = model.steps(batch(images[:16], epoch))
        loss, _ = model(*inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    defects, fresh = Defects(**options, patches=1), images[16:]
    made, masks = defects(fresh, torch.arange(16), 99, seed=5, sources=fresh.roll(1, 0))
    labels = defects.labels(fresh, made, masks) > 0.5
    assert roc_auc_score(labels.flatten(), model.examine(normalize(made)).maps.flatten()) > 0.8


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"makes \(512, 8, 8\), not .* without backbone\.stem=cifar"):
        NSA(ResNet18(stem="cifar"))
    with pytest.raises(UserError, match=r"makes \(8, 16\)"):
        NSA(Tokens())
    with pytest.raises(UserError, match=r"\(3, 2\) of \(72, 64\): set data\.size to multiples of 32"):
        detector().examine(torch.zeros(1, 3, 72, 64))
    with pytest.raises(UserError, match=r"use a larger data\.size"):
        list(detector(bounds=(0.03, 0.2)).steps(batch(raw_images(1, 32, 32))))
