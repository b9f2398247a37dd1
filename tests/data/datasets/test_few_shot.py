"""Support sets that never change, the other categories to learn from, and what a user may have got wrong."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import DataConfig, build_dataset
from data.datasets.few_shot import FewShot
from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from runtime import config
from runtime.errors import UserError
from tests.images import write_classes, write_mvtec


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """bolt with 12 training images, nut with 3 and disc with 2."""
    root = tmp_path_factory.mktemp("mvtec")
    for category, normal in (("nut", 3), ("bolt", 12), ("disc", 2)):
        write_mvtec(root, category=category, normal=normal, size=32)
    return str(root)


def numbers(dataset) -> list[int]:
    return [int(Path(path).stem) for path in dataset.paths]


def test_support_sets_never_change(root):
    """RandomState(draw).permutation(12)[:4], sorted, for ever."""
    drawn = [numbers(FewShot("train", 8, root=root, category="bolt", shots=4, draw=draw)) for draw in range(3)]
    assert drawn == [[4, 6, 10, 11], [2, 3, 4, 10], [4, 5, 7, 9]]
    sets = [set(numbers(FewShot("train", 8, root=root, category="bolt", shots=shots))) for shots in (1, 2, 4, 8, 12)]
    assert [len(each) for each in sets] == [1, 2, 4, 8, 12]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_support_and_test_images_are_mvtecs(root):
    support = FewShot("train", Geometry(8, 12, "pad"), root=root, category="bolt", shots=2)
    image, label, index = support[1]
    assert image.shape == (3, 8, 12) and (label, index) == (0, 1)
    assert support.labels.tolist() == [0, 0] and support.defects == ["good"] * 2 and not support.has_masks
    assert support.sizes.tolist() == [[32, 32]] * 2 and support.few
    test, whole = FewShot("test", 8, root=root, category="bolt", shots=2), MVTec("test", 8, root=root, category="bolt")
    assert test.paths == whole.paths and torch.equal(test.labels, whole.labels) and test.has_masks
    for item, expected in zip(test[5], whole[5]):
        assert item == expected if isinstance(item, int) else torch.equal(item, expected)


def test_one_category_is_left_out(root):
    others = FewShot("others", 8, root=root, category="nut", shots=2)
    assert others.classes == ["bolt", "disc"] and others.labels.tolist() == [0] * 12 + [1] * 2
    assert [Path(path).parts[-4] for path in others.paths] == ["bolt"] * 12 + ["disc"] * 2
    assert len(others) == 14 and others.sizes.shape == (14, 2) and others.geometry.height == 8
    image, label, index = others[13]
    assert image.shape == (3, 8, 8) and (label, index) == (1, 13)
    again = FewShot("others", 8, root=root, category="bolt", shots=2, others=f"{root}/../{Path(root).name}")
    assert again.classes == ["disc", "nut"]  # another name of the same folder gives nothing away


def test_others_may_lie_elsewhere(root, tmp_path):
    write_mvtec(tmp_path / "a", category="bolt", normal=2, size=32)
    elsewhere = FewShot("others", 8, root=root, category="bolt", shots=2, others=str(tmp_path / "a"))
    assert elsewhere.classes == ["bolt"] and len(elsewhere) == 2  # a category of another root, whatever its name
    write_classes(tmp_path / "b", classes=2, each=3, size=32)
    divided = FewShot("others", 8, root=root, category="bolt", shots=2, others=str(tmp_path / "b"))
    assert divided.classes == ["class0", "class1"] and divided.labels.tolist() == [0] * 3 + [1] * 3
    assert all("/train/" in path for path in divided.paths)
    flat = FewShot("others", 8, root=root, category="bolt", shots=2, others=str(tmp_path / "b" / "train"))
    assert flat.paths == divided.paths and flat[5][1] == 1  # class folders without a split: all of them


def test_broken_images_are_named_or_left_out(tmp_path):
    write_mvtec(tmp_path, category="part", normal=4, size=32)
    write_mvtec(tmp_path, category="other", normal=4, size=32)
    for category in ("part", "other"):
        (tmp_path / category / "train/good/001.png").write_bytes(b"none")
    where = {"root": str(tmp_path), "category": "part", "shots": 3}
    assert numbers(FewShot("train", 8, **where, on_error="skip")) == [0, 2, 3]
    assert numbers(FewShot("others", 8, **where, on_error="skip")) == [0, 2, 3]
    with pytest.raises(UserError, match=r"other/train/good/001\.png"):
        FewShot("others", 8, **where)[1]


def test_mistakes_are_one_line(root, tmp_path):
    def error(split="train", **options):
        with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
            FewShot(split, 8, **{"root": root, "category": "nut", "shots": 2} | options)
        return str(caught.value)

    assert f"data.shots=4, but {root}/nut/train/good has 3 images" in error(shots=4)
    assert "categories there: bolt, disc, nut" in error(category="screw")
    write_mvtec(tmp_path, category="part", normal=2, size=32)
    alone = {"root": str(tmp_path), "category": "part"}
    assert "has no category but part to learn from: set data.others to" in error("others", **alone)
    assert "nowhere is not a folder" in error("others", others=str(tmp_path / "nowhere"))
    write_mvtec(tmp_path, category="single", normal=1, size=32)
    assert "category single of" in (line := error("others", **alone)) and "(name it .single)" in line
    (tmp_path / "single").rename(tmp_path / ".single")
    (tmp_path / "classes" / "lonely").mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / "classes" / "lonely" / "0.png")
    assert "category lonely" in error("others", **alone, others=str(tmp_path / "classes"))
    (tmp_path / "part/train/good").rename(tmp_path / "elsewhere")
    assert "there are no images in" in error(**alone)


def test_other_data_sets_have_no_others(root):
    section = {"name": "mvtec", "root": root, "category": "nut", "size": 8}
    with pytest.raises(UserError, match=r"^data\.name=mvtec has no split 'others', .*: use few_shot$"):
        build_dataset(config.build(DataConfig, section), "others")
    few = config.build(DataConfig, section | {"name": "few_shot", "shots": 2})
    assert [len(build_dataset(few, split)) for split in ("train", "test", "others")] == [2, 8, 14]
