"""CBAM against a plain loop after the official code, and the seed's number of parameters."""

import torch

from models.backbones import BACKBONES
from models.backbones.cbam import CBAM, CBAMResNet18


def count(module):
    return sum(p.numel() for p in module.parameters())


def official(gate: CBAM, x: torch.Tensor) -> torch.Tensor:
    """Equations 1 to 3, image by image and position by position, in float64."""
    w1, b1, w2, b2 = (p.double() for p in gate.channel.parameters())
    out = torch.zeros_like(x, dtype=torch.float64)
    kernel, norm = gate.spatial.conv.weight.double(), gate.spatial.bn
    for n, image in enumerate(x.double()):  # (C, H, W)
        raw = 0
        for pooled in (image.flatten(1).mean(1), image.flatten(1).max(1).values):
            raw = raw + w2 @ torch.relu(w1 @ pooled + b1) + b2
        image = image * torch.sigmoid(raw)[:, None, None]
        two = torch.stack([image.max(0).values, image.mean(0)])  # the maximum is the first channel in the official code
        padded = torch.nn.functional.pad(two, (3, 3, 3, 3))
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                value = (padded[:, i : i + 7, j : j + 7] * kernel[0]).sum()
                value = (value - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
                out[n, :, i, j] = image[:, i, j] * torch.sigmoid(value)
    return out


def test_the_gates_are_the_papers():
    torch.manual_seed(0)
    gate = CBAM(32).eval()
    for p in gate.parameters():
        torch.nn.init.normal_(p, std=0.5)
    gate.spatial.bn.running_mean.fill_(0.3)
    gate.spatial.bn.running_var.fill_(2.0)
    x = torch.randn(3, 32, 5, 4)
    torch.testing.assert_close(gate(x).double(), official(gate, x), rtol=1e-5, atol=1e-5)


def test_they_start_as_in_the_official_code():
    """The spatial gate's BatchNorm at zero weight: one half everywhere. Biases at zero."""
    backbone = CBAMResNet18()
    gate = backbone.layer2[0].cbam
    x = torch.randn(2, 128, 6, 6)
    torch.testing.assert_close(gate(x), gate.channel(x) / 2)
    assert not gate.channel.fc1.bias.any() and not gate.channel.fc2.bias.any()
    assert gate.spatial.bn.momentum == 0.01


def test_a_block_gates_its_branch_and_not_its_shortcut():
    block = CBAMResNet18().layer1[0].eval()
    x = torch.rand(1, 64, 8, 8)
    plain = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(block.cbam(plain) + x))


def test_numbers_of_parameters():
    """The seed's 11,357,010 is this network with CIFAR stem and 18 classes, as a tool counts that hooks each call: the
    channel gate's MLP, called for the means and for the maxima, twice; and without the spatial gate's BatchNorm."""
    with torch.device("meta"):
        backbone = CBAMResNet18(stem="cifar", num_classes=18)
        gates = [module for module in backbone.modules() if isinstance(module, CBAM)]
        twice = sum(count(gate.channel) for gate in gates)
        norms = sum(count(gate.spatial.bn) for gate in gates)
        assert count(backbone) + twice - norms == 11_357_010
        assert count(CBAMResNet18()) == 11_266_392
        assert count(BACKBONES["cbam_resnet34"]()) == 21_447_468
        assert count(BACKBONES["cbam_resnet50"](num_classes=1000)) == 28_089_624
