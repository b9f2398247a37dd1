"""CIFAR-10 in both layouts, CIFAR-100, and the corrupted images of CIFAR-10-C."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from data.datasets.cifar import CIFAR10, CIFAR10C, CIFAR100
from runtime.errors import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Four rows per batch in the published format; torchvision's table of checksums is made to fit them."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3072), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(0, 10, 24).tolist()

    def store(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    table = [
        store(name, {"data": pixels[4 * k : 4 * k + 4], "labels": labels[4 * k : 4 * k + 4]})
        for k, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"])
    ]
    name, checksum = store("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", table[:5])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", table[5:])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path, pixels.reshape(-1, 3, 32, 32), labels


def test_published_files(published):
    root, pixels, labels = published
    train, test = CIFAR10("train", root=str(root)), CIFAR10("test", root=str(root))
    assert len(train) == 20 and len(test) == 4 and train.classes == CLASSES
    assert train.labels.tolist() == labels[:20] and test.labels.tolist() == labels[20:]
    assert train.labels.dtype == torch.int64 and train.sizes.tolist() == [[32, 32]] * 20
    for i in range(20):
        image, label, index = train[i]
        assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(pixels[i]))
        assert (label, index) == (labels[i], i)
    assert torch.equal(test[3][0], torch.from_numpy(pixels[23]))
    assert len(set(train.paths)) == 20 and train.paths[17].endswith("cifar-10-batches-py/train#17")
    assert CIFAR10("test", 8, root=str(root))[0][0].shape == (3, 8, 8)


def test_damaged_published_files(published):
    root, *_ = published
    (root / "cifar-10-batches-py/data_batch_3").write_bytes(b"cut")
    with pytest.raises(UserError, match="cifar-10-batches-py is incomplete or damaged: unpack"):
        CIFAR10("train", root=str(root))


def test_a_fifo_among_the_published_files_is_not_waited_for(published):
    file = published[0] / "cifar-10-batches-py" / "data_batch_3"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="data_batch_3 is not a regular file"):
        CIFAR10("train", 32, root=str(published[0]))


def test_image_folders(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (20 * label, i, 0)).save(
                    tmp_path / split / name / f"{i:04}.jpg", quality=100
                )
    train, test = CIFAR10("train", root=str(tmp_path)), CIFAR10("test", root=str(tmp_path))
    assert train.classes == test.classes == CLASSES
    assert train.labels.tolist() == [label for label in range(10) for _ in range(3)] and len(test) == 20
    image, label, index = train[14]
    assert image.shape == (3, 32, 32) and (label, index) == (4, 14)
    assert abs(int(image[0, 0, 0]) - 80) <= 2
    assert train.sizes.tolist() == [[32, 32]] * 30 and train.paths[14].endswith("train/deer/0002.jpg")


def test_unknown_layout(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"holds no CIFAR-10: expected .*cifar-10-batches-py/data_batch_1"):
        CIFAR10("train", root=str(tmp_path))
    with pytest.raises(UserError, match="holds no CIFAR-10"):
        CIFAR10("train", root=str(tmp_path / "nowhere"))


def test_the_first_images_of_each_class(published, tmp_path):
    for label in CLASSES:
        for split in ("train", "test"):
            (tmp_path / "jpeg" / split / label).mkdir(parents=True)
            for number in range(3):
                shade = Image.new("RGB", (32, 32), (number, 0, 0))
                shade.save(tmp_path / "jpeg" / split / label / f"{number}.png")
    two = CIFAR10("train", root=str(tmp_path / "jpeg"), per_class=2)
    assert two.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert [int(two[i][0][0, 0, 0]) for i in range(20)] == [0, 1] * 10 and two[7][2] == 7
    assert len(CIFAR10("test", root=str(tmp_path / "jpeg"), per_class=2)) == 30
    with pytest.raises(UserError, match=r"data\.per_class=4 must be at most 3, a class's images"):
        CIFAR10("train", root=str(tmp_path / "jpeg"), per_class=4)
    root, pixels, labels = published  # 20 rows in an order of their own
    if min(labels[:20].count(label) for label in range(10)) >= 1:
        one = CIFAR10("train", root=str(root), per_class=1)
        first = sorted(labels[:20].index(label) for label in range(10))
        assert one.labels.tolist() == [labels[i] for i in first]
        assert torch.equal(one[3][0], torch.from_numpy(pixels[first[3]]))


def test_published_files_of_cifar100(tmp_path, monkeypatch):
    (tmp_path / "cifar-100-python").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3072), dtype=np.uint8)
    names, lists = [f"class{label}" for label in range(100)], {}
    for name, rows in (("train", slice(0, 6)), ("test", slice(6, 9))):
        content = {"data": pixels[rows], "fine_labels": [99, 1, 0, 50, 7, 7][: len(pixels[rows])]}
        data = pickle.dumps(content | {"coarse_labels": [0] * len(pixels[rows])})
        (tmp_path / "cifar-100-python" / name).write_bytes(data)
        lists[name] = [[name, hashlib.md5(data).hexdigest()]]
    data = pickle.dumps({"fine_label_names": names})
    (tmp_path / "cifar-100-python/meta").write_bytes(data)
    meta = {"filename": "meta", "key": "fine_label_names", "md5": hashlib.md5(data).hexdigest()}
    for name, value in (("train_list", lists["train"]), ("test_list", lists["test"]), ("meta", meta)):
        monkeypatch.setattr(torchvision.datasets.CIFAR100, name, value)
    train, test = CIFAR100("train", root=str(tmp_path)), CIFAR100("test", root=str(tmp_path))
    assert train.labels.tolist() == [99, 1, 0, 50, 7, 7] and test.labels.tolist() == [99, 1, 0]
    assert train.classes == names and train.names[3] == "cifar-100-python/train#3"
    assert torch.equal(test[1][0], torch.from_numpy(pixels[7].reshape(3, 32, 32)))
    (tmp_path / "cifar-100-python/test").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"cifar-100-python is incomplete or damaged: unpack cifar-100-python\.tar\.gz again"
    ):
        CIFAR100("train", root=str(tmp_path))
    with pytest.raises(UserError, match=r"holds no CIFAR-100: expected .*cifar-100-python/train and so on"):
        CIFAR100("train", root=str(tmp_path / "nowhere"))


def test_download_is_torchvisions(tmp_path, monkeypatch):
    asked = []

    class Published(torchvision.datasets.CIFAR10):
        def __init__(self, root, **about):
            asked.append((root, about))
            raise RuntimeError("File not found\nor corrupted.")

    monkeypatch.setattr(CIFAR10, "published", Published)
    with pytest.raises(
        UserError, match=r"data\.download=true: cannot fetch the set into .*: File not found or corrupted"
    ):
        CIFAR10("test", root=str(tmp_path), download=True)
    assert asked == [(str(tmp_path), {"download": True})]


@pytest.fixture
def corrupted(tmp_path):
    """Three test images at five severities; a pixel says which image and how severe."""
    pixels = np.zeros((15, 32, 32, 3), np.uint8)
    pixels[:, 3, 4] = np.stack([np.arange(15) % 3, np.arange(15) // 3 + 1, np.zeros(15)], axis=1)
    np.save(tmp_path / "fog.npy", pixels)
    np.save(tmp_path / "labels.npy", np.tile([3, 9, 0], 5))
    return tmp_path


def test_corrupted_images(corrupted, published):
    root = str(corrupted)
    whole, third = (
        CIFAR10C("test", root=root, corruption="fog"),
        CIFAR10C("test", root=root, corruption="fog", severity=3),
    )
    assert len(whole) == 15 and whole.labels.tolist() == [3, 9, 0] * 5 and whole.classes == CLASSES
    assert third.labels.tolist() == [3, 9, 0] and third.left_out == {"not of data.severity=3": 12}
    assert [third[i][0][:, 3, 4].tolist() for i in range(3)] == [[0, 3, 0], [1, 3, 0], [2, 3, 0]]
    assert third.names == ["fog.npy#6", "fog.npy#7", "fog.npy#8"] and third.sizes.tolist() == [[32, 32]] * 3
    clean, labels = published[0], published[2]
    train = CIFAR10C("train", root=root, corruption="fog", clean=str(clean))
    assert train.labels.tolist() == labels[:20] and train.classes == CLASSES
    with pytest.raises(UserError, match=r"test images only: set data\.clean to the folder of CIFAR-10"):
        CIFAR10C("train", root=root, corruption="fog")


def test_corrupted_images_half_present(corrupted):
    root = str(corrupted)
    with pytest.raises(
        UserError, match=r"cannot read .*snow\.npy: .*expected <root>/<corruption>\.npy and <root>/labels"
    ):
        CIFAR10C("test", root=root, corruption="snow")
    np.save(corrupted / "labels.npy", np.arange(10))
    with pytest.raises(
        UserError, match=r"fog\.npy is uint8 \(15, 32, 32, 3\) and .*labels\.npy \(10,\); expected uint8"
    ):
        CIFAR10C("test", root=root, corruption="fog")
    (corrupted / "labels.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"cannot read .*labels\.npy"):
        CIFAR10C("test", root=root, corruption="fog")
