"""One class as the normal one: who is where, and that nothing else is decoded."""

import pytest
import torch
from PIL import Image

import data.dataset
from data.datasets.folder import ClassFolder
from data.datasets.one_against_all import OneAgainstAll
from data.geometry import Geometry
from runtime.errors import UserError
from tests.data.datasets.test_cifar import CLASSES, published  # noqa: F401 (a fixture)


def write(path, value, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


@pytest.fixture
def root(tmp_path):
    for split, counts in (("train", (3, 4, 2)), ("test", (2, 1, 3))):
        for c, (name, count) in enumerate(zip(("liner", "port", "valve"), counts)):
            for i in range(count):
                write(tmp_path / split / name / f"{i}.png", 10 * c + i)
    return tmp_path


def test_class_folders(root):
    train = OneAgainstAll("train", 8, root=str(root), normal="port")
    assert len(train) == 4 and train.labels.tolist() == [0] * 4 and train.defects == ["good"] * 4
    assert train.classes == ["normal", "anomalous"] and not train.has_masks
    assert all("/train/port/" in path for path in train.paths) and train.sizes.tolist() == [[4, 6]] * 4
    image, label, index = train[2]
    assert image.shape == (3, 8, 8) and image.unique().tolist() == [12] and (label, index) == (0, 2)

    test = OneAgainstAll("test", Geometry(5, 9), root=str(root), normal="port")
    assert test.defects == ["liner", "liner", "good", "valve", "valve", "valve"] and not test.has_masks
    assert test.labels.tolist() == [1, 1, 0, 1, 1, 1] and test.labels.dtype == torch.int64
    assert len(test) == len(test.paths) == len(test.sizes) == 6 and test.geometry == Geometry(5, 9)
    for i, value in enumerate((0, 1, 10, 20, 21, 22)):
        image, mask, label, index = test[i]
        assert image.shape == (3, 5, 9) and image.unique().tolist() == [value] and index == i
        assert mask.shape == (5, 9) and mask.dtype == torch.bool and not mask.any() and label == test.labels[i]


def test_folders_without_a_split_are_divided_as_class_folders_are(root):
    whole = str(root / "train")
    every = ClassFolder("test", 8, root=whole, test_fraction=0.4)
    test = OneAgainstAll("test", 8, root=whole, normal="liner", test_fraction=0.4)
    train = OneAgainstAll("train", 8, root=whole, normal="liner", test_fraction=0.4)
    assert test.paths == every.paths and test.labels.tolist() == (every.labels != 0).long().tolist()
    assert {"/liner/" in path for path in train.paths} == {True} and set(train.paths).isdisjoint(test.paths)


def test_published_cifar10(published):  # noqa: F811
    folder, pixels, labels = published
    for normal in {labels[0], labels[20]}:
        train = OneAgainstAll("train", 32, root=str(folder), normal=CLASSES[normal])
        members = [i for i in range(20) if labels[i] == normal]
        assert len(train) == len(members) and train.sizes.tolist() == [[32, 32]] * len(members)
        for k, i in enumerate(members):
            assert torch.equal(train[k][0], torch.from_numpy(pixels[i])) and train.paths[k].endswith(f"/train#{i}")
        test = OneAgainstAll("test", 32, root=str(folder), normal=CLASSES[normal])
        assert test.labels.tolist() == [int(label != normal) for label in labels[20:]]
        assert test.defects == ["good" if label == normal else CLASSES[label] for label in labels[20:]]
        assert torch.equal(test[3][0], torch.from_numpy(pixels[23]))


def test_only_what_is_needed_is_decoded(root, monkeypatch):
    decoded = []
    decode = data.dataset.decode
    monkeypatch.setattr(data.dataset, "decode", lambda path, *how: decoded.append(path) or decode(path, *how))
    train = OneAgainstAll("train", 8, root=str(root), normal="port")
    assert decoded == []
    train = OneAgainstAll("train", 8, root=str(root), normal="port", on_error="skip")
    assert sorted(decoded) == train.paths


def test_broken_images_fail_or_are_skipped(root, capsys):
    (root / "train/port/1.png").write_bytes(b"")
    (root / "train/liner/0.png").write_bytes(b"")  # of another class: nobody looks at it
    (root / "test/valve/0.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"port/1\.png: the file is empty"):
        OneAgainstAll("train", 8, root=str(root), normal="port")[1]
    train = OneAgainstAll("train", 8, root=str(root), normal="port", on_error="skip")
    warning = capsys.readouterr().err
    assert len(train) == 3 and train[1][0].unique().tolist() == [12]
    assert "left out 1 of 4" in warning and "port/1.png" in warning
    test = OneAgainstAll("test", 8, root=str(root), normal="port", on_error="skip")
    assert test.defects == ["liner", "liner", "good", "valve", "valve"] and len(test.labels) == len(test.paths) == 5


def test_mistakes(root):
    with pytest.raises(UserError, match=r"data\.normal='piston' is no class of .*; classes there: liner, port, valve"):
        OneAgainstAll("train", 8, root=str(root), normal="piston")
    with pytest.raises(UserError, match="is not a folder"):
        OneAgainstAll("train", 8, root=str(root / "nowhere"), normal="port")
    for split in ("train", "test"):
        (root / split / "valve").rename(root / split / "good")
    assert OneAgainstAll("test", 8, root=str(root), normal="good").defects.count("good") == 3
    with pytest.raises(UserError, match=r"class 'good' of .* would be an anomaly"):
        OneAgainstAll("test", 8, root=str(root), normal="port")
