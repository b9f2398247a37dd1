"""VisA: the published tables, defect numbers as mask values."""

import numpy as np
import pytest

from data.datasets.visa import VisA
from runtime.errors import UserError
from tests.data.datasets.layouts import write, write_visa


@pytest.fixture
def root(tmp_path):
    write_visa(tmp_path)
    return tmp_path


def test_the_table_says_who_belongs_where(root, capsys):
    train, test = (VisA(split, 8, root=str(root), category="candle") for split in ("train", "test"))
    assert [path[-8:] for path in train.paths] == ["0001.JPG", "0000.JPG"] and train.defects == ["good"] * 2
    assert test.defects == ["good", "anomaly", "anomaly"] and test.labels.tolist() == [0, 1, 1]
    masks = [test.mask(i, original=True) for i in range(3)]
    assert [mask.nonzero().tolist() for mask in masks] == [[], [[0, 0], [0, 1], [4, 4]], [[5, 5]]]
    assert capsys.readouterr().err == ""  # several values are defect numbers, no rim of JPEG
    assert test.has_masks and not train.has_masks and len(VisA("train", 8, root=str(root), category="pcb1")) == 1
    with pytest.raises(UserError, match="holds no image of the split 'test'"):
        VisA("test", 8, root=str(root), category="pcb1")


def test_anomalies_to_train_on_are_left_out(root):
    train = VisA("train", 8, root=str(root), category="candle", table="2cls_fewshot")
    assert len(train) == 2 and train.left_out == {"anomalous": 1}
    assert VisA("test", 8, root=str(root), category="candle", table="2cls_fewshot").defects == ["good", "anomaly"]


def test_half_present(root):
    with pytest.raises(
        UserError, match=r"no .*split_csv/2cls_highshot\.csv: expected .* of VisA, found candle, pcb1, sp"
    ):
        VisA("train", 8, root=str(root), category="candle", table="2cls_highshot")
    with pytest.raises(UserError, match=r"no .*nowhere/split_csv/1cls\.csv: .*found nothing"):
        VisA("train", 8, root=str(root / "nowhere"), category="candle")
    with pytest.raises(UserError, match=r"data\.category=nut is not in 1cls\.csv of .*; objects: candle, pcb1"):
        VisA("train", 8, root=str(root), category="nut")
    (root / "candle/Data/Masks/Anomaly/001.png").unlink()
    with pytest.raises(
        UserError, match=r"1 of 5 files of candle test in 1cls\.csv are not in .*Masks/Anomaly/001\.png: unp"
    ):
        VisA("test", 8, root=str(root), category="candle")
    table = root / "split_csv/1cls.csv"
    table.write_text(table.read_text().replace("candle/Data/Masks/Anomaly/001.png", ""))
    with pytest.raises(
        UserError, match=r"says of .*Anomaly/001\.JPG label='anomaly' mask='': expected normal and no mask"
    ):
        VisA("test", 8, root=str(root), category="candle")
    table.write_text("object,label\n")
    with pytest.raises(
        UserError, match=r"has the columns \['object', 'label'\]: expected object,split,label,image,mask"
    ):
        VisA("test", 8, root=str(root), category="candle")


def test_a_mask_of_another_size(root):
    write(root / "candle/Data/Masks/Anomaly/001.png", np.ones((8, 6), np.uint8))
    with pytest.raises(UserError, match=r"001\.png is 8 x 6 .*001\.JPG is 6 x 8"):
        VisA("test", 8, root=str(root), category="candle")
