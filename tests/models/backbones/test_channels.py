"""One channel for a backbone of three, stems of any number of channels, and the weights they get."""

import copy

import pytest
import torch

from models.backbones import BACKBONES
from models.backbones.build import BackboneConfig, build_backbone
from models.backbones.vit import ViTTiny
from models.weights.load import load_weights
from runtime import config
from runtime.errors import UserError

SMALL = {
    "resnet18": {},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v3_small": {"width": 0.35},
    "convnext_atto": {},
    "vit_tiny": {"size": 32},
    "unet_resnet18": {},
}


def build(name, **settings):
    settings = {"name": name} | SMALL[name] | settings
    torch.manual_seed(0)
    return build_backbone(config.build(BackboneConfig, settings, "backbone."))


@pytest.fixture
def checkpoint(tmp_path, request):
    torch.manual_seed(1)
    net = BACKBONES[request.param](**SMALL[request.param])
    torch.save(net.state_dict(), tmp_path / "rgb.pth")
    return request.param, net.eval(), str(tmp_path / "rgb.pth")


@pytest.mark.parametrize("checkpoint", SMALL, indirect=True)
@pytest.mark.parametrize("how", [{}, {"in_channels": 1}, {"one_channel": "learned"}])
def test_each_way_shows_the_channel_three_times(checkpoint, how):
    """What the pretrained backbone says of (g, g, g); a learned convolution starts there."""
    name, plain, path = checkpoint
    net, report = build(name, weights=path, channel="green", **how)
    net.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = plain(images[:, 1:2].expand(-1, 3, -1, -1))
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        for ours, theirs in zip(net.forward_stages(images), plain.forward_stages(images[:, [1, 1, 1]]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        changed = images.clone()
        changed[:, [0, 2]] = 7.0
        assert torch.equal(net(changed), net(images))
    assert ("resized: " in report) == ("in_channels" in how), report
    assert ("not in the file: " in report) == ("one_channel" in how), report


def test_a_learned_convolution_is_trained_saved_and_copied(tmp_path):
    net, _ = build("resnet18", channel="red", one_channel="learned")
    twin = copy.deepcopy(net)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert net.conv1.to_rgb.weight.grad.abs().sum() > 0
    with torch.no_grad():
        twin.conv1.to_rgb.weight.mul_(2)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(twin.eval()(images), net.eval()(images))  # the copy has its own
    torch.save(twin.state_dict(), tmp_path / "own.pth")
    again, report = build("resnet18", channel="red", one_channel="learned", weights=str(tmp_path / "own.pth"))
    assert report == "own.pth: 122 tensors loaded"
    assert torch.equal(again.eval()(images), twin(images))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_stems_of_any_number_of_channels(tmp_path, channels):
    torch.manual_seed(0)
    source, net = ViTTiny(size=32), ViTTiny(size=32, in_channels=channels)
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    report = load_weights(net, tmp_path / "rgb.pth")
    assert f"resized: patch_embed.proj.weight [192, 3, 16, 16] to [192, {channels}, 16, 16]" in report
    gray = torch.randn(1, 1, 32, 32)
    weight, ours = source.patch_embed["proj"].weight, net.patch_embed["proj"].weight
    for c in range(channels if channels > 1 else 0):  # 4 = r g b r, times 3 / 4
        assert torch.equal(ours[:, c], weight[:, c % 3] * 3 / channels)
    if channels == 1:
        torch.testing.assert_close(net(gray), source(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_n_channel_stems(name):
    net = BACKBONES[name](in_channels=5, **SMALL[name])
    assert net(torch.randn(2, 5, 32, 32)).shape == (2, net.num_features)


def test_a_stem_that_does_not_fit_the_images_is_an_error():
    for wrong in ({"in_channels": 5}, {"in_channels": 1}, {"in_channels": 2, "channel": "red"}):
        with pytest.raises(UserError, match=r"in_channels=., but images have three channels: set it to 3"):
            build("resnet18", **wrong)
    with pytest.raises(UserError, match=r"one_channel=learned needs backbone\.channel=red, green or blue"):
        build("resnet18", one_channel="learned")
    with pytest.raises(UserError, match="learned makes three channels"):
        build("resnet18", in_channels=1, channel="blue", one_channel="learned")
    with pytest.raises(UserError, match=r"backbone\.channel"):
        build("resnet18", channel="violet")
