"""Run folders that are links, half removed, or named so that they would lie elsewhere; copies that a kill prevented."""

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import eval as evaluate
import sweep
import train_anomaly
import train_ssl
from runtime import checkpoint, files
from runtime.config import run_folder
from runtime.errors import UserError
from tests.runtime import test_run
from tests.sweeps import cells_of, make, write

NAMES = ("", ".", "./", "..", "../out", "a/../../out", "a/..", "/tmp/out", "//out")


def opened(folder: Path, resume: str = "auto") -> dict | None:
    with files.locked(folder):
        return checkpoint.open_run(folder, {"a": 1}, resume=resume)


def fill(folder: Path) -> None:
    opened(folder)
    checkpoint.save(folder / "last.pt", {}, step=7, config={"a": 1})
    for name in ("results.json", "metrics.jsonl", "eval_knn/results.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")


def test_a_run_folder_that_is_a_link_to_a_folder(tmp_path):
    fill(tmp_path / "disk" / "real")
    (tmp_path / "runs").mkdir()
    link = tmp_path / "runs" / "a"
    link.symlink_to(tmp_path / "disk" / "real")
    assert opened(link)["step"] == 7
    assert opened(link, "never") is None
    assert link.is_symlink() and os.listdir(tmp_path / "disk" / "real") == ["config.yaml"]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_links_that_lead_nowhere(resume, tmp_path):
    link = tmp_path / "a"
    link.symlink_to("real")
    (tmp_path / "b").symlink_to(tmp_path / "unmounted" / "b")
    with pytest.raises(UserError, match=r"/b is a link to .*/unmounted/b, which cannot be made: .* mount it or remove"):
        opened(tmp_path / "b", resume)
    assert not (tmp_path / "unmounted").exists()
    assert opened(link, resume) is None and (tmp_path / "real" / "config.yaml").exists() and link.is_symlink()
    (tmp_path / "loop").symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        opened(tmp_path / "loop", resume)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "c").symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        opened(tmp_path / "c", resume)


def test_links_in_a_run_are_removed_but_not_what_they_name(tmp_path):
    fill(tmp_path / "a")
    fill(tmp_path / "b")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    assert opened(tmp_path / "a", "never") is None and os.listdir(tmp_path / "a") == ["config.yaml"]
    assert (tmp_path / "b" / "eval_knn" / "results.json").exists()


@pytest.mark.parametrize("then", ["auto", "never"])
def test_a_folder_that_a_kill_left_half_removed_is_emptied_by_the_next_start(then, tmp_path, monkeypatch):
    unlink, rmdir, ends = os.unlink, os.rmdir, 0
    for change in range(1, 20):
        folder, calls = tmp_path / str(change), []
        fill(folder)

        def removed(path, *, calls=calls, change=change, remove=unlink, **more):
            calls.append(path)
            if len(calls) == change:
                raise KeyboardInterrupt
            return remove(path, **more)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, "unlink", removed)
                patch.setattr(os, "rmdir", lambda path, removed=removed, **more: removed(path, remove=rmdir, **more))
                opened(folder, "never")
            ends += 1
        except KeyboardInterrupt:
            assert sweep.results_of(folder) is None
        assert opened(folder, then) is None, change
        assert os.listdir(folder) == ["config.yaml"]
    assert 0 < ends < 14  # the later ones were not reached


def test_a_folder_without_its_config_yet_is_no_obstacle_and_one_of_other_files_is(tmp_path):
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"config.yaml.unfinished-{platform.node()}-{process.pid}").write_text("a: ")
    (tmp_path / "a" / ".lock").write_text("of a killed process")
    assert opened(tmp_path / "a", "never") is None and os.listdir(tmp_path / "a") == ["config.yaml"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"b is not a run folder \(it has no config\.yaml\)"):
        opened(tmp_path / "b", "never")
    assert os.listdir(tmp_path / "b") == ["thesis.txt"]


def test_a_copy_that_a_kill_prevented_is_made_by_the_next_start(tmp_path, monkeypatch):
    for step in (3, 6, 8):
        config = test_run.Config(runs=str(tmp_path), run_name=f"run{step}")
        keep_copy, folder = checkpoint.keep_copy, tmp_path / f"run{step}"

        def killed(folder, done, count, step=step, keep_copy=keep_copy):
            if done == step:
                raise KeyboardInterrupt
            keep_copy(folder, done, count)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "keep_copy", killed)
            test_run.main(config)
        last = torch.load(folder / "last.pt", weights_only=True)
        assert last["step"] == step and not (folder / f"step_{step:08d}.pt").exists()
        if step < 8:
            with pytest.raises(KeyboardInterrupt):
                test_run.main(config, killed_in=step)  # before the next copy
            copy = torch.load(folder / f"step_{step:08d}.pt", weights_only=True)
            assert copy["step"] == step and torch.equal(copy["model"]["weight"], last["model"]["weight"])
            assert len(list(folder.glob("step_*.pt"))) == 1
        test_run.main(config)
        assert [path.name for path in folder.glob("step_*.pt")] == ["step_00000008.pt"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_the_runs_are_refused_before_anything_is_read(name, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"run_name=.* must name a folder below "):
        run_folder(test_run.Config(runs=f"{tmp_path}/runs", run_name=name))
    about = ["data.root=/nowhere", f"runs={tmp_path}/runs", f"run_name={name}", "device=cpu"]
    knn = ["task=knn", "backbone=resnet18", "data.name=folder", "data.size=32"]
    for main, words in (
        (train_ssl.main, ["configs/demo/simclr_demo.yaml"]),
        (train_anomaly.main, ["configs/demo/patchcore_demo.yaml"]),
        (evaluate.main, knn),
        (evaluate.main, ["task=defects", "data.name=folder", "data.size=32"]),
        (evaluate.main, ["task=describe", "backbones=resnet18"]),
    ):
        with pytest.raises(UserError, match=r"run_name=.* must name a folder below "):
            main([*words, *(word for word in about if "describe" not in words[0] or "data." not in word)])
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_nested_names_and_links_that_somebody_made_are_used(tmp_path):
    for name, folder in (("a/b", "a/b"), ("./a", "a"), ("a//b/", "a/b"), ("..a", "..a"), ("a/...", "a/...")):
        assert run_folder(test_run.Config(runs=str(tmp_path), run_name=name)) == tmp_path / folder
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "disk").symlink_to(tmp_path / "elsewhere")
    test_run.main(test_run.Config(runs=f"{tmp_path}/runs", run_name="disk/run"))
    assert (tmp_path / "elsewhere" / "run" / "results.json").exists()


@pytest.mark.parametrize("section", ["pretraining", "detectors", "tasks"])
@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_sweep_stay_in_its_folder(section, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    text = {"pretraining": "", "detectors": "my_test.py nothing.yaml", "tasks": "data.root=x"}[section]
    path = write(tmp_path, **{section: {name: text}})
    with pytest.raises(UserError, match=rf"^a name in {section}=.* below runs/grid$|a key must be a word, not ''"):
        sweep.main([path])
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "sweep.yaml"])


def test_cells_of_a_sweep_are_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    detectors = {"a": "my_test.py x.yaml", "b/a": "my_test.py x.yaml k=2"}
    words, _ = cells_of(tmp_path, tasks={"x/y": "data.root=1"}, detectors=detectors)
    assert {"x/y/a/random", "x/y/b/a/mine"} <= {*words}
    with pytest.raises(UserError, match=r"two of the sweep's cells would be called x/b/a/random: rename one"):
        cells_of(tmp_path, tasks={"x": "data.root=1", "x/b": "data.root=2"}, detectors=detectors)
    mine = {"p": "my_train.py x.yaml", "p/q": "my_train.py x.yaml k=3"}
    with pytest.raises(UserError, match=r"the cell pretraining/p/q would be in the folder of the cell pretraining/p: "):
        cells_of(tmp_path, pretraining=mine)
    values = cells_of(tmp_path, grid={"data.root": ["../../out", "/tmp/out"]})[0]
    assert len(values) == 8 and not any(".." in Path(name).parts or name.startswith("/") for name in values)
