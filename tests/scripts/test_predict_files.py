"""predict.py where files cannot be written, and what a killed run has left."""

import csv
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import predict
from data.image_files import find_images
from runtime import files
from runtime.errors import UserError
from runtime.files import temporary_name
from tests.images import write_mvtec
from tests.scripts.test_predict import run, write_run


@pytest.fixture(scope="module")
def normals(tmp_path_factory):
    return find_images(write_mvtec(tmp_path_factory.mktemp("normals")) / "part" / "train")


@pytest.fixture(scope="module")
def patchcore(normals, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", normals, "patchcore")


@pytest.fixture(scope="module")
def images(normals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep").mkdir()
    for name, path in zip(("a.png", "b.png", "deep/c.png"), normals):
        shutil.copy(path, folder / name)
    return folder


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_disk(patchcore, images, tmp_path, capsys, monkeypatch):
    run(capsys, patchcore, images / "a.png", f"out={tmp_path}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(files, "remove_unfinished", lambda *_, **__: None)
    temporary_name(tmp_path / "predictions.csv").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*predictions.csv: No space left on device"):
        run(capsys, patchcore, images, f"out={tmp_path}")
    drawn = {path for path in tmp_path.rglob("*") if path.is_file()}  # of those that were drawn in the meantime
    assert {path.parent for path in drawn - {*before}} <= {tmp_path / "heatmaps", tmp_path / "heatmaps" / "deep"}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not [path for path in drawn if "unfinished" in path.name]


def partly(capsys, *words) -> tuple[dict, list[dict], str]:
    """The JSON, the rows, and stderr of a run that could not draw everything."""
    with pytest.raises(SystemExit) as end:
        predict.main([str(word) for word in words] + ["device=cpu"])
    assert end.value.code == 1
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    with open(Path(results["out"]) / "predictions.csv", newline="") as file:
        return results, list(csv.DictReader(file)), err


def test_a_heat_map_that_cannot_be_written_costs_no_row(patchcore, normals, tmp_path, capsys):
    """A folder in its place, a name that is too long with .png; one of 251 bytes is not."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    names = ["a.png", "b.png", "c.png", f"{'d' * 247}.png", f"{'e' * 248}.png"]
    for name in names:
        shutil.copy(normals[0], images / name)
    (out / "heatmaps" / "b.png.png").mkdir(parents=True)
    results, rows, err = partly(capsys, patchcore, images, f"out={out}")
    assert [row["path"] for row in rows] == names and len({row["score"] for row in rows}) == 1
    failed = [str(images / name) for name in (names[1], names[4])]
    assert results["without_heatmap"] == failed and results["images"] == 5 and results["skipped"] == []
    said = [line for line in err.splitlines() if line.startswith("no heat map of ")]
    for line, path, why in zip(said, failed, ("Is a directory", "File name too long"), strict=True):
        assert path in line and why in line
    drawn = {path.name for path in (out / "heatmaps").iterdir()}
    assert drawn == {f"{names[0]}.png", "b.png.png", "c.png.png", f"{names[3]}.png"}
    results, _, _ = run(capsys, patchcore, images / "a.png", f"out={out}")
    assert results["without_heatmap"] == []


def test_what_a_killed_run_left_is_removed_by_the_next(patchcore, images, tmp_path, capsys):
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "heatmaps" / "deep").mkdir(parents=True)
    left = []
    for number, place in ((process.pid, ""), (process.pid, "heatmaps/deep"), (os.getppid(), ""), (1, "heatmaps/deep")):
        left.append(tmp_path / place / f"a.unfinished-{platform.node()}-{number}")
    left.append(tmp_path / f"b.unfinished-another.machine-{process.pid}")
    for path in left:
        path.write_text("cut short")
    (tmp_path / "mine.tmp").write_text("")
    run(
        capsys, patchcore, images / "a.png", f"out={tmp_path}"
    )  # it is alone there, so none of them is written any more
    assert not any(path.exists() for path in left) and (tmp_path / "mine.tmp").exists()


def test_out_that_cannot_be_written_is_found_before_the_work(patchcore, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "examine", None)
    (tmp_path / "out").write_text("mine")
    (tmp_path / "table" / "predictions.csv").mkdir(parents=True)
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "heatmaps").write_text("mine")
    for out, text in (
        ("out", "cannot write in .*out: Not a directory"),
        ("out/deep", "cannot write in .*out/deep: Not a directory"),
        ("table", "cannot write .*table/predictions.csv: Is a directory"),
        ("drawn", "heatmaps is no folder: remove it or choose another out="),
        ("n" * 300, "a name has at most 255 bytes"),
        ("/proc/results", "cannot write in /proc/results: "),
    ):
        with pytest.raises(UserError, match=text):
            run(capsys, patchcore, images, f"out={tmp_path / out}")
        assert "image/s" not in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == (tmp_path / "drawn" / "heatmaps").read_text() == "mine"
    assert not list((tmp_path / "table" / "predictions.csv").iterdir())
