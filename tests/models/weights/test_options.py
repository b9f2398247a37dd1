"""Options that no shape shows: files that tell them are loaded under no other."""

import pytest
import torch

from models.backbones import BACKBONES
from models.backbones.build import BackboneConfig, build_backbone
from models.weights.load import load_weights
from runtime import checkpoint, config
from runtime.errors import UserError
from tests.models import official_networks as official
from tests.models.weights.test_layouts import CIFAR, TINY, check, filled, head, load, other, prefixed, resnet_state
from tests.models.weights.test_names import TIMM

SOLO = CIFAR | {"padding": 2}
C18 = resnet_state(cifar=True)
LIGHTNING = {"pytorch-lightning_version": "2.1.2", "epoch": 999, "hyper_parameters": {"lr": 0.3}}
SOLOS = {  # of solo/methods/base.py, today and in 2021; the linear evaluation; what remains without Lightning's keys
    "today": {
        "state_dict": prefixed(C18, "backbone.")
        | prefixed(other(C18), "momentum_backbone.")
        | head("classifier", "momentum_classifier", "projector.0", "predictor.0"),
        **LIGHTNING,
    },
    "2021": {
        "state_dict": prefixed(C18, "encoder.")
        | prefixed(other(C18), "momentum_encoder.")
        | head("classifier", "projector.0"),
        **LIGHTNING,
    },
    "linear": {"state_dict": prefixed(C18, "backbone.") | head("classifier"), **LIGHTNING},
    "its state_dict alone": prefixed(C18, "backbone.") | head("classifier", "projector.0"),
}


@pytest.mark.parametrize("form", SOLOS)
def test_solo_learns_cifar_resnets_have_padding_2(tmp_path, form):
    images = torch.randn(2, 3, 32, 32)
    expected = official.resnet(C18, images, **SOLO)
    model, report = load(tmp_path, SOLOS[form], "resnet18", stem="cifar_solo")
    check(model, images, expected)
    assert "120 tensors loaded from part " + ("encoder" if form == "2021" else "backbone") in report
    for stem in ("cifar", "imagenet"):
        with pytest.raises(
            UserError, match=r"solo-learn's CIFAR ResNets pad .*: set backbone\.stem=cifar_solo; .* from the file$"
        ):
            load(tmp_path, SOLOS[form], "resnet18", stem=stem)


def test_what_only_looks_like_solo_learns_keeps_padding_1(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    expected = official.resnet(C18, images, **CIFAR)
    for contents in (
        {"state_dict": prefixed(C18, "backbone.") | head("projector.0"), **LIGHTNING},  # no online classifier
        {"state_dict": prefixed(C18, "backbone.") | head("classifier")},  # a classifier of somebody else's
        C18 | head("fc"),
    ):
        check(load(tmp_path, contents, "resnet18", stem="cifar")[0], images, expected)


@pytest.mark.parametrize("options", [{}, {"bn_eps": 1e-5, "padding": "tensorflow"}])
def test_timms_mobilenet_v3_says_which_options_it_needs(tmp_path, options):
    state = filled({n: torch.Size(shape) for n, shape in TIMM["mobilenet_v3_small"].items()})
    expected = (
        r"timm's MobileNetV3.*: set backbone\.bn_eps=1e-05 backbone\.padding=torch for timm's own weights, or "
        r"backbone\.bn_eps=0\.001 backbone\.padding=tensorflow for its tf_ ones"
    )
    with pytest.raises(UserError, match=expected):
        load(tmp_path, state, "mobilenet_v3_small", **options)


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_lite1"])
def test_timms_efficientnet_has_one_of_two_forms(tmp_path, name):
    state = filled({n: torch.Size(shape) for n, shape in TIMM[name].items()})
    tf, own = {"bn_eps": 1e-3, "padding": "tensorflow"}, {"bn_eps": 1e-5, "padding": "torch"}
    load(tmp_path, state, name, **tf)
    load(tmp_path, state, name, **own)
    with pytest.raises(
        UserError, match=r"own weights, or backbone\.bn_eps=0\.001 backbone\.padding=tensorflow for its"
    ):
        load(tmp_path, state, name, **(own | {"bn_eps": 1e-3}))
    converted = {n: tensor * 0 if n.endswith("num_batches_tracked") else tensor for n, tensor in state.items()}
    load(tmp_path, converted, name, **tf)
    with pytest.raises(UserError, match=r"converted from TensorFlow .*: set backbone\.bn_eps=0\.001 .*=tensorflow; if"):
        load(tmp_path, converted, name, **own)
    load(tmp_path, {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}, name, **own)


ODD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    "name, given, needed",
    [
        ("convnext_atto", {"mean": ODD[0], "std": ODD[1]}, "mean=0.1,0.2,0.3 backbone.std=0.4,0.5,0.6"),
        ("convnext_atto", {"mean": ODD[0]}, "mean=0.1,0.2,0.3$"),
        ("convnext_atto", {"std": list(ODD[1])}, "std=0.4,0.5,0.6$"),
    ],
)
def test_our_own_runs_say_what_their_images_were_normalized_by(tmp_path, name, given, needed):
    """Also under `detector.weights`; a run without the keys, of before, had its family's."""
    own = build_backbone(config.build(BackboneConfig, {"name": name, **given}))[0]
    plain = BACKBONES[name]()
    path = tmp_path / "last.pt"
    for section in ({}, {"mean": None, "std": None}):
        checkpoint.save(path, {"model": plain}, step=1, config={"backbone": {"name": name, **section}})
        load_weights(plain, path)
        with pytest.raises(UserError, match=r"had other options: set backbone\.(mean=0\.485|std=0\.2)"):
            load_weights(own, path)
    state = {"model": own}
    checkpoint.save(path, state, step=1, config={"backbone": {"name": name, "weights": None, **given}})
    load_weights(own, path)
    with pytest.raises(UserError, match=f"this run's backbone had other options: set backbone.{needed}"):
        load_weights(plain, path)
    for junk in ("x", 3, ["a"], {"b": 1}):
        checkpoint.save(path, state, step=1, config={"backbone": {"name": junk, "mean": junk, "std": junk}})
        load_weights(plain, path)


@pytest.mark.parametrize(
    "name, options, others",
    [
        ("resnet18", {"stem": "cifar_solo"}, {"stem": "cifar"}),
        ("resnet18", {"stem": "cifar"}, {"stem": "cifar_solo"}),
        ("mobilenet_v2", {"width": 0.1, "padding": "tensorflow"}, {"width": 0.1}),
        ("mobilenet_v3_small", {"bn_eps": 1e-5}, {}),
        ("efficientnet_lite0", {"padding": "torch"}, {}),
        ("vit_tiny", TINY | {"interpolation": "timm"}, TINY),
    ],
)
def test_our_own_runs_say_what_their_backbone_was(tmp_path, name, options, others):
    """Options that change what is computed, but no shape."""
    source = BACKBONES[name](**options)
    config = {"backbone": {"name": name, "weights": None, **options}}
    model = torch.nn.ModuleDict({"online": torch.nn.ModuleDict({"backbone": source})})
    checkpoint.save(tmp_path / "last.pt", {"model": model}, step=1, config=config, part="online")
    load_weights(BACKBONES[name](**options), tmp_path / "last.pt")
    key = next(key for key in ("stem", "padding", "bn_eps", "interpolation") if key in options)
    expected = rf"last\.pt.*: set backbone\.{key}={options[key]}"
    with pytest.raises(UserError, match=expected):
        load_weights(BACKBONES[name](**others), tmp_path / "last.pt")
