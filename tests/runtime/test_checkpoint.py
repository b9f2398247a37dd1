"""Checkpoints and run folders: atomically, no code run, resumed only with the same config."""

import os
import pickle
import subprocess

import pytest
import torch
import yaml
from torch import nn

from runtime import checkpoint
from runtime.errors import UserError
from runtime.files import unlock
from tests.images import TOP, command


def test_round_trip_and_rotation(tmp_path):
    model = nn.Linear(3, 2)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", {"model": model}, step=step, config={"a": 1})
        checkpoint.keep_copy(tmp_path, step, 2)
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["step"] == 3 and state["config"] == {"a": 1} and isinstance(state["version"], str)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "step_00000002.pt", "step_00000003.pt"]
    assert checkpoint.load(tmp_path / "step_00000002.pt")["step"] == 2
    other = nn.Linear(3, 2)
    checkpoint.restore(state, {"model": other}, tmp_path / "last.pt")
    assert torch.equal(other.weight, model.weight)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt", {}, step=1, config={})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*nothing under that name was changed"):
        checkpoint.save(tmp_path / "last.pt", {}, step=2, config={})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_a_checkpoint_above_the_limit_of_a_file_keeps_the_old_one(tmp_path):
    code = """
import resource, sys, torch
from runtime import checkpoint, errors
def main(argv):
    for step, size in ((1, 10), (2, 100_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        checkpoint.save(argv[0], {"model": torch.nn.Linear(size, 1)}, step=step, config={})
errors.run(main)
"""
    words = command(["-c", code, str(tmp_path / "last.pt")])
    done = subprocess.run(words, cwd=TOP, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"error: cannot write {tmp_path}/last.pt: File too large" in done.stderr
    assert os.listdir(tmp_path) == ["last.pt"] and checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_images_of_a_run_that_resumes(tmp_path):
    folder, images = tmp_path / "run", {"names": list("abcde"), "learned": [0, 2], "tested": ["t"]}

    def resume(**changes):
        state = checkpoint.open_run(folder, {}, images=images | changes)
        unlock(folder)
        return state

    def error(**changes):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError) as caught:
            resume(**changes)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        return str(caught.value)

    assert resume() is None
    checkpoint.save(folder / "last.pt", {}, step=7, config={}, **images)
    assert resume()["step"] == 7
    assert "2 added: f, g; 5 removed: a, b, c, and 2 more)" in error(names=list("fg"))
    assert "training images" in error(names=list("abcdea")) and "(their order)" in error(names=list("edcba"))
    assert "held out" in error(learned=[0, 3])
    assert resume(tested=["t", "u"])["step"] == 7  # it has tested none yet
    (folder / "results.json").write_text("{}")
    assert resume()["step"] == 7
    said = error(tested=["t", "u"])
    assert f"the test images of {folder} changed since its results (1 added: u): choose another run_name" in said
    assert "update=" not in said and "resume=never" in said
    assert "update=" not in error(names=["a"])
    checkpoint.save(folder / "last.pt", {}, step=7, config={}, calibration={}, **images)
    assert f"update={folder}/last.pt" in error(names=["a"])
    checkpoint.save(folder / "last.pt", {}, step=7, config={})  # of a version that stored no names
    assert resume(names=["a"])["step"] == 7


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt .*refused"):
        checkpoint.load("evil.pt")
    with open("evil2.pt", "wb") as file:
        pickle.dump(Malicious(), file)
    with pytest.raises(UserError):
        checkpoint.load("evil2.pt")
    assert not os.path.exists("executed")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_unreadable_files(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x.pt"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(UserError, match="No such file"):
        checkpoint.load(tmp_path / "missing.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="is not a checkpoint of"):
        checkpoint.load(tmp_path / "list.pt")


def test_open_run(tmp_path):
    folder, config = tmp_path / "runs" / "a", {"optim": {"lr": 0.1}, "resume": "auto"}
    assert checkpoint.open_run(folder, config) is None
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    checkpoint.save(folder / "last.pt", {}, step=7, config=config)
    assert checkpoint.open_run(folder, config)["step"] == 7
    other = {"optim": {"lr": 0.2}, "resume": "auto"}
    with pytest.raises(UserError, match=r"another config \(optim.lr: 0.1 -> 0.2\)"):
        checkpoint.open_run(folder, other)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config  # nothing changed by the refusal
    assert checkpoint.open_run(folder, other, resume="never") is None
    unlock(folder)
    assert os.listdir(folder) == ["config.yaml"]


@pytest.mark.parametrize("cuda", [False, True])
def test_what_may_change_the_result(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    here, elsewhere = ("cuda:1", "cpu") if cuda else ("cpu", "cuda")
    old = {"data": {"root": "a", "size": [64], "cache": "auto"}, "device": "auto", "log_every": 1, "sam": None, "b": 0}
    free = {"data": {"root": "/b", "size": [64], "cache": "none", "workers": 0}, "device": here, "log_every": 5, "b": 0}
    assert checkpoint.config_changes(old, free | {"save": {"every": 7}, "runs": "x", "resume": "never"}) == []
    assert checkpoint.config_changes(old, free | {"device": elsewhere}) == ["device"]
    changed = free | {"data": {"root": "a", "size": [32]}, "sam": {"rho": 0.1}, "a": 0, "save": {"best": True}}
    assert checkpoint.config_changes(old, changed) == ["a", "data.size", "sam.rho", "save.best"]
    assert checkpoint.config_changes({}, {"runs": "a"}) == checkpoint.config_changes({}, {}) == []


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_cannot_be_made(resume, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / "file", "is not a run folder|Not a directory|File exists"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "/".join(["x" * 200] * 30), "File name too long"),
        ("/proc/runs/a", "No such file"),
    ):
        with pytest.raises(UserError, match=why):
            checkpoint.open_run(folder, {}, resume=resume)
    assert (tmp_path / "file").read_text() == ""


def test_a_run_folder_and_its_last_checkpoint_name_each_other(tmp_path):
    folder, file = tmp_path / "run", tmp_path / "run" / "last.pt"
    folder.mkdir()
    with pytest.raises(UserError, match=r"run is a folder without last\.pt: name a file, or a run's folder"):
        checkpoint.read(folder)
    checkpoint.save(file, {}, step=4, config={})
    assert checkpoint.load(folder)["step"] == checkpoint.load(str(file))["step"] == 4
    assert checkpoint.file_of(folder) == checkpoint.file_of(file) == file
    assert checkpoint.folder_of(folder) == checkpoint.folder_of(str(file)) == folder
    assert checkpoint.file_of(folder / "best.pt") == folder / "best.pt"
