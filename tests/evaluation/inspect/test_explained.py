"""Grad-CAM of classes, similarities and scores, against the equations with gradients found in another way."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.normalize import normalize
from evaluation.inspect.gradcam import class_target, explain, last_map, score_target, similarity_target, target_of
from models.anomaly import DETECTORS
from models.anomaly.detector import Detector
from models.backbones import BACKBONES
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18
from models.backbones.vit import ViTTiny
from models.classifier import Classifier
from runtime.errors import UserError
from tests.images import batches
from tests.networks import FourStages
from tests.slow import leaving

STATE = {"classes": ["a", "b", "c"], "config": {"loss": {"name": "cross_entropy"}}, "calibration": {"temperature": 2.0}}


def classifier(backbone: nn.Module) -> Classifier:
    return Classifier(backbone, nn.Linear(backbone.num_features, 3)).double().eval()


def by_equations(maps: Tensor, gradients: Tensor) -> Tensor:
    """Equations 1 and 2 for maps and gradients (C, h, w), pixel by pixel."""
    heat = torch.zeros(maps.shape[1:], dtype=torch.float64)
    for channel, gradient in zip(maps, gradients):
        heat += sum(gradient.flatten().tolist()) / gradient.numel() * channel
    return heat.clamp(min=0)


def test_of_a_pooled_cnn_it_is_the_class_activation_map():
    """Before pooling and a linear layer the gradient is the layer's weight over h w (Zhou et al. 2016)."""
    network, image = classifier(FourStages()), torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        maps, logits = network.backbone.forward_stages(image)[-1][0], network(image)[0]  # (64, 4, 3), (3,)
    for number, name in enumerate("abc"):
        target = class_target(network, image, STATE, name)
        gradients = network.head.weight[number].detach()[:, None, None].expand_as(maps) / 12
        torch.testing.assert_close(explain(target, image), by_equations(maps, gradients))
        probability = float(target.value(image).detach())
        assert probability == pytest.approx(float((logits / 2).softmax(0)[number]), abs=1e-6)
    likeliest = class_target(network, image, STATE)
    assert likeliest.what.startswith("abc"[int(logits.argmax())]) and all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("registers", [0, 2])
def test_of_a_vit_it_is_that_of_the_last_blocks_first_norm(registers):
    vit = ViTTiny(size=16, patch=8, registers=registers)
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    network, image = classifier(vit), torch.randn(1, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        x = vit.tokens(image)
        for block in vit.blocks[:-1]:
            x = block(x)
        last = vit.blocks[-1]
        normed = last.norm1(x)

    def logits(patches: Tensor) -> Tensor:
        y = x + last.attn(torch.cat([normed[:, : 1 + registers], patches], dim=1))
        y = y + last.mlp(last.norm2(y))
        return network.head(vit.norm(y)[:, 0])[0]

    patches = normed[:, 1 + registers :]  # (1, 6, D)
    each = torch.autograd.functional.jacobian(logits, patches)  # (3, 1, 6, D)
    heats = [explain(class_target(network, image, STATE, name), image) for name in "abc"]
    for gradients, heat in zip(each, heats):
        as_maps = [values[0].T.reshape(-1, 2, 3) for values in (patches, gradients)]  # (D, 2, 3)
        torch.testing.assert_close(heat, by_equations(*as_maps))
    assert max(float(heat.max()) for heat in heats) > 0
    assert not any(module._forward_hooks for module in vit.modules())


def test_similarity_is_that_of_the_projection_and_with_itself_no_zero():
    backbone = FourStages().double().eval()
    image, other = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        maps, features, reference = backbone.forward_stages(image)[-1][0], backbone(image), backbone(other)
    for given, direction in ((other, reference), (None, features)):
        target = similarity_target(backbone, image, given)
        weights = (F.normalize(direction) / features.norm())[0]  # of the pooled channels
        expected = by_equations(maps, weights[:, None, None].expand_as(maps) / 4)
        torch.testing.assert_close(explain(target, image), expected)
        assert expected.max() > 0
        assert float(target.value(image)) == pytest.approx(float(F.cosine_similarity(features, direction)))
    assert float(similarity_target(backbone, image).value(image)) == pytest.approx(1)


@pytest.mark.parametrize("backbone", [ResNet18, MobileNetV2])
def test_the_last_map_is_what_is_pooled(backbone):
    network = backbone().eval()
    images = torch.randn(1, 3, 64, 64)
    with last_map(network) as seen:
        features = network(images)
    torch.testing.assert_close(seen[0].mean((2, 3)), features)
    assert len(seen) == 1 and not any(module._forward_hooks for module in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_explained(name):
    network = BACKBONES[name]().eval()
    image = torch.randn(1, 3, 96, 96)
    target = similarity_target(network, image)
    [layer], value = target.layers(image.clone())
    assert layer.ndim == 4 and layer.shape[2] * layer.shape[3] > 1
    assert torch.autograd.grad(value.sum(), layer)[0].abs().max() > 0
    assert explain(target, image).shape == layer.shape[2:]


# -------------------------------------------------------------------- detectors

DIFFERENTIABLE = {
    "patchcore": ("patchcore", {"coreset": 0.5}),
    "patchcore amazon": ("patchcore", {"mode": "amazon", "coreset": 0.5}),
    "patchcore anomalib": ("patchcore", {"mode": "anomalib", "coreset": 0.5, "image_score": "top1"}),
    "embedding knn": ("embedding", {"combine": "sum", "stages": (3, 4)}),
    "embedding knn_squared": ("embedding", {"distance": "knn_squared"}),
    "embedding mahalanobis": ("embedding", {"distance": "mahalanobis"}),
    "padim": ("padim", {}),
    "padim channels": ("padim", {"channels": 8, "form": "covariance", "image_score": "mean"}),
    "subspace": ("subspace", {}),
    "rd4ad": ("rd4ad", {}),
    "cdo": ("cdo", {}),
    "cdo v1": ("cdo", {"version": "v1"}),
    "regad": ("regad", {}),
}
SLOW = {
    "embedding mahalanobis",
    "rd4ad",
    "cdo",
    "cdo v1",
    "regad",
    "padim channels",
    "patchcore anomalib",
    "embedding knn_squared",
}


def textures(count: int) -> Tensor:
    stripes = 128 + 50 * torch.sin(torch.arange(64) / 2).expand(count, 3, 64, 64)
    return normalize((stripes + 10 * torch.randn(stripes.shape)).to(torch.uint8))


def fitted(name: str, options: dict) -> Detector:
    network = FourStages() if name in ("patchcore", "embedding", "padim", "subspace") else ResNet18()
    detector = DETECTORS[name](network, **options).eval()
    if detector.fits:
        detector.fit(batches(textures(5), 2), 5)
    return detector.eval()


@pytest.mark.parametrize("case", leaving(SLOW, DIFFERENTIABLE))
def test_the_gradient_of_a_score_is_how_it_grows(case, monkeypatch):
    """Along the gradient of all maps together a score grows by the gradient's length, by central differences."""
    detector, image = fitted(*DIFFERENTIABLE[case]), textures(1)
    image[:, :, 20:40, 24:40] += 2
    target = score_target(detector, image)
    layers, score = target.layers(image)
    assert float(score) == pytest.approx(float(detector.examine(image).scores), rel=1e-5)
    gradients = torch.autograd.grad(score.sum(), layers)
    length = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    assert length > 0
    networks, step = detector.networks, 1e-2

    def moved(outputs, by: float, rest: list[Tensor]):
        if isinstance(outputs, list | tuple):
            return type(outputs)(moved(part, by, rest) for part in outputs)
        return outputs + by * rest.pop(0) / length.float()

    ends = []
    for by in (step, -step):
        monkeypatch.setattr(detector, "networks", lambda x, by=by: moved(networks(x), by, [*gradients]))
        ends.append(float(target.layers(image)[1]))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(length), rel=0.05)


def test_patchcores_map_lies_where_its_score_comes_from_and_a_training_image_has_one():
    detector, image = fitted("patchcore", {"coreset": 1.0}), textures(1)
    image[:, :, 20:40, 24:40] += 3
    heat = explain(score_target(detector, image), image)  # (16, 16), a cell of 4 x 4 pixels
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:11, 5:11] = True
    assert heat.shape == (16, 16) and inside.flatten()[heat.argmax()]
    torch.manual_seed(0)
    detector.fit(batches(image, 1), 1)
    assert explain(score_target(detector, image), image).isfinite().all()  # all distances are 0


@pytest.mark.parametrize(("name", "options"), [("nsa", {}), ("embedding", {"source": "output"})])
def test_a_score_that_comes_from_no_maps_is_named(name, options):
    network = ResNet18() if name == "nsa" else FourStages()
    detector = DETECTORS[name](network, **options).eval()
    if detector.fits:
        detector.fit(batches(textures(3), 3), 3)
    image = textures(1)
    with pytest.raises(UserError, match=f"it cannot for this detector, {type(detector).__name__}"):
        explain(score_target(detector, image), image)


def test_which_target_and_mistakes():
    network, image = classifier(FourStages()), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert target_of(network, image, state=STATE, class_name="b").what.startswith("b, probability 0.")
    assert target_of(network, image, state=STATE, reference=image).what == "similarity with the reference, 1.00"
    assert target_of(network.backbone, image).what == "similarity with itself"
    for given, match in (
        ({"class_name": "d"}, "class_name=d is none of the run's classes: a, b, c"),
        ({"class_name": "a", "reference": image}, "two things to explain"),
    ):
        with pytest.raises(UserError, match=match):
            target_of(network, image, state=STATE, **given)
    with pytest.raises(UserError, match="class_name=a is for classifiers"):
        target_of(network.backbone, image, class_name="a")
