"""The ResNets against torchvision's: names, numbers, initialization, shapes."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from models.backbones import BACKBONES
from models.backbones.resnet import ResNet18, ResNet50

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2"]


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def torchvision_model(name):
    """torchvision's model with random weights and, so that a swapped or missing one shows, random BatchNorms."""
    with torch.device("meta"):  # its own initialization would take longer than all the rest
        model = getattr(torchvision.models, name)()
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.zero_()
            torch.nn.init.uniform_(module.weight, 0.2, 0.6)
            torch.nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            bound = (6 / module.weight[0].numel()) ** 0.5
            torch.nn.init.uniform_(module.weight, -bound, bound)
    torch.nn.init.normal_(model.fc.bias)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_weights_load_strictly_and_outputs_agree(name):
    theirs = torchvision_model(name)
    with torch.device("meta"):
        ours = BACKBONES[name](num_classes=1000).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())  # the order too: optimizer states go by it
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images = torch.randn(2, 3, 65, 45)
    with torch.no_grad():
        logits, maps = ours(images), ours.forward_stages(images)
        assert all(torch.equal(a, b) for a, b in zip(ours.forward_stages(images, last=2), maps[:2], strict=True))
        torch.testing.assert_close(logits, theirs(images), rtol=1e-5, atol=1e-5)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        for i in range(4):
            x = getattr(theirs, f"layer{i + 1}")(x)
            torch.testing.assert_close(maps[i], x, rtol=1e-5, atol=1e-5)
    assert logits.std() > 1e-3


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_one_seed_gives_torchvisions_initial_weights(name, zero_init_residual):
    torch.manual_seed(3)
    ours = BACKBONES[name](num_classes=1000, zero_init_residual=zero_init_residual).state_dict()
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(zero_init_residual=zero_init_residual).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_published_numbers_of_parameters():
    assert n_parameters(ResNet18()) == 11_176_512
    assert n_parameters(ResNet18(num_classes=18)) == 11_185_746
    assert n_parameters(ResNet18(num_classes=1000)) == 11_689_512
    assert n_parameters(ResNet18(stem="cifar")) == 11_168_832
    with torch.device("meta"):  # the others are only counted
        assert n_parameters(BACKBONES["resnet34"]()) == 21_284_672
        assert n_parameters(BACKBONES["resnet34"](stem="cifar")) == 21_276_992
        assert n_parameters(ResNet50()) == 23_508_032
        assert n_parameters(ResNet50(stem="cifar")) == 23_500_352


@pytest.mark.parametrize("name", [*NAMES, "mobilenet_v2"])
def test_stages_and_features_have_the_promised_shapes(name):
    with torch.device("meta"):
        backbone = BACKBONES[name]()
    backbone.to_empty(device="cpu").eval()
    for height, width in ((64, 32), (63, 33), (1, 7)):
        images = torch.zeros(1, 3, height, width)
        with torch.no_grad():
            maps = backbone.forward_stages(images)
            assert backbone(images).shape == (1, backbone.num_features)
        expected = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]  # rounded up
        assert [tuple(m.shape[2:]) for m in maps] == expected
        assert [m.shape[1] for m in maps] == backbone.stage_channels


def test_cifar_stem_keeps_the_resolution():
    backbone = ResNet18(stem="cifar")
    maps = backbone.forward_stages(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    ours = ResNet18(stem="cifar", num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_solo_learns_cifar_stem_is_padded_by_2():
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 2, bias=False), torch.nn.Identity()
    ours = ResNet18(stem="cifar_solo", num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 24)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert [tuple(m.shape[2:]) for m in ours.forward_stages(images)] == [(34, 26), (17, 13), (9, 7), (5, 4)]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_stages_are_not_overwritten_by_what_follows(name):
    """Activations work in place: a map handed out must keep its values once the later stages have run."""
    backbone = BACKBONES[name]().eval()
    kept = []
    layers = (
        [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
        if name == "resnet18"
        else [backbone.features[i] for i in (3, 6, 13, 17)]
    )
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))  # noqa: ARG005
    with torch.no_grad():
        maps = backbone.forward_stages(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(m, k) for m, k in zip(maps, kept, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_gradients_are_exact_but_for_kinks(layout):
    """At 32 pixels, against float64, in both layouts (2.6e-6 and 6.7e-6 of the norm). With ReLUs it is the same, until
    rounding takes a value of one image past zero: then the gradient of that unit is another one, 4e-3 away. In
    channels_last this is seen more often, since its batch norm adds up in float32."""
    backbone = ResNet18(stem="cifar")
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    images, weights = torch.randn(8, 3, 32, 32), torch.randn(8, 512)
    found = []
    for dtype in (torch.float64, torch.float32):
        model = copy.deepcopy(backbone).to(dtype=dtype, memory_format=layout)
        (model(images.to(dtype)) * weights.to(dtype)).sum().backward()
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    assert (found[1] - found[0]).norm() < 2e-5 * found[0].norm()
