"""README, configs and layout say what is true: every command is run, every config loads, every file has its size."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

import eval as evaluate
import predict
import sweep
import train_anomaly
import train_ssl
from data import build_augment
from data.demo.generate import generate
from evaluation.tasks import knn
from models.ssl import SSL_METHODS
from runtime import config
from runtime.errors import UserError
from tests.images import TOP, script, write_classes, write_mvtec

SMALL = {
    "train_ssl.py": [
        "epochs=1",
        "optim.warmup_epochs=0",
        "batch_size=4",
        "data.size=32",
        "augment.size=32",
        "device=cpu",
        "precision=fp32",
    ],
    "train_anomaly.py": ["data.size=64", "batch_size=4", "device=cpu"],
    "eval.py": ["data.size=32", "device=cpu"],
    "predict.py": ["device=cpu"],
}
FURTHER = {  # what makes a config small beyond that
    "configs/simclr_scavport.yaml": ["sync_bn=false"],
    "configs/dino_scavport.yaml": [
        "sync_bn=false",
        "augment.local_size=16",
        "augment.local_crops=1",
        "method.prototypes=32",
        "method.warmup_teacher_epochs=0",
    ],
}
CONFIGS = sorted((TOP / "configs").rglob("*.yaml"))


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if re.match(r"(python|torchrun) ", line)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    write_classes(place / "images")
    for category in ("bottle", "tile"):
        write_mvtec(place / "mvtec", category=category, size=64)
    for name in ("mobilenet_v2", "resnet18"):
        torch.save(getattr(torchvision.models, name)().state_dict(), place / f"{name}.pth")
    return place


def test_every_command_of_the_readme_runs_at_small_size(place, monkeypatch):
    """In the order of the README, for a later one needs the checkpoint of an earlier one."""
    monkeypatch.chdir(TOP)
    mains = {"train_ssl.py": train_ssl, "train_anomaly.py": train_anomaly, "eval.py": evaluate, "predict.py": predict}
    ran = []
    for line in commands():
        for written, here in (("/path/to", place), ("runs/", f"{place}/runs/"), ("out=", f"out={place}/")):
            line = line.replace(written, str(here))
        launcher, *words = shlex.split(line)
        processes = 1
        if launcher == "torchrun":
            processes, words = 2, words[1:]
        name, *words = words
        if name == "sweep.py":
            continue  # `make demo` runs it as it stands, tests/scripts/test_eval_and_sweep.py a small one
        if name == "predict.py":
            words += SMALL[name]
        elif "task=compare" not in words:
            words = config.overlay(words, SMALL[name], FURTHER.get(words[0], []), [f"runs={place}/runs"])
        if processes > 1:
            script([name, *words], processes=processes)
        else:
            mains[name].main(words)
        ran.append(name)
    assert ran.count("train_ssl.py") >= 2 and ran.count("train_anomaly.py") >= 2 and ran.count("eval.py") >= 3
    assert "predict.py" in ran


SCHEMAS = {"train_ssl.py": train_ssl.Config, "train_anomaly.py": train_anomaly.Config, "eval.py": knn.Config,
           "sweep.py": sweep.Config}  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_command_and_expectation(path):
    first, second = path.read_text().splitlines()[:2]
    name = re.search(r"\w+\.py", first)[0]
    assert f"{path.relative_to(TOP)}" in first and second.startswith("# Expected: ")
    cfg = config.load(SCHEMAS[name], [str(path)])
    assert cfg.run_name in (path.stem, yaml.safe_load(path.read_text()).get("run_name"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_of_every_config_is_understood(path, monkeypatch):
    """Its first line's keys, and of a sweep every cell's, whose backbone is the one that its pretraining leaves."""
    monkeypatch.chdir(TOP)
    name, *words = shlex.split(re.search(r"\w+\.py .*", path.read_text().splitlines()[0])[0])
    cfg, backbones = config.load(SCHEMAS[name], words), {}
    parts_are_no_longer_than_the_run(cfg)
    if name == "train_ssl.py":
        pretraining_gets_its_views(cfg)
    for cell in sweep.plan(sweep.load(words))[1] if name == "sweep.py" else ():
        script_name, *its_words = cell.words
        its = config.load(SCHEMAS[script_name], its_words)
        backbones[cell.name] = its.backbone.name
        assert cell.needs is None or backbones[cell.name] == backbones[cell.needs], cell
        parts_are_no_longer_than_the_run(its)
        if script_name == "train_ssl.py":
            pretraining_gets_its_views(its)
    if name == "sweep.py":
        assert sweep.check(sweep.plan(sweep.load(words))[1]).keys() == backbones.keys()


def parts_are_no_longer_than_the_run(cfg) -> None:
    if getattr(cfg, "optim", None) and cfg.epochs:  # epochs=0: a detector's weights are tested as they are
        assert cfg.optim.warmup_epochs <= cfg.epochs
    if isinstance(cfg, train_ssl.Config):
        assert all(cfg.method.options[key] <= cfg.epochs for key in SSL_METHODS[cfg.method.name].in_epochs)


def pretraining_gets_its_views(cfg: train_ssl.Config) -> None:
    side = cfg.data.size[0]
    augment = build_augment(cfg.augment, 0, torch.full((2, 2), side))
    views = augment(torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.arange(2), 0)
    least, most, _ = SSL_METHODS[cfg.method.name].takes
    assert least <= len(views) + (cfg.defect is not None) <= most


def test_the_demo_sweep_names_configs_and_folders_that_exist(tmp_path):
    generate(tmp_path / "demo", scale=0.02, workers=0)
    cfg = config.load(sweep.Config, [str(TOP / "configs" / "sweeps" / "demo.yaml")])
    _, plan = sweep.plan(cfg)
    assert len(plan) == 2 + len(cfg.detectors) * len(cfg.pretraining) * len(cfg.tasks)
    for name, *words in (cell.words for cell in plan):
        full = config.load(SCHEMAS[name], words)
        root = Path(full.data.options["root"].replace("datasets/demo", str(tmp_path / "demo")))
        assert (root / full.data.options.get("category", "train")).is_dir()


def test_no_file_is_long_or_named_after_nothing():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout.split()
    assert files
    for file in files:
        assert len((TOP / file).read_text().splitlines()) <= 500, file
        assert Path(file).stem not in ("utils", "common", "misc", "helpers", "base", "core"), file


def test_scripts_know_no_method_by_name():
    for name in SCHEMAS:
        text = (TOP / name).read_text()
        assert not re.search(r"(method|detector|backbone)\.name ==|isinstance\((method|detector)", text), name


def test_a_script_without_arguments_says_what_is_missing():
    with pytest.raises(UserError, match=r"missing key 'data.name'"):
        train_ssl.main([])
