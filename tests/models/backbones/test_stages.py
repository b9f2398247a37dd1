"""What a backbone's first stages depend on, and their shapes, found without changing anything else of it."""

import pytest
import torch

from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18
from models.backbones.stages import stage_shapes, train_stages
from models.backbones.vit import ViTTiny


@pytest.mark.parametrize("backbone", [ResNet18, MobileNetV2])
@pytest.mark.parametrize("last", [1, 3, 4])
def test_exactly_what_the_stages_need_is_trainable(backbone, last):
    network = backbone().requires_grad_(False).train()
    network.bn1 = network.bn1.eval() if hasattr(network, "bn1") else None
    modes, before = [m.training for m in network.modules()], {n: v.clone() for n, v in network.state_dict().items()}
    assert stage_shapes(network, last) == [
        (channels, 64 // stride, 64 // stride)
        for channels, stride in zip(network.stage_channels, (4, 8, 16, 32)[:last])
    ]
    assert not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        train_stages(network, last)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    sum(m.sum() for m in network.forward_stages(torch.randn(2, 3, 64, 64), last)).backward()
    assert all(p.requires_grad == (p.grad is not None) for p in network.parameters())
    idle = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert bool(idle) == (last < 4 or backbone is MobileNetV2)  # whose last convolution is behind stage 4


def test_a_vit_is_asked_with_images_that_its_patches_divide():
    assert stage_shapes(ViTTiny(patch=14, size=28), 2) == [(192, 5, 5)] * 2  # of 70 x 70 pixels
    assert stage_shapes(ViTTiny(patch=16, size=32), 1) == [(192, 4, 4)]
