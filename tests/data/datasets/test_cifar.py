"""CIFAR-10 in both layouts."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from data.datasets.cifar import CIFAR10
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
    for wrong in (0, 4):
        with pytest.raises(UserError, match=rf"data\.per_class={wrong} must be 1 to 3"):
            CIFAR10("train", root=str(tmp_path / "jpeg"), per_class=wrong)
    root, pixels, labels = published  # 20 rows in an order of their own
    if min(labels[:20].count(label) for label in range(10)) >= 1:
        one = CIFAR10("train", root=str(root), per_class=1)
        first = sorted(labels[:20].index(label) for label in range(10))
        assert one.labels.tolist() == [labels[i] for i in first]
        assert torch.equal(one[3][0], torch.from_numpy(pixels[first[3]]))
