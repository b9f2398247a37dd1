"""Layers of a configuration: the order of overrides never matters, and nothing that was given is lost in silence."""

import itertools
import json
from dataclasses import dataclass, field

import pytest
import torch
import torchvision
import yaml

import eval as evaluate
import sweep
import train_anomaly
import train_ssl
from evaluation.tasks import knn
from runtime.config import as_dict, build, load, merge, overlay
from runtime.errors import UserError
from runtime.schema import choice
from tests.images import TOP, write_classes


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(TOP)


def ssl(*words: str) -> train_ssl.Config:
    return load(train_ssl.Config, list(words))


def every_order(schema: type, file: str, *words: str):
    """The config that all orders of the overrides give."""
    first, *others = [load(schema, [file, *order]) for order in itertools.permutations(words)]
    assert all(other == first for other in others)
    return first


def test_the_short_form_keeps_the_section_of_the_file():
    cfg = every_order(train_ssl.Config, "configs/byol_scavport.yaml", "optim=lars", "optim.lr=0.3")
    expected = ssl("configs/byol_scavport.yaml")
    expected.optim.lr = 0.3
    assert cfg == expected
    optim = cfg.optim
    assert (optim.warmup_epochs, optim.weight_decay, optim.lr_scaling, optim.final_lr) == (10, 1e-6, "linear", 0)


def test_another_backbone_keeps_the_stem_and_the_weights(capsys):
    assert ssl("configs/simclr_cifar10.yaml", "backbone=resnet50").backbone.options["stem"] == "cifar"
    file = "configs/patchcore_mvtec.yaml"
    cfg = every_order(train_anomaly.Config, file, "backbone=mobilenet_v2", "backbone.weights=W", "backbone.width=0.5")
    assert (cfg.backbone.name, cfg.backbone.weights, cfg.backbone.options["width"]) == ("mobilenet_v2", "W", 0.5)
    assert capsys.readouterr().err == ""


def test_optim_after_its_rate_without_a_file():
    words = ["data=folder", "data.root=x", "data.size=8", "backbone=resnet18", "method=byol", "augment=byol"]
    words += ["epochs=1", "batch_size=2", "run_name=x", "optim.lr=1e-3", "optim=adamw"]
    cfg = ssl(*words)
    assert (cfg.optim.name, cfg.optim.lr) == ("adamw", 0.001) and ssl(*reversed(words)) == cfg


def test_an_option_of_the_file_that_the_new_choice_lacks_is_dropped_and_named_once(capsys, monkeypatch):
    cfg = ssl("configs/moco_v2_cifar10.yaml", "method=byol", "ema.start=0.99")
    lines = capsys.readouterr().err.splitlines()
    assert cfg.method.name == "byol" and "queue" not in cfg.method.options
    assert len(lines) == 1 and "method.queue=" in lines[0] and "(method=byol)" in lines[0]
    monkeypatch.setenv("RANK", "1")
    ssl("configs/moco_v2_cifar10.yaml", "method=byol", "ema.start=0.99")
    assert capsys.readouterr().err == ""


def test_what_was_typed_is_never_dropped(capsys):
    with pytest.raises(UserError, match=r"unknown key 'method.queue' \(method=byol\)"):
        ssl("configs/moco_v2_cifar10.yaml", "method.queue=64", "method=byol")
    assert "method.queue" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unknown key 'optim.momentm' \(optim=sgd\), did you mean 'momentum'"):
        ssl("configs/byol_scavport.yaml", "optim.momentm=0.8", "optim=sgd")


def test_an_option_of_the_file_that_nothing_knows_stays_an_error(tmp_path):
    text = (TOP / "configs/moco_v2_cifar10.yaml").read_text().replace("queue:", "queu:")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"unknown key 'method.queu'"):
        ssl(str(tmp_path / "a.yaml"), "method=byol")


@pytest.mark.parametrize("words", [["optim=adam", "optim.name=lars"], ["optim.name=lars", "optim=adam"]])
def test_one_key_in_two_spellings_names_both(words):
    with pytest.raises(UserError, match=r"optim=adam and optim\.name=lars"):
        ssl("configs/byol_scavport.yaml", *words)


def test_one_key_twice_names_both():
    for twice in (["optim.lr=1", "optim.lr=2"], ["epochs=1", "epochs=2"], ["method=byol", "method=dino"]):
        with pytest.raises(UserError) as error:
            ssl("configs/byol_scavport.yaml", *twice)
        assert all(word in str(error.value) for word in twice)


# ---------------------------------------------------------------- sections that may be left out, sections in sections


def small(*, width: int = 1, shared: int = 1):
    """One choice."""


def large(*, depth: int = 1, shared: int = 1):
    """Another."""


def none(*, size: int = 3):
    """A choice that is called like the absence of one."""


@dataclass(kw_only=True)
class Part:
    name: str = choice({"small": small, "large": large, "none": none})
    weight: float = 0.5
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Inner:
    part: Part
    maybe: Part | None = None


@dataclass(kw_only=True)
class Plain:
    rho: float = 0.05


@dataclass(kw_only=True)
class Schema:
    inner: Inner
    extra: Part | None = None
    plain: Plain | None = None
    given: Plain = field(default_factory=Plain)


BASE = {"inner": {"part": {"name": "small", "width": "2", "shared": "7", "weight": "0.1"}}}


def layered(*layers: dict) -> Schema:
    return build(Schema, merge(Schema, *layers))


def test_sections_in_sections_merge_like_others(capsys):
    cfg = layered(BASE, {"inner": {"part": {"": "large", "depth": "4"}, "maybe": "small"}})
    assert cfg.inner.part == Part(name="large", weight=0.1, options={"depth": 4, "shared": 7})
    assert cfg.inner.maybe == Part(name="small", options={"width": 1, "shared": 1})
    assert "inner.part.width=2 (inner.part=large)" in capsys.readouterr().err


def test_three_layers_drop_from_the_lowest_too(capsys):
    cfg = layered(BASE, {"inner": {"part": {"weight": "0.2"}}}, {"inner": {"part": "large"}})
    assert cfg.inner.part == Part(name="large", weight=0.2, options={"depth": 1, "shared": 7})
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("nothing", ["none", "null", "None", "", None])
def test_a_section_that_may_be_absent(nothing):
    there = BASE | {"extra": {"name": "large", "depth": "3"}, "plain": {"rho": "1"}}
    cfg = layered(there, {"extra": nothing, "plain": nothing})
    assert cfg.extra is None and cfg.plain is None
    assert layered(BASE | {"plain": nothing}, {"plain": {"rho": "2"}}).plain == Plain(rho=2.0)
    assert layered(BASE | {"extra": nothing}, {"extra": {"": "large", "depth": "2"}}).extra.options["depth"] == 2


def test_absent_and_present_at_once_is_an_error_that_names_both():
    with pytest.raises(UserError, match=r"plain=none .*plain.rho=1"):
        layered(BASE, {"plain": {"": "none", "rho": "1"}})


def test_a_required_section_can_choose_what_is_called_none():
    cfg = layered(BASE, {"inner": {"part": {"": "none", "size": "5"}}})
    assert cfg.inner.part == Part(name="none", weight=0.1, options={"size": 5})


def test_a_section_without_keys_has_its_defaults():
    assert layered(BASE | {"given": None}).given == Plain()


def test_a_single_value_is_no_section():
    with pytest.raises(UserError, match="plain must be a section of keys, not 'yes'"):
        layered(BASE, {"plain": "yes"})


def test_resolved_layers_read_back():
    cfg = layered(BASE, {"extra": "large", "plain": {"rho": "2"}})
    assert build(Schema, as_dict(cfg)) == cfg


def test_overlay_lets_later_pieces_win():
    words = overlay(["a.yaml", "data.size=1", "backbone.name=x", "seed=1"], ["backbone=y", "seed=2"], ["also=3"])
    assert words == ["a.yaml", "data.size=1", "backbone=y", "seed=2", "also=3"]
    assert overlay(["x=1", "x=2"]) == ["x=1", "x=2"]  # within a piece it stays the error that it is


# ---------------------------------------------------------------- eval.py: a checkpoint's config is the lowest layer


def test_a_key_of_a_free_section_keeps_the_file_s_other_keys():
    cfg = load(sweep.Config, ["configs/sweeps/condition.yaml", "pretraining.imagenet=X", "pretraining.own=Y"])
    assert cfg.pretraining == {"random": "backbone.name=resnet18", "imagenet": "X", "own": "Y"}
    layers = {"grid": {"optim": {"lr": [1, 2]}, "seeds": [0]}}, {"grid": {"optim": {"momentum": [0, 1]}}}
    assert merge(sweep.Config, *layers)["grid"] == {"optim": {"lr": [1, 2], "momentum": [0, 1]}, "seeds": [0]}


def test_eval_gives_weights_to_the_backbone_named_after_them(tmp_path, capsys):
    images = write_classes(tmp_path / "images", each=4)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "W.pth")
    words = ["task=knn", f"data.root={images}", "data.size=32", "device=cpu", f"runs={tmp_path}"]
    evaluate.main(["configs/eval_folder.yaml", *words, f"backbone.weights={tmp_path}/W.pth", "backbone=mobilenet_v2"])
    resolved = yaml.safe_load((tmp_path / "eval_folder" / "eval_knn" / "config.yaml").read_text())
    assert resolved["backbone"]["weights"] == f"{tmp_path}/W.pth" and resolved["backbone"]["name"] == "mobilenet_v2"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["backbone"] == "mobilenet_v2"


def test_eval_keeps_what_a_checkpoint_says_about_the_data(tmp_path, capsys):
    stored = ssl("configs/demo/simclr_demo.yaml", "data.test_fraction=0.3", "data.size=48")
    torch.save({"config": as_dict(stored)}, tmp_path / "last.pt")
    typed = {"checkpoint": str(tmp_path / "last.pt"), "task": "knn", "data": {"": "mvtec", "category": "01"}}
    cfg = build(knn.Config, merge(knn.Config, *evaluate.stored(knn.Config, [{}, typed]), {}, typed))
    assert (cfg.data.name, cfg.data.size, cfg.data.options["root"]) == (
        "mvtec",
        (48,),
        stored.data.options["root"],
    )
    assert cfg.backbone.weights == str(tmp_path / "last.pt")
    assert "data.test_fraction=0.3 (data=mvtec)" in capsys.readouterr().err
