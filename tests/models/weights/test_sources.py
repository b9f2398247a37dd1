"""Weights that are no file of torch.save: safetensors, and torchvision's by name."""

import sys

import pytest
import torch
import torchvision

from models.backbones import BACKBONES
from models.backbones.convnext import ConvNeXtAtto
from models.backbones.mobilenet_v3 import MobileNetV3Small
from models.weights.load import load_weights
from models.weights.names import rename
from models.weights.sources import TORCHVISION
from runtime.errors import UserError


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: an option")
    torch.manual_seed(0)
    source = MobileNetV3Small()
    safetensors.save_file(source.state_dict(), tmp_path / "net.safetensors")
    net = MobileNetV3Small()
    assert load_weights(net, tmp_path / "net.safetensors") == "net.safetensors: 240 tensors loaded"
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), source.state_dict().values()))
    (tmp_path / "net.safetensors").write_bytes(b"no such thing")
    for path in (tmp_path / "net.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(UserError, match=r"cannot read .*safetensors: "):
            load_weights(net, path)


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"install safetensors to read it \(pip install safetensors\)"):
        load_weights(MobileNetV3Small(), tmp_path / "net.safetensors")


def test_torchvisions_weights_by_name(tmp_path, monkeypatch):
    """Read from where torchvision keeps what it has downloaded; here it was put there by hand."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v3_small().eval()
    place = tmp_path / "hub" / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"
    place.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), place)
    net = MobileNetV3Small(num_classes=1000).eval()
    assert load_weights(net, "IMAGENET1K_V1") == "IMAGENET1K_V1: 244 tensors loaded"
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(net(images), theirs(images))


def test_without_a_network_it_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):  # noqa: ARG001
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as error:
        load_weights(MobileNetV3Small(), "IMAGENET1K_V1")
    message = str(error.value)
    assert "cannot download torchvision's IMAGENET1K_V1 for mobilenet_v3_small (<urlopen error" in message
    file = "https://download.pytorch.org/models/mobilenet_v3_small-047dcff4.pth"
    assert f"download {file} on a machine with network access" in message
    assert "\n" not in message


def test_names_that_torchvision_does_not_have():
    with pytest.raises(UserError, match="no weights IMAGENET1K_V9 for mobilenet_v3_small; it has: IMAGENET1K_V1"):
        load_weights(MobileNetV3Small(), "IMAGENET1K_V9")
    with pytest.raises(
        UserError, match="there is no file IMAGENET1K_V1, and torchvision has no weights for ConvNeXtAtto"
    ):
        load_weights(ConvNeXtAtto(), "IMAGENET1K_V1")


@pytest.mark.slow
def test_every_name_of_ours_that_torchvision_shares_is_the_same_network():
    """So that IMAGENET1K_V1 fits whatever network has a name of torchvision's: tensors of the same names and sizes."""
    theirs = {name: TORCHVISION.get(name, name) for name in BACKBONES}
    shared = [name for name in BACKBONES if theirs[name] in torchvision.models.list_models(torchvision.models)]
    assert {"resnet18", "wide_resnet50_2", "convnext_tiny", "vit_base", "mobilenet_v2", "mobilenet_v3_small"} <= {
        *shared
    }
    for name in shared:
        with torch.device("meta"):
            ours = BACKBONES[name](num_classes=1000).state_dict()
            state = torchvision.models.get_model(theirs[name]).state_dict()
        names, _ = rename(state)
        sizes = {names[key]: tensor.numel() for key, tensor in state.items()}
        assert sizes == {key: tensor.numel() for key, tensor in ours.items()}, name
