"""UNet-ResNet-18: its parts against the original's construction, and the seed's number of parameters."""

import torch
import torch.nn.functional as F

from models.backbones.resnet import ResNet18
from models.backbones.unet import UNetResNet18
from models.weights.load import load_weights


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_number_of_parameters():
    """The seed's 28,977,426 is ResNetUNet with 18 classes, as a tool counts that meets the encoder under two names."""
    with torch.device("meta"):
        backbone, encoder = UNetResNet18(), ResNet18()
    assert count(backbone) == 17_799_744
    assert count(backbone) + count(encoder) + 18 * (64 + 1) == 28_977_426


def test_maps_are_what_the_original_computes():
    """usuyama/pytorch-unet's forward, written out, at a size that 32 divides: there twice as large is like the skip."""
    torch.manual_seed(0)
    net = UNetResNet18().eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        layer0 = F.relu(net.bn1(net.conv1(x)))
        layer1 = net.layer1(net.maxpool(layer0))
        layer2 = net.layer2(layer1)
        layer3 = net.layer3(layer2)
        layer4 = net.layer4(layer3)
        skips = [net.lateral[i](m) for i, m in enumerate((layer0, layer1, layer2, layer3))]
        out = net.lateral[4](layer4)
        maps = [out]
        for convolution, skip in zip(net.decoder, [*skips[::-1], net.original(x)]):
            out = F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=True)
            out = convolution(torch.cat([out, skip], dim=1))
            maps.append(out)
        found = net.decode(x)
        assert [tuple(m.shape[1:]) for m in found] == [
            (64, 64, 96),
            (128, 32, 48),
            (256, 16, 24),
            (256, 8, 12),
            (512, 4, 6),
            (512, 2, 3),
        ]
        for ours, theirs in zip(found, maps[::-1], strict=True):
            torch.testing.assert_close(ours, theirs)
        assert torch.equal(net.forward_dense(x), found[0])
        assert all(torch.equal(a, b) for a, b in zip(net.forward_stages(x), found[2:], strict=True))
        torch.testing.assert_close(net(x), torch.cat([found[5].mean((2, 3)), found[0].mean((2, 3))], dim=1))


def test_a_resnets_weights_are_the_encoders(tmp_path):
    source = ResNet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    net = UNetResNet18()
    decoder = net.decoder[0][0].weight.clone()
    report = load_weights(net, tmp_path / "resnet18.pth")
    assert (
        "120 tensors loaded; not in the file: lateral (10 tensors), original (4 tensors), decoder (10 tensors)"
        in report
    )
    assert torch.equal(net.layer3[1].conv2.weight, source.layer3[1].conv2.weight)
    assert torch.equal(net.decoder[0][0].weight, decoder)
    torch.save(net.state_dict(), tmp_path / "unet.pth")
    again = UNetResNet18()
    assert load_weights(again, tmp_path / "unet.pth") == "unet.pth: 144 tensors loaded"
    assert torch.equal(again.decoder[0][0].weight, decoder)
