"""Magnetic tiles as published; of the real ones a copy is put back into that layout."""

import os

import pytest
import torch

from data.datasets.magnetic_tile import MagneticTile, tile
from data.datasets.mvtec import MVTec
from runtime.errors import UserError
from tests.data.datasets.layouts import marked, write


@pytest.fixture
def root(tmp_path):
    for number in range(8):
        for light in (1, 2):
            write(tmp_path / f"MT_Free/Imgs/exp{light}_num_{number}.jpg")
            write(tmp_path / f"MT_Free/Imgs/exp{light}_num_{number}.png")
    for name, number in (("Blowhole", 7), ("Blowhole", 20), ("Uneven", 30)):
        write(tmp_path / f"MT_{name}/Imgs/exp3_num_{number}.jpg")
        write(tmp_path / f"MT_{name}/Imgs/exp3_num_{number}.png", marked((2, number % 7)))
    return tmp_path


def test_a_tile_is_on_one_side(root, capsys):
    train, test = (MagneticTile(split, 8, root=str(root)) for split in ("train", "test"))
    assert train.defects == ["good"] * 10 and len(train) + len(test) == 19
    assert not {tile(path) for path in train.paths} & {tile(path) for path in test.paths}
    assert test.defects.count("good") == 6  # two of seven tiles under two lights, and tile 7, of which one has a hole
    assert sorted(test.defects)[:2] == ["blowhole"] * 2 and test.defects[-1] == "uneven"
    assert test.mask_known.all() and test.mask(len(test) - 1, original=True).nonzero().tolist() == [[2, 2]]
    assert train.left_out == {"kept for testing (data.test_fraction=0.25)": 9} and capsys.readouterr().err == ""
    assert MagneticTile("test", 8, root=str(root), test_fraction=0.0).defects.count("good") == 2


def test_half_present(root):
    (root / "MT_Uneven/Imgs/exp3_num_30.png").unlink()
    with pytest.raises(
        UserError, match=r"exp3_num_30\.jpg has no mask .*exp3_num_30\.png: expected <root>/MT_Free/Imgs"
    ):
        MagneticTile("test", 8, root=str(root))
    (root / "MT_Free").rename(root / "free")
    with pytest.raises(UserError, match=r"expected <root>/MT_Free/Imgs/.*, found MT_Blowhole, MT_Uneven, free"):
        MagneticTile("train", 8, root=str(root))
    with pytest.raises(UserError, match="found nothing"):
        MagneticTile("train", 8, root=str(root / "nowhere"))


def test_real_tiles(real_data, tmp_path):
    """The real files, linked as they are published: the masks are those of the other layout, and no tile is lost."""
    for defect, splits in (
        ("free", ("train/good", "test/good")),
        ("blowhole", ["test/blowhole"]),
        ("break", ["test/break"]),
    ):
        folder = tmp_path / f"MT_{defect.capitalize()}" / "Imgs"
        folder.mkdir(parents=True)
        for split in splits:
            for path in (real_data / "magnetic_tile" / split).iterdir():
                os.symlink(path, folder / path.name)
                mask = real_data / "magnetic_tile/ground_truth" / defect / f"{path.stem}_mask.png"
                if mask.exists():
                    os.symlink(mask, folder / f"{path.stem}.png")
    train, test = (MagneticTile(split, 64, root=str(tmp_path)) for split in ("train", "test"))
    counts = {defect: test.defects.count(defect) for defect in set(test.defects)}
    assert len(train) == 300 and counts == {"good": 100, "blowhole": 115, "break": 85}
    theirs = MVTec("test", 64, root=str(real_data), category="magnetic_tile")
    masks = {os.path.basename(path): theirs.mask(i) for i, path in enumerate(theirs.paths)}
    for i, path in enumerate(test.paths):
        if test.labels[i]:
            assert torch.equal(test.mask(i), masks[os.path.basename(path)])
