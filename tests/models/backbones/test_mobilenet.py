"""MobileNetV2 against torchvision's, at several widths, and on the real ImageNet weights."""

import pytest
import torch
import torchvision

from models.backbones.mobilenet import MobileNetV2, TensorFlowConv2d, scaled
from models.weights.load import load_weights


@pytest.mark.parametrize("width", [0.1, 0.35, 0.75, 1.0, 1.4])
def test_any_width_is_torchvisions(width):
    torch.manual_seed(5)
    theirs = torchvision.models.mobilenet_v2(width_mult=width).eval()
    torch.manual_seed(5)
    ours = MobileNetV2(num_classes=1000, width=width).eval()
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())  # initialization

    for module in theirs.modules():  # the default statistics nearly extinguish the signal
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.02, 0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        logits, maps = ours(images), ours.forward_stages(images)
        assert all(torch.equal(a, b) for a, b in zip(ours.forward_stages(images, last=2), maps[:2], strict=True))
        torch.testing.assert_close(logits, theirs(images), rtol=1e-5, atol=1e-5)
        for i, end in enumerate((3, 6, 13, 17)):
            torch.testing.assert_close(maps[i], theirs.features[: end + 1](images), rtol=1e-5, atol=1e-5)
            assert maps[i].shape[1] == ours.stage_channels[i]
    assert logits.std() > 1e-4


def test_published_numbers_of_parameters_and_channels():
    backbone = MobileNetV2()
    assert sum(p.numel() for p in backbone.parameters()) == 2_223_872
    assert sum(p.numel() for p in MobileNetV2(num_classes=1000).parameters()) == 3_504_872
    assert backbone.stage_channels == [24, 32, 96, 320]
    assert backbone.num_features == 1280


def test_scaled_rounds_to_eight_and_never_loses_a_tenth():
    for channels in (16, 24, 32, 96, 320, 1280):
        for width in (0.01, 0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 2.0):
            assert scaled(channels, width) == torchvision.models._utils._make_divisible(channels * width, 8)


def test_dropout_only_in_training():
    model = MobileNetV2(num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    assert model.classifier[0].p == 0.2


def test_imagenet_weights(real_weights):
    path = real_weights / "mobilenet_v2_imagenet.pth"
    backbone = MobileNetV2().eval()
    report = load_weights(backbone, path)
    assert report == (
        "mobilenet_v2_imagenet.pth: 312 tensors loaded; left over: classifier.1.weight, classifier.1.bias"
    )
    classifier = MobileNetV2(num_classes=1000).eval()
    assert load_weights(classifier, path) == "mobilenet_v2_imagenet.pth: 314 tensors loaded"
    theirs = torchvision.models.mobilenet_v2().eval()
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    images = torch.randn(4, 3, 96, 128)
    with torch.no_grad():
        features = backbone(images)
        torch.testing.assert_close(classifier(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert features.isfinite().all()
    assert (features >= 0).all()  # ReLU6, averaged
    assert (features <= 6).all()
    assert features.std(dim=0).mean() > 0.01


@pytest.mark.parametrize("size, zeros", [((6, 8), (0, 1, 0, 1)), ((7, 5), (1, 1, 1, 1)), ((6, 5), (1, 1, 0, 1))])
def test_tensorflow_padding_adds_its_odd_zero_below_and_right(size, zeros):
    conv = TensorFlowConv2d(2, 3, 3, 2, 1)
    x = torch.randn(1, 2, *size)
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(x, zeros), conv.weight, conv.bias, 2)
    assert torch.equal(conv(x), expected)


def test_tensorflow_padding_changes_no_name_and_no_size():
    torch_padded, tensorflow = MobileNetV2().eval(), MobileNetV2(padding="tensorflow").eval()
    tensorflow.load_state_dict(torch_padded.state_dict())
    x = torch.randn(1, 3, 64, 64)
    ours, theirs = tensorflow.forward_stages(x), torch_padded.forward_stages(x)
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    assert not torch.allclose(ours[0], theirs[0])
