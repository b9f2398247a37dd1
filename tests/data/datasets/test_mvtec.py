"""The MVTec layout: masks by stem, their absence, and what a user may have got wrong."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from runtime.errors import UserError


def write(path, array=None, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(size, dtype=np.uint8) if array is None else array).save(path)


def mask_at(row, column, size=(6, 8)):
    mask = np.zeros(size, dtype=np.uint8)
    mask[row, column] = 255
    return mask


@pytest.fixture
def root(tmp_path):
    """Category bolt: 3 training images; test 2 good, 2 scratch, 1 dent, each mask marking another pixel."""
    for i in range(3):
        write(tmp_path / f"bolt/train/good/{i:03}.png", np.full((6, 8), i, dtype=np.uint8))
    for i in range(2):
        write(tmp_path / f"bolt/test/good/{i:03}.png")
        write(tmp_path / f"bolt/test/scratch/{i:03}.png")
    write(tmp_path / "bolt/test/dent/7.JPG")
    write(tmp_path / "bolt/ground_truth/scratch/000_mask.png", mask_at(0, 0))
    write(tmp_path / "bolt/ground_truth/scratch/001.png", mask_at(1, 1))  # the other accepted name
    write(tmp_path / "bolt/ground_truth/dent/7_mask.png", mask_at(2, 2))
    return tmp_path


def test_training_split(root):
    train = MVTec("train", 6, root=str(root), category="bolt")
    assert len(train) == 3 and train.labels.tolist() == [0, 0, 0] and train.defects == ["good"] * 3
    assert not train.has_masks and train.sizes.tolist() == [[6, 8]] * 3
    image, label, index = train[2]
    assert image.shape == (3, 6, 6) and image.unique().tolist() == [2] and (label, index) == (0, 2)


def test_test_split(root):
    test = MVTec("test", 8, root=str(root), category="bolt")
    assert test.defects == ["dent", "good", "good", "scratch", "scratch"]
    assert test.labels.tolist() == [1, 0, 0, 1, 1] and test.classes == ["normal", "anomalous"] and test.has_masks
    image, mask, label, index = test[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert mask.shape == (8, 8) and mask.dtype == torch.bool and (label, index) == (1, 0)
    assert [bool(test[i][1].any()) for i in range(5)] == [True, False, False, True, True]


def test_masks_belong_by_stem_not_by_position(root):
    # Sorted positions disagree with the stems: image 001's mask sorts before image 000's
    (root / "bolt/ground_truth/scratch/001.png").rename(root / "bolt/ground_truth/scratch/001_mask.png")
    write(root / "bolt/ground_truth/scratch/0000_mask.png", mask_at(5, 5))  # nobody's
    write(root / "bolt/ground_truth/dent/000_mask.png", mask_at(5, 5))  # another folder's
    test = MVTec("test", 8, root=str(root), category="bolt")
    for index, row in ((0, 2), (3, 0), (4, 1)):
        mask = test[index][1]
        assert mask[:, row].any() and mask.any(0).sum() == 1  # 8 columns stay as they are


def test_masks_alone_in_the_input_and_as_they_are_stored(root):
    test = MVTec("test", Geometry(16, 8, "pad"), root=str(root), category="bolt")  # 6 x 8: 5 rows of padding above
    for i, row in ((0, 2), (3, 0), (4, 1)):
        small, whole = test.mask(i), test.mask(i, original=True)
        assert torch.equal(small, test[i][1]) and small.nonzero().tolist() == [[5 + row, row]]
        assert whole.shape == (6, 8) and whole.dtype == torch.bool and whole.nonzero().tolist() == [[row, row]]
    assert test.mask(1).shape == (16, 8) and test.mask(1, original=True).shape == (6, 8)
    assert not test.mask(1).any() and not test.mask(1, original=True).any()


def test_images_in_deeper_folders(root):
    write(root / "bolt/test/dent/monday/000.png")
    write(root / "bolt/ground_truth/dent/monday/000_mask.png", mask_at(4, 4))
    test = MVTec("test", 8, root=str(root), category="bolt")
    assert test.defects[:2] == ["dent", "dent"] and test[1][1][:, 4].any()


def test_missing_mask(root):
    (root / "bolt/ground_truth/dent/7_mask.png").unlink()
    with pytest.raises(UserError, match=r"bolt/test/dent/7\.JPG has no mask .*ground_truth/dent/7_mask\.png: add it"):
        MVTec("test", 8, root=str(root), category="bolt")
    assert len(MVTec("train", 8, root=str(root), category="bolt")) == 3


def test_masks_of_some(root, capsys):
    (root / "bolt/ground_truth/dent/7_mask.png").rename(root / "bolt/ground_truth/dent/8_mask.png")
    test = MVTec("test", 8, root=str(root), category="bolt", masks="some")
    assert test.has_masks and test.mask_known.tolist() == [False, True, True, True, True]
    assert not test[0][1].any() and test.labels.tolist() == [1, 0, 0, 1, 1]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning: 1 (" in err and "of 3 defective images have no mask" in err
    assert "belong to no image: 1 (" in err and "8_mask.png" in err


@pytest.mark.parametrize(("stored", "mask"), [("ü", "ü"), ("é_2", "é_2"), ("x", "x")])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("suffix", ["_mask.PNG", ".BMP", "_mask.tiff", "_mask.webp"])
def test_masks_of_any_suffix_and_form(tmp_path, stored, mask, forms, suffix):
    for i in range(2):
        write(tmp_path / f"bolt/test/good/{i}.png")
    names = [unicodedata.normalize(form, name) for form, name in zip(forms, (stored, mask))]
    write(tmp_path / "bolt/test/dënt" / f"{names[0]}.JPG")
    folder = tmp_path / "bolt/ground_truth" / unicodedata.normalize("NFD", "dënt")
    folder.mkdir(parents=True)
    format = {"bmp": "BMP", "png": "PNG", "tiff": "TIFF", "webp": "WEBP"}[suffix.rpartition(".")[2].lower()]
    kind = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(mask_at(3, 5)).save(folder / f"{names[1]}{suffix}", format, **kind)
    test = MVTec("test", Geometry(6, 8), root=str(tmp_path), category="bolt")
    assert test.mask([*test.labels].index(1)).nonzero().tolist() == [[3, 5]]


def test_two_masks_for_one_image(root):
    write(root / "bolt/ground_truth/dent/7.bmp", mask_at(2, 2))
    with pytest.raises(UserError, match=r"dent/7\.JPG has 2 masks, .*/7_mask\.png and .*/7\.bmp: remove all but one"):
        MVTec("test", 8, root=str(root), category="bolt")


def test_masks_with_more_than_two_values_and_blank_ones(root, capsys):
    """The marked area by hand: what JPEG leaves around a square, and an index mask of two kinds of defect."""
    MVTec("test", 8, root=str(root), category="bolt")
    assert capsys.readouterr().err == ""  # 0 and 255; 0 and 1 of the next one too
    write(root / "bolt/ground_truth/scratch/001.png", mask_at(1, 1) // 255)
    MVTec("test", 8, root=str(root), category="bolt")
    assert capsys.readouterr().err == ""
    graded = np.zeros((6, 8), dtype=np.uint8)
    graded[0, :5] = [3, 40, 127, 128, 255]  # 5 not 0, 2 above 127.5
    write(root / "bolt/ground_truth/scratch/000_mask.png", graded)
    write(root / "bolt/ground_truth/dent/7_mask.png", np.zeros((6, 8, 3), dtype=np.uint8))
    test = MVTec("test", 8, root=str(root), category="bolt")
    assert int(test.mask(3, original=True).sum()) == 5  # every value but 0, as before
    blank, many = capsys.readouterr().err.splitlines()
    assert blank.startswith("warning: 1 (") and "7_mask.png) of 3 masks mark no pixel" in blank
    assert many.startswith("warning: 1 (") and "000_mask.png) of 3 masks have more than two values" in many
    assert " 2.50 times " in many and "save them as PNG" in many


@pytest.mark.parametrize("name", ["Good", "GOOD", "normal", "ok", "OK", "defect-free"])
def test_good_under_another_name(root, name):
    (root / "bolt/test/good").rename(root / "bolt/test" / name)
    with pytest.raises(UserError, match=rf"bolt/test has no folder good, but .*/test/{name}: rename it to good"):
        MVTec("test", 8, root=str(root), category="bolt")
    (root / "bolt/train/good").rename(root / "bolt/train" / name)
    with pytest.raises(UserError, match=rf"no images in .*/train/good: .*, but .*/train/{name}: rename it to good"):
        MVTec("train", 8, root=str(root), category="bolt")


def test_training_images_linked_into_the_test(root):
    os.symlink("../train/good", root / "bolt/test/more")
    with pytest.raises(UserError, match=r"test/more and .*train/good are the same folder"):
        MVTec("test", 8, root=str(root), category="bolt")
    (root / "bolt/test/more").unlink()
    os.symlink("../..", root / "bolt/test/scratch/up")  # the category itself: not followed
    assert len(MVTec("test", 8, root=str(root), category="bolt")) == 5


def test_no_ground_truth_folder(root):
    (root / "bolt/ground_truth").rename(root / "bolt/masks_elsewhere")
    test = MVTec("test", 8, root=str(root), category="bolt")
    assert not test.has_masks and test.labels.tolist() == [1, 0, 0, 1, 1]
    assert not any(item[1].any() for item in test) and test[0][1].shape == (8, 8)


def test_mask_of_another_size(root):
    write(root / "bolt/ground_truth/dent/7_mask.png", mask_at(2, 2, size=(8, 6)))
    with pytest.raises(UserError, match=r"7_mask\.png is 8 x 6 .* image .*7\.JPG is 6 x 8"):
        MVTec("test", 8, root=str(root), category="bolt")


def test_mask_size_is_that_of_the_upright_image(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 6), dtype=np.uint8)).save(root / "bolt/test/dent/7.JPG", exif=exif)
    test = MVTec("test", 8, root=str(root), category="bolt")
    assert test.sizes[0].tolist() == [6, 8]


@pytest.mark.parametrize("defect", ["good", "scratch"])
def test_one_class_is_allowed(root, defect):
    for other in {"good", "scratch", "dent"} - {defect}:
        (root / "bolt/test" / other).rename(root / other)
    test = MVTec("test", 8, root=str(root), category="bolt")
    assert test.defects == [defect] * 2 and test.labels.tolist() == [int(defect != "good")] * 2


def test_missing_folders(root):
    with pytest.raises(UserError, match=r"data\.root=.*nowhere is not a folder: expected <root>/<category>/train/good"):
        MVTec("train", 8, root=str(root / "nowhere"), category="bolt")
    with pytest.raises(UserError, match=r"data\.category=nut is not in .*; categories there: bolt"):
        MVTec("train", 8, root=str(root), category="nut")
    write(root / "bolt/test/stray.png")
    with pytest.raises(UserError, match=r"stray\.png lies in no folder"):
        MVTec("test", 8, root=str(root), category="bolt")
    (root / "bolt/test").rename(root / "test")
    with pytest.raises(UserError, match=r"no images in .*bolt/test: expected"):
        MVTec("test", 8, root=str(root), category="bolt")


def test_broken_images_fail_or_are_skipped(root, capsys):
    (root / "bolt/test/scratch/000.png").write_bytes(b"")  # an image with a mask
    (root / "bolt/test/good/001.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"scratch/000\.png: the file is empty"):
        MVTec("test", 8, root=str(root), category="bolt")  # a mask's size is compared at once
    test = MVTec("test", 8, root=str(root), category="bolt", on_error="skip")
    assert test.defects == ["dent", "good", "scratch"] and test.labels.tolist() == [1, 0, 1]
    assert test[2][1][:, 1].any() and len(test.sizes) == 3  # 001's own mask, still
    warning = capsys.readouterr().err
    assert "left out 2 of 5" in warning and "scratch/000.png" in warning and "good/001.png" in warning
    (root / "bolt/test/scratch/000.png").rename(root / "gone")
    failing = MVTec("test", 8, root=str(root), category="bolt")
    with pytest.raises(UserError, match=r"good/001\.png: it is not an image"):
        failing[2]


def test_magnetic_tiles(real_data):
    train = MVTec("train", 256, root=str(real_data), category="magnetic_tile")
    test = MVTec("test", 256, root=str(real_data), category="magnetic_tile")
    assert len(train) == 300 and train.sizes.shape == (300, 2) and len(train.sizes.unique(dim=0)) > 10
    counts = {defect: test.defects.count(defect) for defect in set(test.defects)}
    assert counts == {"good": 100, "blowhole": 115, "break": 85} and int(test.labels.sum()) == 200
    areas = torch.tensor([int(test[i][1].sum()) for i in range(len(test))])
    assert (areas[test.labels == 1] > 0).all() and (areas[test.labels == 0] == 0).all()
    height, width = test.sizes[0].tolist()
    with Image.open(test.paths[0]) as stored:
        assert (height, width) == (stored.height, stored.width)
