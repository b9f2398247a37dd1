"""MobileNetV3 against torchvision's, at several widths, and timm's names."""

import pytest
import torch
import torchvision

from models.backbones.mobilenet_v3 import MobileNetV3Large, MobileNetV3Small

BUILDERS = {
    "large": (MobileNetV3Large, torchvision.models.mobilenet_v3_large, (3, 6, 12, 15)),
    "small": (MobileNetV3Small, torchvision.models.mobilenet_v3_small, (1, 3, 8, 11)),
}


@pytest.mark.parametrize("width", [0.35, 1.0])
@pytest.mark.parametrize("size", BUILDERS)
def test_any_width_is_torchvisions(size, width):
    build, official, ends = BUILDERS[size]
    torch.manual_seed(5)
    theirs = official(width_mult=width).eval()
    torch.manual_seed(5)
    ours = build(num_classes=1000, width=width).eval()
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
        for i, end in enumerate(ends):
            torch.testing.assert_close(maps[i], theirs.features[: end + 1](images), rtol=1e-5, atol=1e-5)
            assert maps[i].shape[1] == ours.stage_channels[i]
    assert logits.std() > 1e-4
    norms = [[m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)] for net in (ours, theirs)]
    assert [(m.eps, m.momentum) for m in norms[0]] == [(m.eps, m.momentum) for m in norms[1]]


def test_published_numbers_of_parameters_and_channels():
    large, small = MobileNetV3Large(), MobileNetV3Small()
    assert sum(p.numel() for p in MobileNetV3Large(num_classes=1000).parameters()) == 5_483_032
    assert sum(p.numel() for p in large.parameters()) == 2_971_952
    assert sum(p.numel() for p in MobileNetV3Small(num_classes=1000).parameters()) == 2_542_856
    assert (large.stage_channels, large.num_features) == ([24, 40, 112, 160], 960)
    assert (small.stage_channels, small.num_features) == ([16, 24, 48, 96], 576)


def test_tensorflow_padding_changes_no_size():
    """Which padding it is, test_mobilenet.py says; by hand: outputs are those of tf_mobilenetv3_* in timm 1.0.31."""
    net, other = MobileNetV3Small().eval(), MobileNetV3Small(padding="tensorflow").eval()
    other.load_state_dict(net.state_dict())
    images = torch.randn(1, 3, 64, 64)
    maps = net.forward_stages(images), other.forward_stages(images)
    assert [m.shape for m in maps[0]] == [m.shape for m in maps[1]]
    assert not torch.allclose(maps[0][0], maps[1][0])


def test_options():
    assert {m.eps for m in MobileNetV3Small(bn_eps=1e-5).modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
