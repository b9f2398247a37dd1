"""The walk over folders: which files are images, links, what is left out and said, and names of any bytes."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image, features

from data import image_files
from data.image_files import extensions, find_images, is_junk, list_images
from runtime.errors import UserError


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(paths, root):
    return [path[len(str(root)) + 1 :] for path in paths]


def test_find_images(tmp_path, capsys):
    for name in (
        "b.JPG",
        "a/z.png",
        "a/deep/er/x.TIFF",
        "a-b/y.jpeg",
        ".hidden.png",
        "._b.jpg",
        ".git/c.png",
    ):
        touch(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    assert names(find_images(tmp_path), tmp_path) == ["a-b/y.jpeg", "a/deep/er/x.TIFF", "a/z.png", "b.JPG"]
    assert find_images(tmp_path / "nowhere") == [] and find_images(tmp_path / "b.JPG") == []
    assert capsys.readouterr().err == ""  # nothing was left out that the user has not hidden


@pytest.mark.parametrize("extension", ["jfif", "jpe", "dib", "tga", "avif", "PCX", "Jp2", "webp", "mpo", "j2k", "ppm"])
def test_every_extension_that_pillow_decodes(tmp_path, extension):
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    image.save(tmp_path / f"x.{extension.lower()}")
    os.rename(tmp_path / f"x.{extension.lower()}", tmp_path / f"x.{extension}")
    assert find_images(tmp_path) == [str(tmp_path / f"x.{extension}")]


def test_extensions_of_other_things():
    every = {".eps", ".ps", ".pdf", ".mpg", ".h5", ".hdf", ".grib", ".wmf", ".emf", ".ico", ".gbr", ".pfm", ".db", ""}
    assert every.isdisjoint(extensions())
    old = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".jp2"}
    assert old <= extensions()


def test_a_link_to_a_folder_above_is_not_followed(tmp_path, capsys):
    touch(*(tmp_path / "set" / name / f"{i}.png" for name in "ab" for i in range(10)))
    touch(tmp_path / "elsewhere.png")
    os.symlink("..", tmp_path / "set/a/up")
    os.symlink("../..", tmp_path / "set/b/far_up")
    os.symlink(tmp_path / "set/b", tmp_path / "set/b/self")
    found = list_images(tmp_path / "set")
    assert len(found.paths) == 20 and not any(os.path.islink(os.path.dirname(path)) for path in found.paths)
    assert names(sorted(found.repeated), tmp_path) == ["set/a/up", "set/b/far_up", "set/b/self"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "3 links to folders that are in already" in err
    find_images(tmp_path / "set")
    assert capsys.readouterr().err == ""  # said once


def test_of_two_paths_to_a_folder_the_real_one_wins_then_the_shorter(tmp_path):
    touch(tmp_path / "set/z/1.png", tmp_path / "pool/p/2.png", tmp_path / "pool/p/deep/3.png")
    os.symlink("z", tmp_path / "set/a")  # before the real one by name
    os.symlink(tmp_path / "pool/p/deep", tmp_path / "set/k")
    (tmp_path / "set/b").mkdir()
    os.symlink(tmp_path / "pool/p", tmp_path / "set/b/x")
    os.symlink(tmp_path / "pool/p", tmp_path / "set/m")
    os.symlink(tmp_path / "pool/p", tmp_path / "set/l")
    found = list_images(tmp_path / "set")
    assert names(found.paths, tmp_path / "set") == ["k/3.png", "l/2.png", "z/1.png"]
    again = dict(zip(names(found.repeated, tmp_path), found.repeated.values()))
    assert {link: entered[len(str(tmp_path)) + 1 :] for link, entered in again.items()} == {
        "set/a": "set/z",
        "set/l/deep": "set/k",
        "set/m": "set/l",
        "set/b/x": "set/l",
    }


def test_the_first_folder_may_be_a_link_and_links_to_files_count(tmp_path):
    touch(tmp_path / "val/a/1.png", tmp_path / "pool/2.png")
    os.symlink("val", tmp_path / "test")
    os.symlink("../../pool/2.png", tmp_path / "val/a/2.png")
    os.symlink("../../pool/2.png", tmp_path / "val/a/again.png")  # a file may be in twice: that is how splits are made
    os.symlink("nowhere.png", tmp_path / "val/a/broken.png")  # decoding names it
    expected = ["1.png", "2.png", "again.png", "broken.png"]
    assert names(find_images(tmp_path / "test"), tmp_path) == [f"test/a/{name}" for name in expected]


def test_folders_above_are_those_of_the_path_and_of_what_it_links_to(tmp_path):
    touch(tmp_path / "pool/deep/val/a/1.png", tmp_path / "pool/other.png", tmp_path / "set/train/a/2.png")
    os.symlink("../pool/deep/val", tmp_path / "set/test")
    os.symlink(tmp_path / "pool", tmp_path / "pool/deep/val/a/up")
    os.symlink(tmp_path / "set", tmp_path / "pool/deep/val/a/set")
    assert names(find_images(tmp_path / "set/test"), tmp_path) == ["set/test/a/1.png"]


def test_what_is_left_out_is_said_in_one_line(tmp_path, capsys):
    junk = ["@eaDir", "__MACOSX", "lost+found", "Thumbs", "thumbnails", "$RECYCLE.BIN"]
    touch(*(tmp_path / name / "1.png" for name in [*junk, "a/@eaDir", ".ipynb_checkpoints", "a"]))
    touch(*(tmp_path / "a" / f"{i}.txt" for i in range(10)), tmp_path / "a/README", tmp_path / "b.JSON")
    touch(tmp_path / "a/Thumbs.db", tmp_path / "desktop.ini", tmp_path / "a/.DS_Store")
    os.mkfifo(tmp_path / "a/pipe.png")  # is not left out: decoding names it
    touch(tmp_path / "runs/one/config.yaml", tmp_path / "runs/one/metrics.jsonl", tmp_path / "runs/one/heatmaps.png")
    touch(tmp_path / "out/predictions.csv", tmp_path / "out/heatmaps/a/1.png.png", tmp_path / "out/photo.png")
    touch(tmp_path / "killed/predictions.csv.tmp17", tmp_path / "killed/heatmaps/1.png.png")
    touch(tmp_path / "heatmaps/real.png", tmp_path / "elsewhere/heatmaps_of_mine/1.png")
    expected = ["a/1.png", "a/pipe.png", "elsewhere/heatmaps_of_mine/1.png", "heatmaps/real.png", "out/photo.png"]
    assert names(find_images(tmp_path), tmp_path) == expected
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"{tmp_path}: left out 14 files of other kinds (")
    for part in (
        "10 .txt",
        "1 .csv",
        "1 without extension",
        "1 .json",
        "7 folders by name",
        "@eaDir",
        "3 folders of runs",
    ):
        assert part in err, part
    assert names(find_images(tmp_path, leave_out=tmp_path / "a"), tmp_path) == expected[2:]
    assert is_junk(".x") and not is_junk("x") and not is_junk("_x")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "a/1.png", tmp_path / "locked/2.png", tmp_path / "lost+found/3.png")
    scandir = os.scandir

    def refuse(place):  # tests may run as root, whom no mode of a folder stops
        if os.path.basename(place) in ("locked", "lost+found"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(image_files.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"read folder .*/locked: Permission denied; .* \(name it \.locked\)"):
        find_images(tmp_path)
    monkeypatch.undo()
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(UserError, match=r"cannot read folder .*/loop: Too many levels"):
        find_images(tmp_path)


def test_names_of_any_bytes(tmp_path, capsys):
    raw, composed, newline = os.fsdecode(b"\xff\xfe.png"), unicodedata.normalize("NFD", "größe.png"), "a\nb.PNG"
    touch(*(tmp_path / os.fsdecode(b"d\x80") / name for name in (raw, composed, newline, os.fsdecode(b"\xff.txt"))))
    found = find_images(tmp_path)
    assert {os.path.basename(path) for path in found} == {raw, composed, newline}
    assert all(os.path.isfile(path) for path in found)
    assert r"d\x80" in capsys.readouterr().err
