"""Every layout that the docs promise: a file in it loads, and the features are those of an independent network."""

import pytest
import torch
import torchvision
from torch import Tensor

from models.backbones import BACKBONES
from models.weights.load import load_weights
from runtime.errors import UserError
from tests.models import official_networks as official
from tests.models.weights.test_names import TIMM

IMAGENET = {"stride": 2, "padding": 3, "pool": True}
CIFAR = {"stride": 1, "padding": 1, "pool": False}


def filled(shapes: dict[str, tuple]) -> dict[str, Tensor]:
    """Random tensors of these names and shapes, such that a network of them neither explodes nor dies."""
    torch.manual_seed(len(shapes))
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1 and not name.endswith(("token", "tokens", "pos_embed")):
            state[name] = torch.randn(shape) * (1.5 / shape[1:].numel()) ** 0.5
        elif name.endswith(("running_var", "weight", "gamma")):
            state[name] = torch.rand(shape) * 0.5 + 0.5
        else:
            state[name] = torch.randn(shape) * 0.2
    return state


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def resnet_state(name: str = "resnet18", *, cifar: bool = False) -> dict[str, Tensor]:
    """In torchvision's names, without a classifier."""
    with torch.device("meta"):
        shapes = shapes_of(getattr(torchvision.models, name)())
    shapes |= {"conv1.weight": torch.Size((64, 3, 3, 3))} if cifar else {}
    return filled({name: shape for name, shape in shapes.items() if not name.startswith("fc.")})


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: dict) -> dict:
    """The same names and shapes, as a second network that must not be taken."""
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}


def lightly(state: dict) -> dict:
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {".".join([places[name.split(".")[0]], *name.split(".")[1:]]): tensor for name, tensor in state.items()}


def head(*names: str) -> dict:
    return {f"{name}.{part}": torch.ones(2) for name in names for part in ("weight", "bias")}


R18 = resnet_state()
RESNETS = {
    "torchvision": R18 | head("fc"),
    "NSA's training": {"model_state_dict": R18, "epoch": 80},
    "DINO": {"teacher": prefixed(R18, "backbone."), "student": prefixed(other(R18), "module.backbone.")},
    "MoCo v2": {
        "state_dict": prefixed(R18, "module.encoder_q.")
        | prefixed(other(R18), "module.encoder_k.")
        | prefixed(head("fc.0", "fc.2"), "module.encoder_q.")
    },
    "MoCo v3": {
        "state_dict": prefixed(R18, "module.base_encoder.")
        | prefixed(other(R18), "module.momentum_encoder.")
        | head("module.base_encoder.fc.0", "module.predictor.0")
    },
    "SimCLR": {"state_dict": prefixed(R18, "backbone.") | head("backbone.fc.0", "backbone.fc.2"), "arch": "resnet18"},
    "SimSiam": {"state_dict": prefixed(R18, "module.encoder.") | head("module.encoder.fc.0", "module.predictor.0")},
    "Barlow Twins": {"model": prefixed(R18, "module.backbone.") | head("module.projector.0"), "epoch": 1},
    "VICReg": {"model": prefixed(R18, "module.backbone.") | head("module.projector.0")},
    "SwAV": {"state_dict": prefixed(R18, "module.") | head("module.projection_head.0", "module.prototypes")},
    "lightly": {"state_dict": prefixed(lightly(R18), "backbone.") | head("projection_head.layers.0")},
    "lightly's DINO": {
        "state_dict": prefixed(lightly(R18), "teacher_backbone.")
        | prefixed(lightly(other(R18)), "student_backbone.")
        | head("teacher_head.layers.0")
    },
    "solo-learn": {
        "state_dict": prefixed(R18, "backbone.")
        | prefixed(other(R18), "momentum_backbone.")
        | head("classifier", "projector.0", "momentum_classifier"),
        "pytorch-lightning_version": "2.1.2",
    },
}


def load(tmp_path, contents: dict, name: str, **options) -> tuple[torch.nn.Module, str]:
    torch.save(contents, tmp_path / "file.ckpt")
    model = BACKBONES[name](**options).eval()
    return model, load_weights(model, tmp_path / "file.ckpt")


def check(model: torch.nn.Module, images: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        found = model.to(images.dtype)(images)
    close = 1e-4 if images.dtype == torch.float32 else 1e-9
    assert expected.std() > 1e-2 and (expected[0] - expected[1]).abs().max() > 10 * close
    torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.parametrize("layout", RESNETS)
def test_a_resnet_in_every_layout(tmp_path, layout):
    model, _ = load(tmp_path, RESNETS[layout], "resnet18")
    images = torch.randn(2, 3, 64, 48)
    check(model, images, official.resnet(R18, images, **IMAGENET))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_supcontrast(tmp_path, name):
    """HobbitLong/SupContrast, util.save_model: `shortcut` for `downsample`, DataParallel around the encoder."""
    state = {n.replace("downsample", "shortcut"): t for n, t in resnet_state(name, cifar=True).items()}
    images = torch.randn(2, 3, 32, 32)
    expected = official.resnet(state, images, **CIFAR, shortcut="shortcut")
    contents = {"model": prefixed(state, "encoder.module.") | head("head.0", "head.2"), "epoch": 1000}
    model, report = load(tmp_path, contents, name, stem="cifar")
    assert " from part encoder with the names of SupContrast's ResNet; left over: head." in report
    check(model, images, expected)
    if name == "resnet18":
        check(load(tmp_path, {"model": prefixed(state, "module.encoder.")}, name, stem="cifar")[0], images, expected)
        with pytest.raises(UserError, match=r"SupContrast's.*: set backbone\.stem=cifar$"):
            load(tmp_path, contents, name, stem="cifar_solo")
        with pytest.raises(UserError, match=r"SupContrast's.*: set backbone\.stem=cifar$"):
            load(tmp_path, contents, name)


V3 = {"mobilenet_v3_large": official.MOBILENET_V3_LARGE, "mobilenet_v3_small": official.MOBILENET_V3_SMALL}


@pytest.mark.parametrize("name", V3)
@pytest.mark.parametrize(
    "eps, same, options", [(1e-5, False, {"bn_eps": 1e-5}), (1e-3, True, {"padding": "tensorflow"})]
)
def test_timms_mobilenet_v3(tmp_path, name, eps, same, options):
    state = filled({n: torch.Size(shape) for n, shape in TIMM[name].items()})
    for norm in [n.removesuffix("running_var") for n in state if n.endswith("running_var")]:  # so that epsilon counts
        state[norm + "running_var"] *= 0.04
        state[norm + "weight"] *= 0.2
    images = torch.randn(2, 3, 64, 48).double()
    expected = official.timm_mobilenet({n: t.double() for n, t in state.items()}, images, V3[name], eps=eps, same=same)
    check(load(tmp_path, state, name, **options)[0], images, expected)


def test_timms_mobilenet_v2(tmp_path):
    state = filled({n: torch.Size(shape) for n, shape in TIMM["mobilenet_v2"].items()})
    images = torch.randn(2, 3, 64, 48)
    model, _ = load(tmp_path, state, "mobilenet_v2")
    check(model, images, official.timm_mobilenet(state, images, official.MOBILENET_V2))


@pytest.mark.parametrize("eps, same", [(1e-5, False), (1e-3, True)])
@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_lite1"])
def test_timms_efficientnets(tmp_path, name, eps, same):
    """timm's own weights and its tf_ ones, on a side that stride 2 does not divide."""
    state = filled({n: torch.Size(shape) for n, shape in TIMM[name].items()})
    for norm in [n.removesuffix("running_var") for n in state if n.endswith("running_var")]:  # so that epsilon counts
        state[norm + "running_var"] *= 0.04
        state[norm + "weight"] *= 0.2
    images = torch.randn(2, 3, 64, 47).double()
    arch = official.EFFICIENTNET_B1 if name == "efficientnet_b1" else official.EFFICIENTNET_LITE1
    expected = official.timm_mobilenet({n: t.double() for n, t in state.items()}, images, arch, eps=eps, same=same)
    model, _ = load(tmp_path, state, name, bn_eps=eps, padding="tensorflow" if same else "torch")
    check(model, images, expected)


def test_official_cbam(tmp_path):
    with torch.device("meta"):
        shapes = shapes_of(BACKBONES["cbam_resnet18"]())
    renamed = (("channel.fc1", "ChannelGate.mlp.1"), ("channel.fc2", "ChannelGate.mlp.3"))
    names = {name: name.replace("cbam.spatial", "cbam.SpatialGate.spatial") for name in shapes}
    for ours, theirs in renamed:
        names = {name: new.replace(ours, theirs) for name, new in names.items()}
    state = filled({names[name]: shape for name, shape in shapes.items()})
    images = torch.randn(2, 3, 64, 48)
    contents = {"state_dict": prefixed(state | head("fc"), "module."), "arch": "resnet"}
    check(load(tmp_path, contents, "cbam_resnet18")[0], images, official.resnet(state, images, **IMAGENET))


TINY = {"size": 32, "patch": 8}


def vit_state(name: str = "vit_tiny", **options) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = shapes_of(BACKBONES[name](**options))
    return filled(shapes)


def test_dinos_vit(tmp_path):
    state, images = vit_state(**TINY), torch.randn(2, 3, 32, 32)
    expected = official.vit(state, images, heads=3)
    training = {
        "student": prefixed(other(state), "module.backbone."),
        "teacher": prefixed(state, "backbone.") | head("head.mlp.0"),
    }
    for contents in (training, state):  # full checkpoint and released backbone
        check(load(tmp_path, contents, "vit_tiny", **TINY)[0], images, expected)


@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2s_vit(tmp_path, chunks):
    options = TINY | {"layer_scale": 1e-5, "registers": 4}
    state, images = vit_state(**options), torch.randn(2, 3, 32, 32)
    if chunks:  # as FSDP's training saves them
        parts = {name: name.split(".") for name in state}
        state = {
            ".".join([p[0], str(int(p[1]) // 3), *p[1:]]) if p[0] == "blocks" else name: state[name]
            for name, p in parts.items()
        }
    contents = {"teacher": prefixed(state | {"mask_token": torch.zeros(1, 192)}, "backbone.") | head("dino_head.mlp.0")}
    check(load(tmp_path, contents, "vit_tiny", **options)[0], images, official.vit(state, images, heads=3))


def test_timms_vit_with_registers(tmp_path):
    options = TINY | {"layer_scale": 1e-5, "registers": 4}
    state, images = vit_state(**options), torch.randn(2, 3, 32, 32)
    state["reg_token"], state["pos_embed"] = state.pop("register_tokens"), state["pos_embed"][:, 1:].clone()
    expected = official.vit(state, images, heads=3, registers="reg_token")
    check(load(tmp_path, state | head("head"), "vit_tiny", **options)[0], images, expected)


def test_moco_v3s_vit(tmp_path):
    model = BACKBONES["vit_moco_small"](size=32)
    state = vit_state("vit_moco_small", size=32) | {"pos_embed": model.pos_embed.detach().clone()}
    contents = {"state_dict": prefixed(state, "module.base_encoder.") | head("module.base_encoder.head.0")}
    images = torch.randn(2, 3, 32, 32)
    loaded, _ = load(tmp_path, contents, "vit_moco_small", size=32)
    check(loaded, images, official.vit(state, images, heads=12))
