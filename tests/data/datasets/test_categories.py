"""Several categories as one set, against each of them opened by itself."""

import pytest
import torch

from data import DataConfig, build_dataset
from data.datasets.categories import Categories, open_set
from data.datasets.condition import Condition
from data.datasets.few_shot import FewShot
from data.datasets.mixed import Mixed
from data.datasets.mvtec import BTAD, MVTec
from data.datasets.mvtec_ad2 import MVTecAD2
from data.datasets.mvtec_loco import MVTecLOCO
from data.datasets.visa import VisA
from data.splits import holdout
from data.tiles import Tiles
from runtime.errors import UserError
from tests.data.datasets.layouts import marked, write, write_ad2, write_loco, write_visa


def write_parts(root, *names, good="good", folders=("train/{}", "test/{}", "test/hole")):
    """Of each name 3 good images to learn from, 2 to test on, and 1 defective one with a mask; gray values tell."""
    for number, name in enumerate(names):
        counts = (3, 2, 1)
        for kind, (folder, count) in enumerate(zip(folders, counts)):
            for i in range(count):
                write(root / name / folder.format(good) / f"{i:03}.png", 60 * number + 20 * kind + i)
        write(root / name / "ground_truth/hole/000_mask.png", marked((number, 1)))
    return root


def settings(kind, root, category, **more):
    options = {"root": str(root), "category": category, **more}
    return options | ({"table": "1cls"} if kind is VisA else {})


def layout_of(kind, root):
    """The layout of a set with two categories, and their names."""
    if kind is VisA:
        write_visa(root)
        rows = (root / "split_csv/1cls.csv").read_text()
        write(root / "pcb1/Data/Images/Normal/0002.JPG")
        (root / "split_csv/1cls.csv").write_text(f"{rows}pcb1,test,normal,pcb1/Data/Images/Normal/0002.JPG,\n")
        return ["candle", "pcb1"]
    for name in ("can", "vial"):
        if kind is MVTecLOCO:
            write_loco(root / name)
        elif kind is MVTecAD2:
            write_ad2(root / name)
    if kind in (MVTec, Condition, FewShot):
        write_parts(root, "can", "vial")
    if kind is BTAD:
        write_parts(root, "can", "vial", good="ok", folders=("train/{}", "test/{}", "test/ko"))
        for name in ("can", "vial"):
            (root / name / "ground_truth/hole").rename(root / name / "ground_truth/ko")
    return ["can", "vial"]


@pytest.mark.parametrize("kind", [MVTec, Condition, BTAD, VisA, MVTecLOCO, MVTecAD2, FewShot])
def test_equals_its_categories_one_after_the_other(kind, tmp_path):
    names = layout_of(kind, tmp_path)
    more = {"shots": 2} if kind is FewShot else {}
    (tmp_path / "notes").mkdir()  # no category
    for split in kind.splits:
        if split == "others":
            continue
        parts = [kind(split, 8, **settings(kind, tmp_path, name, **more)) for name in names]
        for given in ("all", ", ".join(names)):
            every = open_set(kind, split, 8, settings(kind, tmp_path, given, **more))
            assert isinstance(every, Categories)
            assert every.paths == [path for part in parts for path in part.paths]
            assert every.names == [name for part in parts for name in part.names]
            assert torch.equal(every.labels, torch.cat([part.labels for part in parts]))
            assert torch.equal(every.sizes, torch.cat([part.sizes for part in parts]))
            assert every.groups["category"] == [n for n, part in zip(names, parts) for _ in part.paths]
            assert (every.splits, every.few, every.saturates) == (kind.splits, kind.few, kind.saturates)
            if parts[0].defects is not None:
                assert every.defects == [
                    "good" if defect == "good" else f"{n}/{defect}"
                    for n, part in zip(names, parts)
                    for defect in part.defects
                ]
            rows = [(part, i) for part in parts for i in range(len(part))]
            for k, (part, i) in enumerate(rows):
                assert all(
                    torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(every[k][:-1], part[i][:-1])
                )
                assert every[k][-1] == k
                if kind.saturates and split == "test":
                    assert [area for _, area in every.regions(k)] == [area for _, area in part.regions(i)]
            if kind is MVTecAD2 and split == "test":
                assert every.groups["lighting"] == [light for part in parts for light in part.groups["lighting"]]


def test_lightings_of_ad2(tmp_path):
    write_ad2(tmp_path / "can")
    test = MVTecAD2("test", 8, root=str(tmp_path), category="can")
    lightings = {name.rpartition("/")[2]: light for name, light in zip(test.names, test.groups["lighting"])}
    assert lightings == {
        "000_regular.png": "regular",
        "001_underexposed.png": "underexposed",
        "000_overexposed.png": "overexposed",
        "001_shift_1.png": "shift_1",
    }
    assert MVTecAD2("train", 8, root=str(tmp_path), category="can").groups == {}


def test_a_part_of_it(tmp_path):
    write_parts(tmp_path, "can", "vial", "nut")
    every = open_set(MVTec, "test", 8, settings(MVTec, tmp_path, "all"))
    assert every.sizes.shape == (9, 2)
    part = every.only([7, 2])
    assert part.names == ["vial/test/good/001.png", "can/test/hole/000.png"]
    assert part.groups == {"category": [every.groups["category"][i] for i in (7, 2)]}
    assert torch.equal(part.image(0), every.image(7)) and torch.equal(part.mask(1), every.mask(2))
    assert part.sizes.shape == (2, 2) and len(every) == 9 and every.left_out == {}


def test_what_is_said_and_held_out(tmp_path):
    write_parts(tmp_path, "can", "vial")
    every = {split: open_set(MVTec, split, 8, settings(MVTec, tmp_path, "all")) for split in ("train", "test")}
    assert every["train"].matched == f"train of {tmp_path}: 6 images of 2 categories (can 3 good, vial 3 good)"
    counts = "can 2 good + 1 defective, vial 2 good + 1 defective"
    assert every["test"].matched == f"test of {tmp_path}: 6 images of 2 categories ({counts}), 2 masks"
    _, held_out = holdout(every["train"], 0.1, seed=0)
    _, of_one = holdout(open_set(MVTec, "train", 8, settings(MVTec, tmp_path, "can")), 0.1, seed=0)
    assert held_out.tolist() == [int(of_one), 3 + int(of_one)]  # one of each, as by themselves


def test_masks_of_some_categories(tmp_path):
    write_parts(tmp_path, "can", "vial")
    (tmp_path / "vial/ground_truth/hole/000_mask.png").unlink()
    for path in (tmp_path / "vial/ground_truth/hole", tmp_path / "vial/ground_truth"):
        path.rmdir()
    every = open_set(MVTec, "test", 8, settings(MVTec, tmp_path, "all"))
    unknown = [name for name, known in zip(every.names, every.mask_known.tolist()) if not known]
    assert every.has_masks and unknown == ["vial/test/hole/000.png"]


def test_drawn_splits_are_those_of_each_category(tmp_path):
    for name in ("lock", "ring"):
        for i in range(10):
            write(tmp_path / name / f"good/{i}.png", i)
        write(tmp_path / name / "worn/0.png")
    every = open_set(Condition, "train", 8, settings(Condition, tmp_path, "all"))
    ring = Condition("train", 8, root=str(tmp_path), category="ring")
    assert [*every.divisions] == ["splits_lock.csv", "splits_ring.csv"] and len(every) == 16
    assert every.divisions["splits_ring.csv"].splits == ring.division.splits


def test_names_that_cannot_be(tmp_path):
    write_parts(tmp_path, "can", "vial", "a,b")
    for given in ("can,can", "can,", ",can", "can,,vial", "can,a,b,can"):
        with pytest.raises(UserError, match="has a name that is empty or there twice"):
            open_set(MVTec, "train", 8, settings(MVTec, tmp_path, given))
    with pytest.raises(UserError, match=r"data\.category=nut is not in .*; categories there: a,b, can, vial; expected"):
        open_set(MVTec, "train", 8, settings(MVTec, tmp_path, "can,nut"))
    assert type(open_set(MVTec, "train", 8, settings(MVTec, tmp_path, "a,b"))) is MVTec  # a folder of that name
    assert type(open_set(MVTec, "train", 8, settings(MVTec, tmp_path, "can"))) is MVTec
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"data\.category=all is not in .*; categories there: none; expected"):
        open_set(MVTec, "train", 8, settings(MVTec, tmp_path / "none", "all"))
    with pytest.raises(UserError, match=r"is not a folder: expected"):
        open_set(MVTec, "train", 8, settings(MVTec, tmp_path / "nowhere", "all"))
    with pytest.raises(UserError, match="learns from all other categories, so name one"):
        open_set(FewShot, "others", 8, settings(FewShot, tmp_path, "can,vial", shots=1))
    write_parts(tmp_path / "parts", "ring-surface")
    with pytest.raises(UserError, match=r"is in data\.category twice"):
        open_set(Condition, "train", 8, settings(Condition, tmp_path / "parts", "ring-surface,ring_surface"))
    write_parts(tmp_path / "more", "all", "can")
    assert len(open_set(MVTec, "train", 8, settings(MVTec, tmp_path / "more", "all"))) == 3  # the folder `all`


def test_tiles_and_a_mixed_set_of_it(tmp_path, capsys):
    write_parts(tmp_path, "can", "vial")
    config = DataConfig(name="mvtec", size=(8,), options=settings(MVTec, tmp_path, "all", masks="all", on_error="fail"))
    every = build_dataset(config, "train")
    assert capsys.readouterr().err.startswith(f"data: train of {tmp_path}: 6 images of 2 categories")
    tiles = Tiles(every, [0, 5], 4, 0)
    assert tiles.names[-1] == "vial/train/good/002.png#2,4"
    mixed = Mixed("train", 8, sets={"both": {"name": "mvtec", "root": str(tmp_path), "category": "all"}})
    assert len(mixed) == 6 and mixed.names[5] == "both/vial/train/good/002.png"
