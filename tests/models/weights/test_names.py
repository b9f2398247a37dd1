"""Other libraries' names are read back into ours, every one of them, in its shape."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torchvision

from models.backbones import BACKBONES
from models.backbones.cbam import CBAMResNet18
from models.backbones.resnet import ResNet18
from models.weights.load import load_weights
from models.weights.names import rename

LAYOUTS = {
    "mobilenet_v2": "timm's MobileNetV2",
    "mobilenet_v3_small": "timm's MobileNetV3 small",
    "mobilenet_v3_large": "timm's MobileNetV3 large",
    "efficientnet_b1": "timm's EfficientNet",
    "efficientnet_lite1": "timm's EfficientNet-Lite",
}
TIMM = defaultdict(dict)  # our name of the model: {timm's name: shape}
for line in Path(__file__).with_name("timm_names.txt").read_text().splitlines():
    if line.startswith("= "):
        model = line.removeprefix("= ")
    elif not line.startswith("#"):
        name, _, shape = line.partition(" ")
        TIMM[model][name] = tuple(int(n) for n in shape.split("x")) if shape else ()


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
@pytest.mark.parametrize("model", TIMM)
def test_timms_names(model, prefix):
    """Of timm 1.0.31, names and shapes read from its models: all of ours are there, none twice, none left."""
    names, layout = rename(prefix + name for name in TIMM[model])
    assert layout == LAYOUTS[model]
    with torch.device("meta"):
        wanted = {prefix + name: t.shape for name, t in BACKBONES[model](num_classes=1000).state_dict().items()}
    found = {names[prefix + name]: shape for name, shape in TIMM[model].items()}
    assert len(found) == len(TIMM[model]) and found.keys() == wanted.keys()
    for name, shape in found.items():
        assert [n for n in shape if n > 1] == [n for n in wanted[name] if n > 1], name
    order = list(wanted)  # both libraries register modules in the order of computation: so the mapping keeps it
    assert [order.index(name) for name in found] == sorted(order.index(name) for name in found)


def test_timms_weights_load(tmp_path):
    torch.manual_seed(0)
    state = {
        name: torch.rand(shape) if shape else torch.tensor(0) for name, shape in TIMM["mobilenet_v3_small"].items()
    }
    torch.save(state, tmp_path / "timm.pth")
    net = BACKBONES["mobilenet_v3_small"](num_classes=1000, bn_eps=1e-5)
    report = load_weights(net, tmp_path / "timm.pth")
    assert report == "timm.pth: 244 tensors loaded with the names of timm's MobileNetV3 small"
    assert torch.equal(net.features[9].block[2].fc1.weight, state["blocks.4.0.se.conv_reduce.weight"])
    assert torch.equal(net.features[1].block[1].fc2.bias, state["blocks.0.0.se.conv_expand.bias"])
    assert torch.equal(net.features[1].block[2][1].running_var, state["blocks.0.0.bn2.running_var"])
    features = BACKBONES["mobilenet_v3_small"](bn_eps=1e-5)
    report = load_weights(features, tmp_path / "timm.pth")
    assert report.endswith("; left over: conv_head.weight, conv_head.bias, classifier.weight, classifier.bias")


def test_networks_that_are_not_ours_keep_their_names():
    """MobileNetV3's modules in seven stages of other depths; names that would become one stay."""
    stages = {0: "conv_dw", **dict.fromkeys(range(1, 7), "conv_pwl")}
    blocks = [(s, b) for s, depth in enumerate((4, 4, 4, 4, 4, 3, 4)) for b in range(depth)]
    names = [f"blocks.{s}.{b}.{stages[s]}.weight" for s, b in blocks]
    names += [f"blocks.{s}.{b}.se.conv_reduce.weight" for s, b in blocks if s > 0]
    names += ["conv_stem.weight", "conv_head.weight", "classifier.weight"]
    for extra in ([], ["blocks.5.0.conv.weight"], ["blocks.6.0.conv.weight"]):
        assert rename(names + extra) == ({name: name for name in names + extra}, None)


def test_official_cbam(tmp_path):
    torch.manual_seed(0)
    source, state = CBAMResNet18(), {}
    for name, tensor in source.state_dict().items():
        name = name.replace("cbam.channel.fc1", "cbam.ChannelGate.mlp.1").replace(
            "cbam.channel.fc2", "cbam.ChannelGate.mlp.3"
        )
        state["module." + name.replace("cbam.spatial.", "cbam.SpatialGate.spatial.")] = (
            torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        )
    torch.save({"state_dict": state, "arch": "resnet", "epoch": 90}, tmp_path / "cbam.pth")
    net = CBAMResNet18()
    assert load_weights(net, tmp_path / "cbam.pth") == "cbam.pth: 200 tensors loaded with the names of official CBAM"
    assert torch.equal(net.layer4[1].cbam.channel.fc2.weight, state["module.layer4.1.cbam.ChannelGate.mlp.3.weight"])


@pytest.mark.parametrize("part", ["backbone", "student_backbone", "backbone_momentum"])
def test_lightlys_resnet(tmp_path, part):
    """lightly wraps torchvision's children, all but the classifier, in a Sequential."""
    theirs = torchvision.models.resnet18()
    children = torch.nn.Sequential(*list(theirs.children())[:-1])
    torch.save({"state_dict": children.state_dict(prefix=f"{part}.")}, tmp_path / "lightly.ckpt")
    net = ResNet18()
    report = load_weights(net, tmp_path / "lightly.ckpt")
    assert report == f"lightly.ckpt: 120 tensors loaded from part {part} with the names of lightly's ResNet"
    assert torch.equal(net.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert torch.equal(net.bn1.bias, theirs.bn1.bias)


@pytest.mark.parametrize("name", BACKBONES)
def test_our_names_stay(name):
    """Whatever holds the backbone."""
    with torch.device("meta"):
        names = list(BACKBONES[name](num_classes=3).state_dict())
    for prefix in ("", "online.backbone.", "backbone."):
        assert rename(prefix + n for n in names) == ({prefix + n: prefix + n for n in names}, None)
