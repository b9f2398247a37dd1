"""MVTec LOCO AD, MVTec AD 2, BTAD and MPDD on small trees in their layouts."""

import pytest
import torch

from data import DataConfig, build_dataset
from data.datasets.mvtec import BTAD, MVTec
from data.datasets.mvtec_ad2 import MVTecAD2
from data.datasets.mvtec_loco import MVTecLOCO
from runtime.errors import UserError
from tests.data.datasets.layouts import found, marked, write, write_ad2, write_loco


@pytest.fixture
def loco(tmp_path):
    write_loco(tmp_path / "box")
    return tmp_path


def test_loco_splits_and_masks(loco):
    counts = [len(MVTecLOCO(split, 8, root=str(loco), category="box")) for split in MVTecLOCO.splits]
    assert counts == [6, 4, 7]
    test = MVTecLOCO("test", 8, root=str(loco), category="box")
    assert test.defects == ["good"] * 3 + ["logical_anomalies"] * 2 + ["structural_anomalies"] * 2
    assert [len(files or ()) for files in test.mask_paths] == [0, 0, 0, 2, 1, 2, 1] and test.mask_known.all()
    union = torch.zeros(6, 8, dtype=torch.bool)
    union[:4, :4] = union[2:6, 2:6] = True
    assert torch.equal(test.mask(3, original=True), union)  # two PNGs, one mask
    assert test[3][1].shape == (8, 8) and test[4][1].any() and not test[0][1].any()
    test.keep([0, 5], "of a test")
    assert len(test.regions(1)) == 2 and test.regions(0) == []


def test_loco_regions_saturate_as_the_config_says(loco):
    test = MVTecLOCO("test", 8, root=str(loco), category="box")
    areas = [[(int(mask.sum()), area) for mask, area in test.regions(i)] for i in range(7)]
    # 16 pixels: half of them; all; absolute 30, but there are only 16
    assert areas == [[], [], [], [(16, 8), (16, 16)], [(16, 8)], [(16, 16), (16, 16)], [(16, 16)]]
    write(loco / "box/ground_truth/logical_anomalies/001/000.png", marked((0, 0), value=255))
    assert MVTecLOCO("test", 8, root=str(loco), category="box").regions(4)[0][1] == 1  # half a pixel is one


def test_loco_half_present(loco):
    top = loco / "box"
    (top / "ground_truth/logical_anomalies/001/000.png").unlink()
    with pytest.raises(
        UserError, match=r"1 defective images have no regions, the first .*logical_anomalies/001\.png: exp"
    ):
        MVTecLOCO("test", 8, root=str(loco), category="box")
    some = MVTecLOCO("test", 8, root=str(loco), category="box", masks="some")
    assert some.mask_known.tolist() == [True] * 4 + [False] + [True] * 2
    write(top / "ground_truth/logical_anomalies/001/000.png", marked((0, 0), value=9))
    with pytest.raises(UserError, match=r"001/000\.png has the values 9: expected one of .*: 253, 254, 255"):
        MVTecLOCO("test", 8, root=str(loco), category="box")
    write(top / "ground_truth/logical_anomalies/001/000.png", marked((0, 0), value=255) + marked((1, 1), value=254))
    with pytest.raises(UserError, match="has the values 254, 255"):
        MVTecLOCO("test", 8, root=str(loco), category="box")
    (top / "defects_config.json").write_text('[{"pixel_value": 1}]')
    with pytest.raises(
        UserError, match=r"cannot read .*defects_config\.json .*expected a list of objects with defect_name"
    ):
        MVTecLOCO("test", 8, root=str(loco), category="box")
    (top / "defects_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*defects_config\.json"):
        MVTecLOCO("test", 8, root=str(loco), category="box")
    with pytest.raises(UserError, match=r"categories there: box; expected .*validation/good"):
        MVTecLOCO("test", 8, root=str(loco), category="nut")


@pytest.fixture
def ad2(tmp_path):
    write_ad2(tmp_path / "can")
    return tmp_path


def test_ad2_splits(ad2):
    sets = {split: MVTecAD2(split, 8, root=str(ad2), category="can") for split in MVTecAD2.splits}
    assert {split: len(own) for split, own in sets.items()} == {
        "train": 6,
        "validation": 4,
        "test": 5,
        "test_private": 2,
        "test_private_mixed": 1,
    }
    test = sets["test"]  # ground_truth lies in test_public, but is no defect
    assert test.defects == ["bad", "bad", "good", "good", "good"] and test.mask_known.all()
    assert test.mask(1, original=True).sum() == 6 and found(test.mask_paths[1][0]) == "001_underexposed_mask.png"
    private = sets["test_private_mixed"]
    assert private.classes == ["unlabelled"] and private.defects is None and len(private[0]) == 3


def test_ad2_half_present(ad2):
    (ad2 / "can/test_public/ground_truth/bad/000_regular_mask.png").unlink()
    with pytest.raises(
        UserError, match=r"bad/000_regular\.png has no mask .*test_public/ground_truth/bad/000_regular_mask"
    ):
        MVTecAD2("test", 8, root=str(ad2), category="can")
    (ad2 / "can/test_public").rename(ad2 / "can/test")
    with pytest.raises(UserError, match=r"no images in .*can/test_public: expected .*test_public/<good or bad>"):
        MVTecAD2("test", 8, root=str(ad2), category="can")
    for path in (ad2 / "can/test_private").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no images in .*can/test_private: expected 000_regular\.png"):
        MVTecAD2("test_private", 8, root=str(ad2), category="can")


def test_btad(tmp_path):
    top = tmp_path / "02"
    for i in range(3):
        write(top / f"train/ok/{i:04}.bmp", 3)
    for name in ("test/ok/0000.bmp", "test/ko/lamb.bmp", "test/ko/0002.png"):
        write(top / name)
    write(top / "ground_truth/ko/lamb.png", marked((1, 2)))  # not "la.png"
    write(top / "ground_truth/ko/0002.bmp", marked((3, 4)))
    train, test = (BTAD(split, 8, root=str(tmp_path), category="02") for split in ("train", "test"))
    assert train.defects == ["good"] * 3 and train.labels.tolist() == [0] * 3
    assert test.defects == ["ko", "ko", "good"] and test.labels.tolist() == [1, 1, 0]
    assert [test.mask(i, original=True).nonzero().tolist() for i in range(3)] == [[[3, 4]], [[1, 2]], []]
    (top / "test/ok").rename(top / "test/normal")
    with pytest.raises(UserError, match=r"02/test has no folder ok, but .*02/test/normal: rename it to ok"):
        BTAD("test", 8, root=str(tmp_path), category="02")
    with pytest.raises(UserError, match=r"data\.category=04 is not in .*; categories there: 02; expected .*train/ok"):
        BTAD("test", 8, root=str(tmp_path), category="04")
    with pytest.raises(UserError, match=r"train/good: .*, but .*02/train/ok: rename it to good"):
        MVTec("train", 8, root=str(tmp_path), category="02")


def test_mpdd_is_in_the_layout_of_mvtec(tmp_path):
    top = tmp_path / "metal_plate"
    for name in ("train/good/0.png", "test/good/0.png", "test/scratches/0.png", "test/major_rust/0.png"):
        write(top / name)
    write(top / "ground_truth/scratches/0_mask.png", marked((0, 0)))
    write(top / "ground_truth/major_rust/0.png", marked((0, 0)))
    test = MVTec("test", 8, root=str(tmp_path), category="metal_plate")
    assert test.defects == ["good", "major_rust", "scratches"] and test.mask_known.all()


def test_what_was_matched_is_said_in_one_line(loco, capsys):
    data = DataConfig(name="mvtec_loco", size=(8,), options={"root": str(loco), "category": "box"})
    for _ in range(2):
        build_dataset(data, "test")
    build_dataset(data, "validation")
    assert capsys.readouterr().err.splitlines() == [
        f"data: test of {loco}: 7 images (3 good, 2 logical_anomalies, 2 structural_anomalies), 4 masks",
        f"data: validation of {loco}: 4 images (4 good)",
    ]
