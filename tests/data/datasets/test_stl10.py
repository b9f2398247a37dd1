"""STL-10: columns before rows, folds, and images without labels."""

import numpy as np
import pytest
import torch

from data.datasets.stl10 import STL10
from runtime.errors import UserError

NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


@pytest.fixture
def root(tmp_path):
    """Pixel (channel, row, column) of image i is a known function, stored column by column."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, first, count in (("train", 0, 6), ("test", 50, 3), ("unlabeled", 100, 4)):
        stored = np.empty((count, 3, 96, 96), np.uint8)
        for i in range(count):
            c, row, column = np.meshgrid(range(3), range(96), range(96), indexing="ij")
            image = (first + i + 80 * c + 2 * (row < 5) + column // 90).astype(np.uint8)
            stored[i] = image.transpose(0, 2, 1)
        stored.tofile(folder / f"{name}_X.bin")
    np.array([10, 1, 2, 3, 1, 2], np.uint8).tofile(folder / "train_y.bin")
    np.array([2, 10, 1], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "fold_indices.txt").write_text("0 3 5 \n4 1 \n")
    return tmp_path


def test_orientation_and_labels(root):
    train, test = STL10("train", root=str(root)), STL10("test", root=str(root))
    assert train.labels.tolist() == [9, 0, 1, 2, 0, 1] and test.labels.tolist() == [1, 9, 0] and test.classes == NAMES
    image, label, index = train[3]
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 96) and (label, index) == (2, 3)
    expected = torch.full((3, 96, 96), 3) + torch.tensor([0, 80, 160])[:, None, None]
    expected[:, :5] += 2  # the top rows
    expected[:, :, 90:] += 1  # the right columns
    assert torch.equal(image, expected.to(torch.uint8))
    assert train.sizes.tolist() == [[96, 96]] * 6 and STL10("test", 12, root=str(root))[0][0].shape == (3, 12, 12)
    assert train.names[4] == "stl10_binary/train_X.bin#4"


def test_parts_without_labels(root):
    alone, both = (STL10("train", root=str(root), part=part) for part in ("unlabelled", "all"))
    assert len(alone) == 4 and len(both) == 10 and alone.classes == both.classes == ["unlabelled"]
    assert both.labels.tolist() == [0] * 10  # no label of -1 that a kNN could take for a class
    assert [int(both[i][0][0, 50, 50]) for i in range(10)] == [*range(6), *range(100, 104)]
    assert len(set(both.names)) == 10
    for split, more in (("test", {}), ("train", {"fold": 1})):
        with pytest.raises(
            UserError, match=r"data\.part=all has no labels to test with, nor folds: set data\.part=label"
        ):
            STL10(split, root=str(root), part="all", **more)


def test_folds(root):
    fold = STL10("train", root=str(root), fold=0)
    assert fold.labels.tolist() == [9, 2, 1] and fold.left_out == {"not in data.fold=0": 3}
    assert [int(fold[i][0][0, 50, 50]) for i in range(3)] == [0, 3, 5]
    assert STL10("train", root=str(root), fold=1).labels.tolist() == [0, 0]
    assert len(STL10("test", root=str(root), fold=0)) == 3
    with pytest.raises(UserError, match=r"data\.fold=2 must be 0 to 1"):
        STL10("train", root=str(root), fold=2)


def test_half_present(root):
    folder = root / "stl10_binary"
    with open(folder / "train_X.bin", "r+b") as file:
        file.truncate(5 * 27648)
    with pytest.raises(UserError, match="train has 6 labels of 10 classes for 5 images: unpack"):
        STL10("train", root=str(root))
    with open(folder / "train_X.bin", "r+b") as file:
        file.truncate(27648 + 1)
    with pytest.raises(UserError, match=r"train_X\.bin has 27649 bytes, no multiple of 27648"):
        STL10("train", root=str(root))
    (folder / "train_X.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train_X\.bin has 0 bytes"):
        STL10("train", root=str(root))
    (folder / "unlabeled_X.bin").unlink()
    with pytest.raises(
        UserError, match=r"there is no .*unlabeled_X\.bin: expected train_X\.bin, .*found class_names\.txt, "
    ):
        STL10("train", root=str(root), part="unlabelled")
    with pytest.raises(UserError, match="found nothing"):
        STL10("test", root=str(root / "nowhere"))
