"""Full disks: every script says in one line what it could not write and leaves nothing half-written, and once there is
room the same command ends as if nothing had happened."""

import csv
import functools
import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.image_files import find_images
from tests.attacks.small_disk import BLOCK, SmallDisk
from tests.images import write_classes, write_mvtec
from tests.scripts import test_train_anomaly, test_train_classifier, test_train_ssl
from tests.scripts.test_predict import write_run

DEMO = """
from data.demo.generate import generate
from runtime import errors
errors.run(lambda argv: print(f'{{"set": "{generate(argv[0], scale=0.01, workers=0)}"}}'))
"""
SWEEP = """
pretraining: {{random: backbone.name=mobilenet_v2 backbone.width=0.25}}
detectors: {{knn: eval.py task=knn data.size=32 device=cpu}}
tasks: {{stripes: data.name=folder data.root={classes}}}
seeds: [0, 1]
metrics: [top1]
runs: {disk}
run_name: grid
"""
SCRIPTS = ("train_ssl", "train_anomaly", "train_classifier", "predict", "eval", "sweep", "demo")
OF_TIME = ("seconds", "images_per_second", "data_wait_share", "time", "checksum")  # which covers them


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    made = SmallDisk(tmp_path_factory.mktemp("attacked") / "disk")
    yield made
    made.close()


@pytest.fixture(scope="module")
def commands(disk, tmp_path_factory) -> dict[str, list[str]]:
    """{script: words}, of which each writes to the disk only."""
    place = tmp_path_factory.mktemp("inputs")
    classes, mvtec = write_classes(place / "classes"), write_mvtec(place / "mvtec")
    small = ["backbone=mobilenet_v2", "backbone.width=0.25"]
    detector = test_train_anomaly.words("patchcore", mvtec, disk.path, *small, "detector.stages=2,3")
    write_run(place / "run", find_images(mvtec / "part" / "train"), "patchcore")
    (place / "demo.py").write_text(DEMO)
    (place / "sweep.yaml").write_text(SWEEP.format(classes=classes, disk=disk.path))
    images = mvtec / "part" / "test"
    more = ["save.best=true", "save.keep_last=1"]
    of_eval = ["task=knn", *small, "data.name=folder", f"data.root={classes}", "data.size=32", "device=cpu"]
    return {
        "train_ssl": ["train_ssl.py", *test_train_ssl.words("simclr", classes, disk.path, *more)],
        "train_anomaly": ["train_anomaly.py", *detector],
        "train_classifier": ["train_classifier.py", *test_train_classifier.words(classes, disk.path)],
        "predict": ["predict.py", str(place / "run"), str(images), f"out={disk.path}/out", "device=cpu"],
        "eval": ["eval.py", *of_eval, f"runs={disk.path}"],
        "sweep": ["sweep.py", str(place / "sweep.yaml")],
        "demo": [str(place / "demo.py"), f"{disk.path}/set"],
    }


def said(out: Path) -> list[str]:
    """The lines on stderr that are an error, or of a traceback."""
    lines = Path(f"{out}.err").read_text().replace("\r", "\n").splitlines()
    return [line for line in lines if "rror" in line or "Traceback" in line or "failed:" in line]


def content(folder: Path) -> dict:
    """{file: what it holds}, without times and TensorBoard's events; an exception if one is cut or damaged."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name):
        if path.suffix == ".pt":
            value = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            value = plain(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            value = [plain(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".csv":
            value = [plain(row) for row in csv.DictReader(io.StringIO(path.read_text()))]
        else:
            value = path.read_bytes()
            if path.suffix in (".png", ".jpg"):
                Image.open(path).load()
        found[str(path.relative_to(folder))] = value
    return found


def plain(value):
    """Comparable with ==, bit by bit, and without times."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not str(key).rpartition("/")[2].startswith(OF_TIME)}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def sizes(needed: int) -> list[int]:
    """Nine sizes in bytes, from a single block to one block less than is needed; most of them small."""
    most = needed // BLOCK - 1
    return [BLOCK * max(k + 1, 1 + round((most - 1) * (k / 8) ** 3)) for k in range(9)]


@pytest.fixture(scope="module")
def whole(disk, commands, tmp_path_factory):
    """(bytes needed, contents) of what a script leaves with room for all."""

    @functools.cache
    def of(name: str) -> tuple[int, dict]:
        place = tmp_path_factory.mktemp(name)
        disk.empty()
        assert disk.run(commands[name], place / "out") == 0, (place / "out.err").read_text()
        return disk.needed(), content(disk.copy(place / "files"))

    return of


def check_end(name: str, status: int, out: Path, left: Path, expected: dict, reason: str) -> None:
    """One line says why, and what is left is whole, complete, and does not look finished."""
    lines = said(out)
    assert all(len(line) <= 300 and reason in line for line in lines), lines
    if name == "sweep" and status == 1:  # its cells failed, each in a line, but the tables were written
        assert lines and all(line.startswith("    failed: cannot ") for line in lines)
    elif name == "sweep":
        assert status == 2 and lines[-1].startswith("error: cannot ")
        assert all(line.startswith("    failed: cannot ") for line in lines[:-1])
    else:
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: cannot "), lines
    found = content(left)
    assert not [path for path in found if "unfinished" in path or ".lock" in path]
    assert found.keys() <= expected.keys() | {path for path in found if path.rpartition("/")[2].startswith("step_")}
    last = {"predict": "out/predictions.csv", "demo": "set/demo.json", "sweep": "grid/results.csv"}
    last |= {"eval": "eval/eval_knn/results.json"}
    ended = found.get(last.get(name, "run/results.json"))
    assert ended is None or (name == "sweep" and status == 1), "it looks as if it had ended"


def attack(name: str, size: int, disk, commands, expected: dict, tmp_path: Path) -> None:
    """Run a script on a disk of this size, then again with room."""
    disk.empty(size=size)
    status = disk.run(commands[name], tmp_path / "full")
    reason = "No space left on device; make room" if disk.is_real else "File too large; raise the limit"
    check_end(name, status, tmp_path / "full", disk.copy(tmp_path / "left"), expected, reason)
    disk.change()
    assert disk.run(commands[name], tmp_path / "again") == 0, (tmp_path / "again.err").read_text()
    assert content(disk.copy(tmp_path / "whole")) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("name", SCRIPTS)
def test_nine_sizes(name, number, disk, commands, whole, tmp_path):
    needed, expected = whole(name)
    attack(name, sizes(needed)[number], disk, commands, expected, tmp_path)


@pytest.mark.parametrize("name", ["eval", "predict"])
def test_a_disk_that_is_just_too_small(name, disk, commands, whole, tmp_path):
    needed, expected = whole(name)
    attack(name, needed - BLOCK, disk, commands, expected, tmp_path)


def test_a_disk_that_takes_no_more_files(disk, commands, tmp_path):
    if not disk.is_real:
        pytest.skip("this user may mount nothing")
    for files in (1, 2, 4, 5):  # none but the top folder, the run folder, a file, two files
        disk.empty(nr_inodes=files)
        assert disk.run(commands["eval"], tmp_path / f"{files}") == 2
        (line,) = said(tmp_path / f"{files}")
        assert line.startswith("error: cannot write ") and "No space left on device" in line


@pytest.mark.parametrize("name", ["eval", "predict", pytest.param("train_ssl", marks=pytest.mark.slow), "demo"])
def test_a_disk_that_is_read_only(name, disk, commands, tmp_path):
    if not disk.is_real:
        pytest.skip("this user may mount nothing")
    disk.empty()
    disk.change(read_only=True)
    assert disk.run(commands[name], tmp_path / "out") == 2
    (line,) = said(tmp_path / "out")
    assert line.startswith("error: cannot write ") and "Read-only file system; choose another location" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
@pytest.mark.parametrize("name", ["out", "out.err"])
def test_what_is_printed_goes_to_a_full_disk(name, disk, commands, tmp_path):
    (tmp_path / name).symlink_to("/dev/full")
    disk.empty()
    assert disk.run(commands["eval"], tmp_path / "out") == 2
    if name == "out":
        assert said(tmp_path / "out") == ["error: cannot use a file: No space left on device; make room"]
        assert (disk.copy(tmp_path / "files") / "eval" / "eval_knn" / "results.json").exists()
