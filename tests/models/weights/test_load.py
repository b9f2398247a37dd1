"""Checkpoints in every layout that load_weights knows, written here from torchvision's models, and those it refuses."""

import argparse
import contextlib
import os
import pickle

import pytest
import torch
import torchvision

from models.backbones import BACKBONES
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18
from models.ssl.dino import DINO
from models.ssl.simclr import SimCLR
from models.weights.load import load_weights
from runtime import checkpoint
from runtime.errors import UserError

WIDTH = 0.1  # a MobileNetV2 of 100,000 parameters
N_TENSORS = 312


def weights() -> dict:
    """A torchvision state_dict without classifier, other at every call, its buffers too."""
    state = torchvision.models.mobilenet_v2(width_mult=WIDTH).features.state_dict(prefix="features.")
    return {name: torch.rand_like(t) if t.is_floating_point() else t + 7 for name, t in state.items()}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def shapes_only(model: torch.nn.Module) -> dict:
    """A state_dict of the right shapes that takes no room in a file."""
    return {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in model.state_dict().items()}


def save(tmp_path, contents):
    torch.save(contents, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def holds(model: torch.nn.Module, state: dict) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


MINE, OTHER = weights(), weights()
HEAD = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}

# layout: contents, the report after "tensors loaded"
LAYOUTS = {
    "torchvision": (
        {**MINE, "classifier.1.weight": torch.ones(3, 1280), "classifier.1.bias": torch.ones(3)},
        "; left over: classifier.1.weight, classifier.1.bias",
    ),
    "compiled": (prefixed(MINE, "_orig_mod."), ""),
    "compiled in DataParallel in Lightning": ({"state_dict": prefixed(MINE, "model.module._orig_mod.")}, ""),
    "DINO": (
        {
            "student": prefixed(OTHER, "module.backbone.") | prefixed(HEAD, "module.head.mlp."),
            "teacher": prefixed(MINE, "backbone.") | prefixed(HEAD, "head.mlp."),
            "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 100,
            "args": argparse.Namespace(arch="mobilenet_v2", lr=0.1),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        " from part teacher (auto prefers it to student); left over: student.backbone (312 tensors), "
        "student.head (2 tensors), teacher.head (2 tensors), dino_loss.center",
    ),
    "MoCo v2": (
        {
            "epoch": 200,
            "arch": "mobilenet_v2",
            "state_dict": prefixed(OTHER, "module.encoder_k.")
            | prefixed(MINE | prefixed(HEAD, "fc."), "module.encoder_q.")
            | {"module.queue": torch.zeros(2, 8), "module.queue_ptr": torch.zeros(1)},
        },
        " from part encoder_q (auto prefers it to encoder_k); left over: "
        "encoder_k (312 tensors), encoder_q.fc (2 tensors), queue, queue_ptr",
    ),
    "MoCo v3": (
        {"state_dict": prefixed(OTHER, "module.momentum_encoder.") | prefixed(MINE, "module.base_encoder.")},
        " from part base_encoder (auto prefers it to momentum_encoder); left over: momentum_encoder (312 tensors)",
    ),
    "SimCLR": (
        {"state_dict": prefixed(MINE, "backbone.") | prefixed(HEAD, "backbone.fc.")},
        " from part backbone; left over: backbone.fc.0.weight, backbone.fc.0.bias",
    ),
    "SimSiam": (
        {"state_dict": prefixed(MINE, "module.encoder.") | prefixed(HEAD, "module.predictor.")},
        " from part encoder; left over: predictor.0.weight, predictor.0.bias",
    ),
    "Barlow Twins": (
        {"epoch": 1, "model": prefixed(MINE, "module.backbone.") | prefixed(HEAD, "module.projector.")},
        " from part backbone; left over: projector.0.weight, projector.0.bias",
    ),
    "our detector": (
        {"model": prefixed(MINE, "backbone.") | {"bank": torch.ones(9, 4), "decoder.conv1.weight": torch.ones(1)}},
        " from part backbone; left over: bank, decoder.conv1.weight",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_and_is_reported(tmp_path, layout):
    contents, report = LAYOUTS[layout]
    model = MobileNetV2(width=WIDTH)
    assert load_weights(model, save(tmp_path, contents)) == f"file.pth: {N_TENSORS} tensors loaded{report}"
    assert holds(model, MINE)


@pytest.mark.parametrize("layout, part", [("DINO", "student"), ("MoCo v2", "encoder_k")])
def test_part_takes_the_other_network(tmp_path, layout, part):
    model = MobileNetV2(width=WIDTH)
    report = load_weights(model, save(tmp_path, LAYOUTS[layout][0]), part=part)
    assert report.startswith(f"file.pth: {N_TENSORS} tensors loaded from part {part}, as asked; left over: ")
    assert holds(model, OTHER)


def test_checkpoints_of_our_pretraining(tmp_path):
    """DINO gives its target, SimCLR its only network."""
    path, model = tmp_path / "last.pt", MobileNetV2(width=WIDTH)
    method = DINO(MobileNetV2(width=WIDTH), prototypes=8, hidden=8, bottleneck=4)
    method.online.backbone.load_state_dict(OTHER)
    method.target.backbone.load_state_dict(MINE)
    checkpoint.save(path, {"model": method, "optimizer": torch.optim.AdamW(method.parameters())}, step=1)
    report = load_weights(model, path)
    assert " from part target (auto prefers it to online); left over: online.backbone (312 tensors)" in report
    assert holds(model, MINE)
    load_weights(model, path, part="online")
    assert holds(model, OTHER)

    method = SimCLR(MobileNetV2(width=WIDTH))
    method.online.backbone.load_state_dict(MINE)
    checkpoint.save(path, {"model": method}, step=1)
    assert load_weights(model, path).startswith("last.pt: 312 tensors loaded from part online; left over: online.head")
    assert holds(model, MINE)


def test_resnet_in_mocos_layout_agrees_with_torchvision(tmp_path):
    theirs = torchvision.models.resnet18().eval()
    theirs.fc = torch.nn.Identity()
    state = {"state_dict": prefixed(theirs.state_dict(), "module.encoder_q.")}
    model = ResNet18().eval()
    assert load_weights(model, save(tmp_path, state)) == "file.pth: 120 tensors loaded from part encoder_q"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_counters_may_be_missing_and_dtypes_are_converted(tmp_path):
    state = {name: t.half() for name, t in MINE.items() if not name.endswith("num_batches_tracked")}
    model = MobileNetV2(width=WIDTH).double()
    report = load_weights(model, save(tmp_path, state))
    assert report == f"file.pth: {N_TENSORS - 52} tensors loaded"
    assert all(torch.equal(model.state_dict()[name], t.double()) for name, t in state.items())


def refused(model, path, **options) -> str:
    """The message of the refusal; the model must be as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, path, **options)
    assert holds(model, before)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.slow
def test_misfits_are_named(tmp_path):
    model = MobileNetV2(width=WIDTH)
    state = dict(MINE)
    del state["features.3.conv.2.weight"]
    message = refused(model, save(tmp_path, state))
    assert "does not fit MobileNetV2: features.3.conv.2.weight is missing; try another backbone.name" in message

    path = save(tmp_path, MINE | {"features.19.weight": torch.ones(2)})
    assert "does not fit MobileNetV2: features.19.weight is unknown; try" in refused(model, path)

    broken = MINE | {
        "features.0.0.weight": torch.ones(8, 1, 3, 3),
        "features.0.1.bias": torch.ones(8, dtype=torch.int8),
    }
    message = refused(model, save(tmp_path, broken))
    assert "features.0.0.weight is float32[8, 1, 3, 3] in the file, float32[8, 3, 3, 3] in the model" in message
    assert "features.0.1.bias is int8[8] in the file, float32[8] in the model" in message

    message = refused(MobileNetV2(num_classes=3, width=WIDTH), save(tmp_path, MINE))
    assert "classifier.1.weight is missing; classifier.1.bias is missing; build the model without a" in message

    message = refused(model, save(tmp_path, prefixed(LAYOUTS["DINO"][0]["teacher"], "net.")))
    assert message.count(" is ") == 3  # names no more than three
    assert f"and {N_TENSORS - 52 + N_TENSORS + 2 - 3} more" in message


@pytest.mark.slow
def test_a_misfit_says_which_part_it_is_about(tmp_path):
    """The preferred part is broken and another one fits: that one must not be taken silently."""
    state = prefixed(MINE, "encoder_k.") | prefixed(OTHER, "encoder_q.")
    del state["encoder_q.features.0.0.weight"]
    message = refused(MobileNetV2(width=WIDTH), save(tmp_path, state))
    assert "from part encoder_q (auto prefers it to encoder_k) does not fit" in message


@pytest.mark.parametrize(
    "in_file, options, wanted, advice",
    [
        (
            "resnet18",
            {"stem": "cifar"},
            "resnet18",
            "ResNet18: conv1.weight is float32[64, 3, 3, 3] in the file, float32[64, 3, 7, 7] in the model; "
            "it fits backbone.name=resnet18 backbone.stem=cifar",
        ),
        ("resnet18", {"num_classes": 7}, "resnet50", "; it fits backbone.name=resnet18 backbone.stem=imagenet"),
        ("wide_resnet50_2", {}, "resnet50", "; it fits backbone.name=wide_resnet50_2 backbone.stem=imagenet"),
        ("mobilenet_v2", {}, "resnet18", "; it fits backbone.name=mobilenet_v2 backbone.width=1.0"),
        ("resnet50", {}, "mobilenet_v2", "; it fits backbone.name=resnet50 backbone.stem=imagenet"),
        ("mobilenet_v2", {"width": 0.5}, "mobilenet_v2", "; try another backbone.name, stem, width, channel or part"),
    ],
)
def test_the_right_backbone_is_recognized(tmp_path, in_file, options, wanted, advice):
    with torch.device("meta"):
        state = shapes_only(BACKBONES[in_file](**options))
        model = BACKBONES[wanted]()
    path = save(tmp_path, state)
    with pytest.raises(UserError) as error:
        load_weights(model, path)
    assert str(error.value).endswith(advice)


def test_an_absent_part_lists_those_there_are(tmp_path):
    path = save(tmp_path, LAYOUTS["DINO"][0])
    assert "has no part 'target'; it has: teacher, student" in refused(MobileNetV2(width=WIDTH), path, part="target")
    path = save(tmp_path, MINE)
    assert "has no part 'teacher'; it has: plain" in refused(MobileNetV2(width=WIDTH), path, part="teacher")


def test_files_that_are_no_checkpoints(tmp_path):
    model = MobileNetV2(width=WIDTH)
    assert "No such file" in refused(model, tmp_path / "none.pth")
    assert "is a folder without last.pt" in refused(model, tmp_path)
    path = tmp_path / "file.pth"
    for contents in (b"", b"hello\n", b"PK\x03\x04", b"\x80\x02}q\x00.", os.urandom(64)):
        path.write_bytes(contents)
        assert "was not written by torch.save or is truncated" in refused(model, path)
    for contents, kind in (
        (torch.ones(3), "Tensor"),
        ([1, 2], "list"),
        ({"epoch": 3, "loss": 0.5}, "dict"),
        ({}, "dict"),
    ):
        message = refused(model, save(tmp_path, contents))
        assert f"holds a {kind}" in message
        assert "no state_dict" in message
    assert "a Python object (torch.nn.modules.linear.Linear)" in refused(model, save(tmp_path, torch.nn.Linear(2, 2)))
    assert "with the keys epoch, loss and no state_dict" in refused(model, save(tmp_path, {"epoch": 3, "loss": 0.5}))


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, zip_format):
    path = tmp_path / "file.pth"
    torch.save({"state_dict": HEAD}, path, _use_new_zipfile_serialization=zip_format)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 41):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"was not written by torch\.save or is truncated|: refused; "):
            load_weights(torch.nn.Linear(2, 2), path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle", "inside a Namespace"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, layout):
    trap, path = tmp_path / "sprung", tmp_path / "file.pth"
    contents = {"state_dict": MINE, "args": Malicious(trap)}
    if layout == "inside a Namespace":
        contents["args"] = argparse.Namespace(lr=Malicious(trap))
    if layout == "bare pickle":
        path.write_bytes(pickle.dumps(contents["args"], protocol=2))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=layout != "legacy")
    message = refused(MobileNetV2(width=WIDTH), path)
    assert "mkdir" in message
    assert "refused" in message
    assert not trap.exists()

    with contextlib.suppress(RuntimeError):  # the trap works: torch would spring it if it were let
        torch.load(path, weights_only=False)
    assert trap.exists()
