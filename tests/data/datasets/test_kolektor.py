"""KolektorSDD and KolektorSDD2: labels are in the masks."""

import pytest

from data.datasets.kolektor import KolektorSDD, KolektorSDD2
from runtime.errors import UserError
from tests.data.datasets.layouts import found, marked, write


@pytest.fixture
def sdd(tmp_path):
    for item in range(1, 6):
        for part in range(3):
            write(tmp_path / f"kos{item:02}/Part{part}.jpg", item)
            write(tmp_path / f"kos{item:02}/Part{part}_label.bmp", marked((part, item)) if part == 1 else 0)
    return tmp_path


def test_sdd(sdd, capsys):
    train, test = (KolektorSDD(split, 8, root=str(sdd)) for split in ("train", "test"))
    assert train.defects == ["good"] * 8 and test.defects.count("good") == 2 and test.defects.count("defect") == 5
    assert not set(train.paths) & set(test.paths) and len({*train.paths, *test.paths}) == 15
    assert all("Part1" in path for path, defect in zip(test.paths, test.defects) if defect != "good")
    first = test.defects.index("defect")
    assert test.mask(first, original=True).nonzero().tolist() == [[1, 1]] and test.mask_known.all()
    assert train.left_out == {"kept for testing (data.test_fraction=0.2)": 7}
    assert test.left_out == {"kept for training (data.test_fraction=0.2)": 8}
    assert train.paths == KolektorSDD("train", 8, root=str(sdd)).paths and capsys.readouterr().err == ""
    assert len(KolektorSDD("train", 8, root=str(sdd), test_fraction=0.0)) == 10


def test_sdd_half_present(sdd):
    (sdd / "kos02/Part0_label.bmp").unlink()
    with pytest.raises(
        UserError, match=r"1 files have no partner, the first: .*kos02/Part0\.jpg has no mask; expected <ro"
    ):
        KolektorSDD("train", 8, root=str(sdd))
    (sdd / "kos02/Part0.jpg").unlink()
    (sdd / "kos02/Part1.jpg").unlink()
    with pytest.raises(UserError, match=r"kos02/Part1_label\.bmp has no image"):
        KolektorSDD("train", 8, root=str(sdd))
    with pytest.raises(UserError, match=r"expected <root>/kos<number>/Part.*found Part0\.jpg, Part0_label"):
        KolektorSDD("train", 8, root=str(sdd / "kos01"))
    with pytest.raises(UserError, match="found nothing"):
        KolektorSDD("train", 8, root=str(sdd / "nowhere"))


@pytest.fixture
def sdd2(tmp_path):
    for split, names in (("train", range(10000, 10006)), ("test", range(20000, 20004))):
        for name in names:
            write(tmp_path / f"{split}/{name}.png", 9)
            write(tmp_path / f"{split}/{name}_GT.png", marked((1, 1), (2, 3)) if name % 3 == 0 else 0)
    (tmp_path / "split_weakly_0.pyb").write_bytes(b"a pickle, which nobody opens")
    return tmp_path


def test_sdd2(sdd2, capsys):
    train, test = (KolektorSDD2(split, 8, root=str(sdd2)) for split in ("train", "test"))
    assert [found(path) for path in train.paths] == ["10000.png", "10001.png", "10003.png", "10004.png"]
    assert train.left_out == {"defective": 2} and train.labels.sum() == 0 and not train.has_masks
    assert test.defects == ["good", "defect", "good", "good"] and test.mask(1, original=True).sum() == 2
    assert capsys.readouterr().err == ""


def test_sdd2_half_present(sdd2):
    (sdd2 / "test").rename(sdd2 / "later")
    with pytest.raises(UserError, match=r"expected <root>/test/<number>\.png and <number>_GT\.png, found .*later"):
        KolektorSDD2("test", 8, root=str(sdd2))
    (sdd2 / "train/10002_GT.png").unlink()
    with pytest.raises(UserError, match=r"train/10002\.png has no mask"):
        KolektorSDD2("train", 8, root=str(sdd2))
