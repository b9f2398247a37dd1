"""ConvNeXt against torchvision's, V2's normalization against a plain loop, names and numbers against timm's."""

import hashlib

import pytest
import torch
import torchvision

from models.backbones import BACKBONES
from models.backbones.convnext import ConvNeXtAtto, ConvNeXtTiny, ConvNeXtV2Atto, GlobalResponseNorm
from models.weights.load import load_weights
from runtime.errors import UserError

# name: parameters with 1000 classes, without, and a digest of the names in timm 1.0.31, taken from its models
PUBLISHED = {
    "convnext_atto": (3_695_520, 3_374_520, "55ffba0e4cbdd1b7"),
    "convnext_femto": (5_217_784, 4_832_784, "55ffba0e4cbdd1b7"),
    "convnext_pico": (9_045_672, 8_532_672, "55ffba0e4cbdd1b7"),
    "convnext_nano": (15_593_560, 14_952_560, "3519a8ba52779ce7"),
    "convnext_tiny": (28_589_128, 27_820_128, "fb23627c679f1be1"),
    "convnextv2_atto": (3_708_400, 3_387_400, "9ca15a9d997da1cd"),
    "convnextv2_femto": (5_233_240, 4_848_240, "9ca15a9d997da1cd"),
    "convnextv2_pico": (9_066_280, 8_553_280, "9ca15a9d997da1cd"),
    "convnextv2_nano": (15_623_800, 14_982_800, "67dbffafe48299f2"),
    "convnextv2_tiny": (28_635_496, 27_866_496, "dcae30d4a74adba8"),
}


def digest(names) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def randomise(model):
    """Weights that let every branch be seen; a layer scale of 1e-6 hides them."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 and parameter.numel() > 1000 else 0.3)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_and_names_are_timms(name):
    whole, features, names = PUBLISHED[name]
    with torch.device("meta"):
        model, backbone = BACKBONES[name](num_classes=1000), BACKBONES[name]()
    assert sum(p.numel() for p in model.parameters()) == whole
    assert sum(p.numel() for p in backbone.parameters()) == features
    assert digest(model.state_dict()) == names


def test_tiny_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.convnext_tiny())
    torch.save(theirs.state_dict(), tmp_path / "tiny.pth")
    ours = ConvNeXtTiny(num_classes=1000).eval()
    report = load_weights(ours, tmp_path / "tiny.pth")
    assert report == "tiny.pth: 182 tensors loaded with the names of torchvision's ConvNeXt"
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        logits, maps = ours(images), ours.forward_stages(images)
        torch.testing.assert_close(logits, theirs(images), rtol=1e-5, atol=1e-5)
        for i, end in enumerate((2, 4, 6, 8)):
            torch.testing.assert_close(maps[i], theirs.features[:end](images), rtol=1e-5, atol=1e-5)
    assert logits.std() > 1e-2


def test_response_normalization_is_the_papers_algorithm():
    torch.manual_seed(0)
    norm = GlobalResponseNorm(5).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    x[0, 2] = 0  # a channel that says nothing
    expected = torch.empty_like(x)
    for n in range(2):
        sizes = [x[n, c].square().sum().sqrt() for c in range(5)]
        for c in range(5):
            share = sizes[c] / (sum(sizes) / 5 + 1e-6)
            expected[n, c] = norm.weight[c] * (x[n, c] * share) + norm.bias[c] + x[n, c]
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(GlobalResponseNorm(5)(x.float()), x.float())  # at the start
    assert norm(torch.zeros(1, 5, 2, 2, dtype=torch.float64)).isfinite().all()


def test_response_normalization_in_half_precision_does_not_overflow():
    """1024 * 200^2 is beyond float16's 65504, and so is 80 * 1106, one channel times its share of 1280."""
    few, many = torch.full((1, 2, 32, 32), 200.0), torch.full((1, 1280, 2, 2), 0.01)
    many[:, 0] = 80
    for x, weight in ((few, 1.0), (many, 0.5)):
        norm = GlobalResponseNorm(x.shape[1])
        torch.nn.init.constant_(norm.weight, weight)
        torch.testing.assert_close(norm(x.half()).float(), norm(x), rtol=2e-3, atol=0)
        assert norm(x.half()).dtype == torch.float16


def test_official_names_load(tmp_path):
    """facebookresearch/ConvNeXt-V2's, written here by hand from ours."""
    source = randomise(ConvNeXtV2Atto())
    state = {}
    for name, tensor in source.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            name = f"downsample_layers.0.{parts[1]}.{parts[2]}"
        elif parts[0] == "head":
            name = f"norm.{parts[2]}"
        elif parts[2] == "downsample":
            name = f"downsample_layers.{parts[1]}.{parts[3]}.{parts[4]}"
        else:
            inner = ".".join(parts[4:])
            for ours, theirs in (("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2")):
                inner = inner.replace(ours, theirs)
            inner = inner.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
            if inner.startswith("grn"):
                tensor = tensor.view(1, 1, 1, -1)
            elif inner.startswith("pwconv") and inner.endswith("weight"):
                tensor = tensor[:, :, 0, 0]
            name = f"stages.{parts[1]}.{parts[3]}.{inner}"
        state[name] = tensor
    state |= {"head.weight": torch.ones(3, 320), "head.bias": torch.ones(3)}
    torch.save({"model": state}, tmp_path / "atto.pt")
    model = ConvNeXtV2Atto().eval()
    report = load_weights(model, tmp_path / "atto.pt")
    expected = "atto.pt: 138 tensors loaded with the names of official ConvNeXt; left over: head.weight, head.bias"
    assert report == expected
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), source(images))


def test_small_images():
    net = ConvNeXtAtto(patch=1)
    assert [tuple(m.shape[2:]) for m in net.forward_stages(torch.randn(1, 3, 32, 32))] == [
        (32, 32),
        (16, 16),
        (8, 8),
        (4, 4),
    ]
    with pytest.raises(UserError, match="needs images of at least 32 x 32 pixels for 4 stages, not 31 x 40"):
        ConvNeXtAtto()(torch.zeros(1, 3, 31, 40))
    assert ConvNeXtAtto().forward_stages(torch.zeros(1, 3, 16, 16), last=3)[-1].shape[2:] == (1, 1)
