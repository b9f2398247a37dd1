"""Damaged results.json, metrics.jsonl, config.yaml, test_scores.csv and .cells/*.json: none counts as done, none ends
in a traceback, and each is what it was once the same command has run again."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import sweep
import train_anomaly
import train_ssl
from runtime import checkpoint
from runtime.errors import UserError
from runtime.log import Log
from tests.images import write_classes, write_mvtec
from tests.scripts import test_train_anomaly
from tests.sweeps import calls, make, write

NESTED = b"[" * 100_000
TIMES = ("seconds", "seconds_fit", "seconds_threshold", "images_per_second")


def with_value(value: bytes) -> Callable[[bytes], bytes]:
    """A value in place of the first number."""

    def change(whole: bytes) -> bytes:
        start = next(i for i in range(len(whole)) if whole[i : i + 2] == b": " and whole[i + 2 : i + 3].isdigit()) + 2
        end = min(i for i in (whole.find(b",", start), whole.find(b"}", start)) if i > 0)
        return whole[:start] + value + whole[end:]

    return change


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",  # noqa: ARG005
    "one brace": lambda whole: whole[:1],
    "half": lambda whole: whole[: len(whole) // 2],
    "cut before its end": lambda whole: whole.rstrip()[:-1],
    "zeros of a power cut": lambda whole: bytes(len(whole)),
    "its end zeros": lambda whole: whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
    "no UTF-8": lambda whole: whole[:5] + b"\xff\xfe" + whole[5:],
    "UTF-16": lambda whole: b"\xff\xfe" + whole.decode().encode("utf-16-le")[:-3],
    "binary": lambda whole: random.Random(len(whole)).randbytes(500),
    "a list": lambda whole: b"[" + whole.strip() + b"]",
    "a number": lambda whole: b"3",  # noqa: ARG005
    "null": lambda whole: b"null",  # noqa: ARG005
    "a text": lambda whole: b'"done"',  # noqa: ARG005
    "without keys": lambda whole: b"{}",  # noqa: ARG005
    "nested": lambda whole: NESTED + whole,
    "nested inside": with_value(NESTED),
    "NaN": with_value(b"NaN"),
    "infinite": with_value(b"1e999"),
    "5,000 digits": with_value(b"9" * 5000),
    "twice": lambda whole: whole.strip() + whole.strip(),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Finished runs: simclr, patchcore."""
    top = tmp_path_factory.mktemp("records")
    write_classes(top / "classes", classes=2, each=4, size=24)
    write_mvtec(top / "mvtec", normal=6)
    for script, words in commands(top, top / "runs"):
        script.main(words)
    return top


def commands(top: Path, runs: Path) -> list[tuple]:
    ssl = ["configs/demo/simclr_demo.yaml", f"data.root={top}/classes", "data.size=24", "augment.size=16", "epochs=1"]
    ssl += ["batch_size=2", "holdout=0.25", "method.out=4", "log_every=1", "save.every=1", "backbone=mobilenet_v2"]
    ssl += ["backbone.width=0.25", "device=cpu", f"runs={runs}"]
    patchcore = test_train_anomaly.words("patchcore", top / "mvtec", runs, "data.size=32", "run_name=patchcore")
    return [(train_ssl, [*ssl, "run_name=simclr"]), (train_anomaly, patchcore)]


def results_of(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in TIMES}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["simclr", "patchcore"])
@pytest.mark.parametrize("file", ["results.json", "config.yaml", "metrics.jsonl"])
def test_a_finished_run_with_a_damaged_file_is_whole_again(number, file, runs, tmp_path, capsys):
    """Nothing reads test_scores.csv: it is damaged together with results.json, and written anew with it."""
    script, words = commands(runs, tmp_path)[number]
    name = words[-1].partition("=")[2]
    before = {path.name: path.read_bytes() for path in (runs / "runs" / name).iterdir() if path.is_file()}
    if not before[file]:
        pytest.skip(f"{name} has no lines in {file}")
    together = ("results.json", "test_scores.csv") if file == "results.json" else (file,)
    for damage, change in DAMAGES.items():
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / "runs" / name, folder)
        for each in [each for each in together if each in before]:
            (folder / each).write_bytes(change(before[file if file == "metrics.jsonl" else "results.json"]))
        capsys.readouterr()
        script.main(words)
        out, err = capsys.readouterr()
        assert json.loads(out.splitlines()[-1]) == json.loads((folder / "results.json").read_text()), damage
        assert results_of(folder) == results_of(runs / "runs" / name), damage
        assert ("is damaged: the results are written anew" in err) == (file == "results.json"), damage
        if "test_scores.csv" in before:
            text = before["test_scores.csv"].decode()
            assert (folder / "test_scores.csv").read_text() == text, damage
        text = before["config.yaml"].decode().replace(str(runs / "runs"), str(tmp_path))
        assert (folder / "config.yaml").read_text() == text, damage
        if file == "metrics.jsonl":
            assert ("left out damaged lines" in err) == (damage != "empty"), damage
            assert {*(folder / file).read_text().splitlines()} <= {*before[file].decode().splitlines()}, damage


def test_lines_of_the_curves_that_are_damaged_are_left_out_and_said(tmp_path, capsys):
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() for step in (1, 2, 3)]
    for damage, change in DAMAGES.items():
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], change(lines[1]), lines[2]]) + b"\n")
        log = Log(tmp_path, {}, step=3)
        log.writer.close()
        kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert kept == [1, 3], damage
        assert "metrics.jsonl: left out damaged lines" in capsys.readouterr().err, damage


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_what_is_no_file_does_not_count_and_is_not_waited_for(kind, tmp_path):
    kinds = {"folder": os.mkdir, "pipe": os.mkfifo, "link to nothing": lambda path: os.symlink("nowhere", path)}
    for name in ("results.json", "metrics.jsonl", "last.pt"):
        kinds[kind](tmp_path / name)
    assert checkpoint.read_object(tmp_path / "results.json") is None
    with pytest.raises(UserError, match=r", not a regular file|cannot read .*No such file|folder without last\.pt"):
        checkpoint.load(tmp_path / "last.pt")
    if kind == "folder":
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
            Log(tmp_path, {})
    else:
        log = Log(tmp_path, {})
        assert not log.repeat_results()
        log.results({"version": "x"})
        assert log.repeat_results()


def test_results_are_repeated_only_if_they_are_whole(tmp_path, capsys):
    log, path = Log(tmp_path, {}), tmp_path / "results.json"
    log.results({"loss": 1, "version": "x"})
    whole = path.read_bytes()
    for damage, change in DAMAGES.items():
        path.write_bytes(change(whole))
        assert not log.repeat_results(), damage
        _, err = capsys.readouterr()
        assert err.splitlines()[-1] == f"{path} is damaged: the results are written anew", damage
    path.write_bytes(whole)
    assert log.repeat_results() and json.loads(capsys.readouterr().out) == {"loss": 1, "version": "x"}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["results.json", "note"])
def test_a_sweep_runs_cells_with_damaged_files_again(file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(make(tmp_path))
    keys = {"tasks": {"part": "data.root=part"}, "detectors": {"a": "my_test.py x.yaml"}}
    sweep.main([write(tmp_path, **keys)])
    top, last = Path("runs/grid"), None
    cells = [f"part/a/{name}" for name in ("random", "mine")]
    for number, (damage, change) in enumerate(DAMAGES.items(), 2):
        for cell in cells:
            path = top / cell / "results.json" if file == "results.json" else top / ".cells" / f"{cell}.json"
            path.write_bytes(change(path.read_bytes()))
        capfd.readouterr()
        sweep.main([write(tmp_path, **keys)])
        out, err = capfd.readouterr()
        last = json.loads(out.splitlines()[-1])
        assert last["failed"] == [] and "Traceback" not in err, damage
        assert calls(tmp_path)["part/a/random"] == number, damage  # the script decides
        assert calls(tmp_path)["part/a/mine"] == (1 if file == "note" else number), damage  # of which pretraining?
        for cell in cells:
            assert json.loads((top / cell / "results.json").read_text())["image_auroc"] == 0.1, damage


def test_a_metric_that_is_no_number_fails_its_cell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(make(tmp_path))
    keys = {"pretraining": {"random": ""}, "detectors": {"a": "my_test.py x.yaml"}}
    sweep.main([write(tmp_path, **keys)])
    path = Path("runs/grid/part/a/random/results.json")
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"image_auroc": "high"}))
    with pytest.raises(SystemExit):
        sweep.main([write(tmp_path, **keys)])
    assert "image_auroc is not a number" in capfd.readouterr().out
