"""Class folders: layouts, the fixed split, and what a user may have got wrong."""

import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.folder import ClassFolder
from runtime.errors import UserError


def write(path, value=0, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(path)


def names(dataset, root):
    return [path[len(str(root)) + 1 :] for path in dataset.paths]


def test_train_and_test_folders(tmp_path):
    write(tmp_path / "train/valve/1.png", 10)
    write(tmp_path / "train/liner/b.png", 30)
    write(tmp_path / "train/liner/2024/deep/a.JPG", 20, size=(8, 2))
    write(tmp_path / "train/port/1.png", 40)
    write(tmp_path / "test/valve/1.png", 50)
    write(tmp_path / "contact_sheet.png")  # beside train and test: nobody's
    (tmp_path / "train/valve/notes.txt").write_text("x")
    train, test = ClassFolder("train", 5, root=str(tmp_path)), ClassFolder("test", 5, root=str(tmp_path))
    assert train.classes == test.classes == ["liner", "port", "valve"]
    assert names(train, tmp_path) == [
        "train/liner/2024/deep/a.JPG",
        "train/liner/b.png",
        "train/port/1.png",
        "train/valve/1.png",
    ]
    assert train.labels.tolist() == [0, 0, 1, 2] and train.labels.dtype == torch.int64
    assert train.sizes.tolist() == [[8, 2], [4, 6], [4, 6], [4, 6]] and train.sizes.dtype == torch.int64
    assert len(test) == 1 and test.labels.tolist() == [2]
    image, label, index = train[3]
    assert image.shape == (3, 5, 5) and image.dtype == torch.uint8 and image.unique().tolist() == [10]
    assert (label, index) == (2, 3)
    with pytest.raises(IndexError):
        train[4]


@pytest.fixture
def undivided(tmp_path):
    for name, count in {"a": 10, "b": 5, "c": 2, "d": 1}.items():
        for i in range(count):
            write(tmp_path / name / f"{i:02}.png", i)
    return tmp_path


def test_split_is_stratified_disjoint_and_the_same_every_time(undivided):
    train, test = ClassFolder("train", 4, root=str(undivided)), ClassFolder("test", 4, root=str(undivided))
    assert set(train.paths).isdisjoint(test.paths) and len(train) + len(test) == 18
    assert train.classes == test.classes == ["a", "b", "c", "d"]
    assert train.labels.bincount(minlength=4).tolist() == [8, 4, 1, 1]
    assert test.labels.bincount(minlength=4).tolist() == [2, 1, 1, 0]
    assert train.paths == sorted(train.paths) and test.paths == sorted(test.paths)
    # Written down: the split of a data set must not move with a version of this or any other software
    assert names(test, undivided) == ["a/02.png", "a/08.png", "b/02.png", "c/01.png"]
    assert ClassFolder("test", 4, root=str(undivided), test_fraction=0.5).labels.bincount().tolist() == [5, 3, 1]


def test_split_of_a_class_does_not_depend_on_other_classes(undivided):
    before = names(ClassFolder("test", 4, root=str(undivided)), undivided)
    for i in range(7):
        write(undivided / "aa" / f"{i}.png")
    after = names(ClassFolder("test", 4, root=str(undivided)), undivided)
    assert [name for name in after if not name.startswith("aa/")] == before


def test_a_flat_folder_is_one_class_and_trains_on_all_of_it(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png")
    (tmp_path / "notes").mkdir()
    train = ClassFolder("train", 4, root=str(tmp_path))
    assert train.classes == ["unlabelled"] and train.labels.tolist() == [0] * 5 and train.left_out == {}
    with pytest.raises(UserError, match=r"data\.test_fraction=0\.0 has no test image"):
        ClassFolder("test", 4, root=str(tmp_path))
    given = {"root": str(tmp_path), "test_fraction": 0.2}  # said, so it counts
    train, test = ClassFolder("train", 4, **given), ClassFolder("test", 4, **given)
    assert (len(train), len(test)) == (4, 1)
    assert train.left_out == {"kept for testing (data.test_fraction=0.2)": 1}
    assert test.left_out == {"kept for training (data.test_fraction=0.2)": 4}


def test_a_link_to_the_root_makes_no_second_images(undivided):
    plain = [ClassFolder(split, 4, root=str(undivided)).paths for split in ("train", "test")]
    os.symlink("..", undivided / "a/up")
    os.symlink(".", undivided / "z")  # would be a class of everything
    assert [ClassFolder(split, 4, root=str(undivided)).paths for split in ("train", "test")] == plain


def test_one_folder_as_two_classes_or_in_training_and_test(undivided):
    os.symlink("a", undivided / "aa")
    with pytest.raises(UserError, match=r"class folder .*/aa is a link to .*/a, whose images are in already: remove"):
        ClassFolder("train", 4, root=str(undivided))
    (undivided / "aa").unlink()
    write(undivided / "set/train/a/0.png")
    write(undivided / "set/train/b/0.png")
    write(undivided / "set/test/a/1.png")
    os.symlink("../train/b", undivided / "set/test/b")
    assert len(ClassFolder("train", 4, root=str(undivided / "set"))) == 2
    with pytest.raises(UserError, match=r"test/b and .*train/b are the same folder, so the test would be on training"):
        ClassFolder("test", 4, root=str(undivided / "set"))
    (undivided / "set/test/b").unlink()
    (undivided / "set/test/b").mkdir()
    os.symlink("../../train/b/0.png", undivided / "set/test/b/0.png")  # single files may be linked
    assert len(ClassFolder("test", 4, root=str(undivided / "set"))) == 2


def test_folders_of_runs_and_thumbnails_are_no_classes(undivided, capsys):
    plain = ClassFolder("train", 4, root=str(undivided))
    write(undivided / "runs/simclr/views.png")
    (undivided / "runs/simclr/config.yaml").touch()
    (undivided / "runs/simclr/metrics.jsonl").touch()
    write(undivided / "@eaDir/a.png")
    write(undivided / "a/@eaDir/02.png")
    again = ClassFolder("train", 4, root=str(undivided))
    assert again.classes == plain.classes and again.paths == plain.paths
    assert "2 folders by name (@eaDir), 1 folder of runs" in capsys.readouterr().err


def test_flat_images_below_train(tmp_path):
    write(tmp_path / "train/1.png")
    assert ClassFolder("train", 4, root=str(tmp_path)).classes == ["unlabelled"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_and_empty_roots(tmp_path, split):
    with pytest.raises(UserError, match=r"data\.root=.*nowhere is not a folder: expected <root>/<class>"):
        ClassFolder(split, 4, root=str(tmp_path / "nowhere"))
    (tmp_path / "empty/class").mkdir(parents=True)
    (tmp_path / "empty/class/readme.txt").touch()
    with pytest.raises(UserError, match=r"empty holds no image: expected <root>/<class>"):
        ClassFolder(split, 4, root=str(tmp_path / "empty"))


def test_missing_test_folder(tmp_path):
    write(tmp_path / "train/a/1.png")
    assert len(ClassFolder("train", 4, root=str(tmp_path))) == 1
    with pytest.raises(UserError, match=r"no folder .*/test, yet .*/train exists: make it, link"):
        ClassFolder("test", 4, root=str(tmp_path))


def test_unclear_layouts(tmp_path):
    write(tmp_path / "train/a/1.png")
    write(tmp_path / "test/b/1.png")
    with pytest.raises(UserError, match=r"test has classes that .*train has not: b"):
        ClassFolder("test", 4, root=str(tmp_path))
    (tmp_path / "train/void").mkdir()
    with pytest.raises(UserError, match=r"class folder .*void holds no image"):
        ClassFolder("train", 4, root=str(tmp_path))
    (tmp_path / "train/void").rename(tmp_path / "train/.void")
    write(tmp_path / "train/stray.png")
    with pytest.raises(UserError, match=r"class folders and loose images such as .*stray\.png"):
        ClassFolder("train", 4, root=str(tmp_path))


def test_mvtec_layout_is_no_class_folders(tmp_path):
    """Its ground_truth masks would be images of a class."""
    for place in ("bolt/train/good/0.png", "bolt/test/dent/0.png", "bolt/ground_truth/dent/0_mask.png", "nut/1.png"):
        write(tmp_path / place)
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"MVTec layout \(.*bolt/train/good exists\): use data\.name=mvtec data\."):
            ClassFolder(split, 4, root=str(tmp_path))
    assert ClassFolder("train", 4, root=str(tmp_path / "bolt/train"), test_fraction=0).classes == ["good"]


def test_broken_images_fail_or_are_skipped(undivided, capsys):
    whole = ClassFolder("train", 4, root=str(undivided))
    broken = whole.paths[3]
    with open(broken, "wb"):
        pass
    failing = ClassFolder("train", 4, root=str(undivided), on_error="fail")
    assert len(failing) == len(whole) and failing[2][0].shape == (3, 4, 4)
    with pytest.raises(UserError, match=broken):
        failing[3]
    assert capsys.readouterr().err == ""
    skipping = ClassFolder("train", 4, root=str(undivided), on_error="skip")
    assert skipping.paths == [path for path in whole.paths if path != broken]  # and the split stays as it was
    assert len(skipping.labels) == len(skipping.sizes) == len(skipping) == len(whole) - 1
    assert [skipping[i][2] for i in range(len(skipping))] == list(range(len(skipping)))
    assert broken in capsys.readouterr().err
    assert skipping.left_out == failing.left_out | {"not readable": 1}
    assert failing.left_out == {"kept for testing (data.test_fraction=0.2)": 4}


def test_neu_steel(real_data):
    root = str(real_data / "neu_steel")
    train, test = ClassFolder("train", 64, root=root), ClassFolder("test", 64, root=root)
    assert train.classes == ["crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches"]
    both = train.labels.bincount() + test.labels.bincount()
    assert both.tolist() == [236, 237, 236, 235, 235, 238]  # "about 236 images each"
    assert test.labels.bincount().tolist() == [47, 47, 47, 47, 47, 48]
    assert set(train.paths).isdisjoint(test.paths)
    assert (test.sizes == 200).all()
    image, label, _ = test[0]
    assert image.shape == (3, 64, 64) and label == 0 and image.float().std() > 5


def test_memory_of_a_large_tree_is_bounded(tmp_path):
    """Listed, an image takes less than 400 bytes with its path of about 100; so a million take under 400 MB."""
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(1_000):
            (tmp_path / name / f"{i:06d}.jpg").touch()
    ClassFolder("train", 8, root=str(tmp_path / "a"), test_fraction=0.0)  # Pillow loads its readers
    tracemalloc.start()
    dataset = ClassFolder("train", 8, root=str(tmp_path), test_fraction=0.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 4_000 and peak < 400 * 4_000
