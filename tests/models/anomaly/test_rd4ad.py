"""RD4AD's networks, score and training behavior; the loss has its own test (tests/losses)."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from models.anomaly.rd4ad import RD4AD
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18, ResNet34, ResNet50, ResNet101, WideResNet50
from runtime.errors import UserError


def detector() -> RD4AD:
    torch.manual_seed(3)
    return RD4AD(ResNet18())


def textures(count: int, size: int = 64) -> Tensor:
    """Vertical stripes with a little noise."""
    stripes = torch.sin(torch.arange(size) / 2).expand(count, 3, size, size)
    return stripes + 0.1 * torch.randn(count, 3, size, size)


def train(model: RD4AD, images: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3, betas=(0.5, 0.999))
    model.train()
    losses = []
    for _ in range(steps):
        loss, _ = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Parameters of the official BN_layer and de_resnet, counted on networks built as hq-deng/RD4AD's models/resnet.py and
# models/de_resnet.py build them; their outputs on equal weights were found to be equal, too
OFFICIAL = [
    (ResNet18, 12_205_312, 3_703_168),
    (ResNet34, 16_925_952, 5_770_624),
    (ResNet50, 39_222_272, 15_821_824),
    (WideResNet50, 67_277_824, 24_917_504),
]


@pytest.mark.parametrize(("backbone", "bottleneck", "decoder"), OFFICIAL)
def test_parameters_are_as_many_as_in_the_official_code(backbone, bottleneck, decoder):
    with torch.device("meta"):  # the sizes without the memory
        model = RD4AD(backbone())
    assert sum(p.numel() for p in model.bn.parameters()) == bottleneck
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder


def test_parameters_are_named_as_in_the_official_code():
    with torch.device("meta"):
        basic, deep = RD4AD(ResNet18()), RD4AD(ResNet50())
    shapes = {name: tuple(value.shape) for name, value in basic.state_dict().items()}
    assert shapes["bn.bn_layer.0.downsample.0.weight"] == (512, 768, 1, 1)
    assert shapes["bn.bn_layer.0.conv1.weight"] == (512, 768, 3, 3)
    assert shapes["bn.conv4.weight"] == (512, 1024, 1, 1) and shapes["bn.bn4.running_var"] == (512,)
    assert shapes["decoder.layer1.0.conv1.weight"] == (512, 256, 2, 2)  # transposed convolutions: (in, out, 2, 2)
    assert shapes["decoder.layer3.0.upsample.0.weight"] == (128, 64, 2, 2)
    assert shapes["decoder.layer3.1.conv1.weight"] == (64, 64, 3, 3)
    shapes = {name: tuple(value.shape) for name, value in deep.state_dict().items()}
    assert shapes["bn.bn_layer.0.downsample.0.weight"] == (2048, 3072, 1, 1)
    assert shapes["decoder.layer1.0.conv2.weight"] == (256, 256, 2, 2)
    assert shapes["decoder.layer1.0.upsample.0.weight"] == (2048, 1024, 2, 2)
    assert "decoder.layer3.5.bn3.bias" in shapes and "decoder.layer3.6.bn3.bias" not in shapes


def test_initialization_is_the_official_one():
    model = detector()
    conv, up = model.bn.conv2.weight, model.decoder.layer1[0].conv1.weight
    assert abs(conv.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.01  # He, fan out
    assert up.abs().max() <= (256 * 4) ** -0.5  # PyTorch's default: uniform, bound 1 / sqrt(weight.shape[1] * 2 * 2)
    norms = [m for part in (model.bn, model.decoder) for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


@pytest.mark.parametrize(
    ("teacher", "student", "kind"),
    [(ResNet34, "resnet18", ResNet18), (ResNet18, "resnet34", ResNet34), (WideResNet50, "resnet50", ResNet50)],
)
def test_a_student_of_another_depth_has_its_own_blocks(teacher, student, kind):
    with torch.device("meta"):
        ours, expected = RD4AD(teacher(), student=student), RD4AD(kind())
    for mine, theirs in ((ours.bn, expected.bn), (ours.decoder, expected.decoder)):
        shapes = [{name: value.shape for name, value in part.state_dict().items()} for part in (mine, theirs)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (MobileNetV2, "auto"),
        (MobileNetV2, "resnet50"),
        (ResNet18, "resnet50"),
        pytest.param(ResNet101, "auto", marks=pytest.mark.slow),
    ],
)
def test_any_teacher_whose_stages_halve_has_a_student(teacher, student):
    torch.manual_seed(0)
    model = RD4AD(teacher(), student=student).train()
    losses = train(model, textures(2), 3)
    assert losses[-1] < losses[0]
    teacher_maps, student_maps = model.networks(torch.randn(2, 3, 64, 96))
    assert [t.shape for t in teacher_maps] == [s.shape for s in student_maps]


class Stages(nn.Module):
    """A backbone of stages of the given shapes, on 64 x 64 pixels."""

    def __init__(self, *shapes: tuple[int, ...]):
        super().__init__()
        self.shapes, self.weight = shapes, nn.Parameter(torch.ones(1))

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        return [x.new_zeros(len(x), *shape) for shape in self.shapes[:last]]


@pytest.mark.parametrize(
    "shapes", [((8, 4, 4),) * 3, ((8, 16),) * 3, ((8, 16, 16), (8, 8, 8), (8, 4, 5)), ((8, 8, 8), (8, 4, 4), (16, 3))]
)
def test_stages_that_do_not_halve_are_refused(shapes):
    with pytest.raises(UserError, match="halve each other; from 64 x 64 pixels this one makes"):
        RD4AD(Stages(*shapes))


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(UserError, match="multiple of 32"):
        detector()(torch.randn(2, 3, 72, 72))


def test_score_is_the_smoothed_sum_of_cosine_distances():
    model, images = detector(), torch.randn(2, 3, 64, 96)
    train(model, images, 1)  # moves the BatchNorm statistics away from their start
    maps, scores = model.score(images)
    with torch.no_grad():
        teacher, student = model.eval().networks(images)
    expected = np.zeros((2, 64, 96))
    for t, s in zip((x.double().numpy() for x in teacher), (x.double().numpy() for x in student)):
        distance = 1 - (t * s).sum(1) / np.sqrt((t**2).sum(1) * (s**2).sum(1))
        rows = np.linspace(0, t.shape[2] - 1, 64)  # corners aligned: first on first, last on last
        columns = np.linspace(0, t.shape[3] - 1, 96)
        for image in range(2):
            tall = np.stack([np.interp(rows, np.arange(t.shape[2]), line) for line in distance[image].T], axis=1)
            expected[image] += np.stack([np.interp(columns, np.arange(t.shape[3]), line) for line in tall])
    expected = np.stack([gaussian_filter(each, 4) for each in expected])
    assert maps.shape == (2, 64, 96) and maps.dtype == torch.float32 and scores.shape == (2,)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(scores.numpy(), expected.max((1, 2)), atol=1e-5)


def test_loss_is_the_sum_of_the_stages():
    loss, stats = detector()(torch.randn(2, 3, 32, 32))
    assert list(stats) == ["loss_stage1", "loss_stage2", "loss_stage3"]
    assert loss.requires_grad and not any(value.requires_grad for value in stats.values())
    assert torch.allclose(loss, sum(stats.values()))


def test_only_bottleneck_and_decoder_are_trained_and_all_of_their_parameters_are():
    model = detector().train()
    model(torch.randn(2, 3, 32, 32))[0].backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}  # DDP waits for every one
    idle = {name for name, _ in model.named_parameters() if not name.startswith("backbone.")} - trained
    assert idle == {"bn.conv4.weight", "bn.bn4.weight", "bn.bn4.bias"}
    assert all(name.startswith(("bn.", "decoder.")) for name in trained)


def test_the_teacher_does_not_change():
    model = detector().train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    train(model, textures(2, 32), 3)
    assert model.training and model.bn.training and not any(m.training for m in model.backbone.modules())
    after = model.backbone.state_dict()
    assert "layer2.0.bn1.running_mean" in after and all(torch.equal(after[name], before[name]) for name in before)


def test_scoring_changes_nothing_and_does_not_depend_on_mode_or_batch():
    model, images = detector(), torch.randn(5, 3, 64, 64)
    train(model, images, 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    maps, scores = model.train().score(images)
    assert model.bn.training and not scores.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    alone = [model.eval().score(image[None]) for image in images]
    assert torch.allclose(maps, torch.cat([part[0] for part in alone]), atol=1e-5)
    assert torch.allclose(scores, torch.cat([part[1] for part in alone]), atol=1e-5)


def test_state_dict_round_trip():
    model, images = detector(), textures(2, 32)
    train(model, images, 2)
    fresh = RD4AD(ResNet18())  # other random weights
    fresh.load_state_dict(model.state_dict())
    for a, b in zip(fresh.score(images), model.score(images)):
        assert torch.equal(a, b)


def test_it_learns_a_few_images_and_finds_what_does_not_belong():
    model = detector()
    losses = train(model, textures(4), 20)
    assert losses[-1] < 0.25 * losses[0]
    normal = textures(4)
    spoilt = normal.clone()
    spoilt[:, :, 24:40, 16:32] = 2 * torch.randn(4, 3, 16, 16)
    (maps, scores), (normal_maps, normal_scores) = model.score(spoilt), model.score(normal)
    assert scores.min() > 1.1 * normal_scores.max()
    # so short a training leaves a level at the image's borders: it is the rise that must lie in the patch
    rows, columns = np.divmod((maps - normal_maps).flatten(1).argmax(1).numpy(), 64)
    assert ((rows >= 22) & (rows < 42) & (columns >= 14) & (columns < 34)).all()  # to half a position of stage 1


def test_identical_images_and_one_image_train():
    image = textures(1)
    for images in (image, image.expand(3, -1, -1, -1)):
        losses = train(detector(), images, 3)
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
