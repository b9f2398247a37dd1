"""The ScavPort sets: both layouts, splits with the same classes, and what is wrong with a half of one."""

import shutil

import pytest
from PIL import Image

from data import DATASETS
from data.datasets.condition import Condition
from data.datasets.scavport import ScavPortAnom, ScavPortClass, ScavPortOneVsAll
from runtime.errors import UserError

CLASSES = [f"part{i}" for i in range(8)]


def write(path, count=1, value=0, size=(6, 4)):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("L", size, value).save(path / f"{i}.png")


def below(dataset, root):
    return [path[len(str(root)) + 1 :] for path in dataset.paths]


@pytest.fixture
def divided(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for number, name in enumerate(CLASSES):
            write(tmp_path / split / name, count, value=number)
    return tmp_path


@pytest.fixture
def whole(tmp_path):
    for number, name in enumerate(CLASSES):
        write(tmp_path / name, 10 + number, value=number)
    return tmp_path


def refused(kind, words, **options):
    for split in ("train", "test"):
        with pytest.raises(UserError) as caught:
            kind(split, 4, **options)
        text = str(caught.value)
        assert "\n" not in text and len(text) <= 300, text
        for word in words:
            assert word in text, text


def test_folders_say_the_splits(divided):
    for split, folder, count in (("train", "train", 3), ("validation", "val", 2), ("test", "test", 1)):
        dataset = ScavPortClass(split, 4, root=str(divided))
        assert dataset.classes == CLASSES and dataset.splits == ("train", "validation", "test")
        assert below(dataset, divided) == [f"{folder}/{c}/{i}.png" for c in CLASSES for i in range(count)]
        assert dataset.labels.tolist() == [number for number in range(8) for _ in range(count)]
        image, label, _ = dataset[len(dataset) - 1]
        assert image.unique().tolist() == [7] and label == 7
        assert (
            dataset.matched
            == f"{split} of {divided}: {8 * count} images (" + ", ".join(f"{count} {name}" for name in CLASSES) + ")"
        )


def test_without_a_folder_for_validation_there_is_no_such_split(divided):
    (divided / "val").rename(divided / "other")
    assert ScavPortClass("train", 4, root=str(divided)).splits == ("train", "test")
    with pytest.raises(UserError, match="no images for validation"):
        ScavPortClass("validation", 4, root=str(divided))


def test_seeded_shares_of_each_class(whole):
    about = {"root": str(whole), "test_fraction": 0.3, "validation_fraction": 0.2}
    sets = {split: ScavPortClass(split, 4, **about) for split in ("train", "validation", "test")}
    every = sorted(path for dataset in sets.values() for path in dataset.paths)
    assert len(every) == len({*every}) == sum(10 + number for number in range(8))
    # 0.3 of n to the nearest, and of the rest 2 / 7 to the nearest
    assert sets["test"].labels.bincount().tolist() == [3, 3, 4, 4, 4, 5, 5, 5]
    assert sets["validation"].labels.bincount().tolist() == [2, 2, 2, 3, 3, 3, 3, 3]
    again = ScavPortClass("test", 4, **about)
    other = ScavPortClass("test", 4, **about, split_seed=1)
    assert again.paths == sets["test"].paths != other.paths and len(other) == len(again)
    assert sets["train"].left_out == {"kept for validation": 21, "kept for testing": 33}
    assert ScavPortClass("train", 4, root=str(whole)).splits == ("train", "test")


def test_half_of_a_layout_is_named(divided):
    root = str(divided)
    refused(ScavPortClass, ["is not a folder", "expected"], root=f"{root}/nowhere")
    refused(ScavPortClass, ["8 classes", "data.n_classes=9"], root=root, n_classes=9)
    refused(
        ScavPortClass, ["leave out data.test_fraction, data.split_seed"], root=root, test_fraction=0.2, split_seed=0
    )
    (divided / "val/part3").rename(divided / "val/part_3")
    refused(
        ScavPortClass,
        [f"split validation of {root} lacks part3 and has part_3 more", f"split train of {root}"],
        root=root,
    )
    (divided / "val/part_3").rename(divided / "val/part3")
    write(divided / "test/other")
    refused(ScavPortClass, [f"split test of {root} has other more"], root=root)
    shutil.rmtree(divided / "test/other")
    (divided / "validation").symlink_to("test")
    refused(ScavPortClass, ["are both for validation"], root=root)
    (divided / "validation").unlink()
    (divided / "val").rename(divided / ".val")
    (divided / "val").symlink_to("train")
    refused(ScavPortClass, ["the same folder"], root=root)
    (divided / "val").unlink()
    (divided / "test").rename(divided / "tests")
    refused(ScavPortClass, [f"no folder {root}/test", "expected"], root=root)


@pytest.mark.parametrize(("test", "validation"), [(0.0, 0.1), (0.6, 0.4), (0.2, -0.1)])
def test_shares_leave_something_to_learn_from(whole, test, validation):
    refused(ScavPortClass, ["together below 1"], root=str(whole), test_fraction=test, validation_fraction=validation)


def test_a_class_too_small_for_three_splits_is_named(whole):
    write(whole / "part4x", 2)
    about = {"root": str(whole), "n_classes": 9, "validation_fraction": 0.2}
    refused(ScavPortClass, ["split validation of", "lacks part4x"], **about)
    refused(ScavPortClass, ["has 9 classes (part0", "data.n_classes=8"], root=str(whole))


@pytest.mark.parametrize("normal", ["part2", "2"])
def test_one_against_the_other_seven(divided, normal):
    train, validation, test = (
        ScavPortOneVsAll(split, 4, root=str(divided), normal=normal) for split in ("train", "validation", "test")
    )
    assert below(train, divided) == [f"train/part2/{i}.png" for i in range(3)]
    assert below(validation, divided) == [f"val/part2/{i}.png" for i in range(2)]
    assert test.defects == ["good" if name == "part2" else name for name in CLASSES]
    assert test.labels.tolist() == [1, 1, 0, 1, 1, 1, 1, 1] and len(test[0]) == 4
    assert train.left_out["of other classes"] == 21 and "validation" in train.splits
    assert test.matched.endswith("(1 good, 1 part0, 1 part1, 1 part3, 1 part4, 1 part5, 1 part6, 1 part7)")


def test_a_name_wins_over_a_number_and_an_unknown_one_lists_both(divided):
    for split in ("train", "val", "test"):
        (divided / split / "part7").rename(divided / split / "5")
    assert "/5/" in ScavPortOneVsAll("train", 4, root=str(divided), normal="5").paths[0]
    assert "/part0/" in ScavPortOneVsAll("train", 4, root=str(divided), normal="1").paths[0]
    for normal in ("all", "8", "-1", "²"):
        refused(ScavPortOneVsAll, ["0 5, 1 part0", "sweeps"], root=str(divided), normal=normal)


def test_all_in_turn_see_every_image_as_normal_once(whole):
    learned = [
        path for number in range(8) for path in ScavPortOneVsAll("train", 4, root=str(whole), normal=str(number)).paths
    ]
    assert sorted(learned) == sorted(ScavPortClass("train", 4, root=str(whole)).paths)


@pytest.mark.parametrize(("inlier", "outlier"), [("inlier", "outlier"), ("good", "outliers"), ("Normal", "hand")])
def test_inliers_and_outliers(tmp_path, inlier, outlier):
    write(tmp_path / "train" / inlier, 4)
    write(tmp_path / "test" / inlier, 2)
    write(tmp_path / "test" / outlier, 3)
    train, test = (ScavPortAnom(split, 4, root=str(tmp_path)) for split in ("train", "test"))
    assert len(train) == 4 and {*train.defects} == {"good"} and train.left_out == {"abnormal, in train": 0}
    assert test.defects == ["good"] * 2 + [outlier] * 3 and not test.has_masks
    write(tmp_path / "train" / outlier, 2)
    assert ScavPortAnom("train", 4, root=str(tmp_path)).left_out == {"abnormal, in train": 2}


def test_inliers_and_outliers_without_a_split(tmp_path):
    write(tmp_path / "inlier", 10)
    write(tmp_path / "outlier", 3)
    train, test = (ScavPortAnom(split, 4, root=str(tmp_path), test_fraction=0.3) for split in ("train", "test"))
    assert len(train) == 7 and train.left_out == {"kept for testing": 3}
    assert test.defects == ["good"] * 3 + ["outlier"] * 3 and {*train.paths}.isdisjoint(test.paths)
    other = ScavPortAnom("test", 4, root=str(tmp_path), test_fraction=0.3, split_seed=3)
    assert other.paths != test.paths and len(other) == 6


def test_wrong_layouts_of_inliers(tmp_path):
    refused(ScavPortAnom, ["is not a folder", "expected"], root=str(tmp_path / "nowhere"))
    write(tmp_path / "inlier", 2)
    refused(ScavPortAnom, ["no others", "expected"], root=str(tmp_path))
    write(tmp_path / "outlier", 2)
    write(tmp_path / "good", 2)
    refused(ScavPortAnom, ["2 folders of normal images", "good, inlier, outlier"], root=str(tmp_path))
    for name in ("good", "inlier"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    refused(ScavPortAnom, ["no folders of normal images", "outlier"], root=str(tmp_path))
    write(tmp_path / "train" / "inlier", 2)
    refused(ScavPortAnom, [f"no folder {tmp_path}/test", "expected"], root=str(tmp_path))
    refused(ScavPortAnom, ["leave out data.test_fraction"], root=str(tmp_path), test_fraction=0.1)


def part(root, name, labels=("worn", "broken"), masks=True):
    write(root / name / "train" / "good", 5)
    write(root / name / "test" / "good", 2)
    for label in labels:
        write(root / name / "test" / label, 3)
        if masks:
            write(root / name / "ground_truth" / label, 3, value=255)


@pytest.mark.parametrize("category", ["ring-surface", "ring_surface", "Ring-Surface"])
def test_condition(tmp_path, category):
    part(tmp_path, "ring-surface")
    part(tmp_path, "ring", masks=False)
    about = {"root": str(tmp_path), "category": category}
    train, test = (Condition(split, 4, **about) for split in ("train", "test"))
    assert below(train, tmp_path) == [f"ring-surface/train/good/{i}.png" for i in range(5)] and not train.has_masks
    assert test.defects == ["good"] * 2 + ["broken"] * 3 + ["worn"] * 3
    assert test.has_masks and test.mask(2).all() and not test.mask(0).any()
    assert test.matched.endswith("8 images (2 good, 3 broken, 3 worn), 6 masks")
    worn = Condition("test", 4, **about, abnormal=("worn",))
    assert worn.defects == ["good"] * 2 + ["worn"] * 3
    assert worn.left_out == {"abnormal, in train": 0, "of label broken, not in data.abnormal": 3}
    assert not Condition("test", 4, root=str(tmp_path), category="ring").has_masks


def test_condition_without_a_split(tmp_path):
    write(tmp_path / "lock" / "good", 10)
    write(tmp_path / "lock" / "missing", 4)
    write(tmp_path / "lock" / "bent", 1)
    about = {"root": str(tmp_path), "category": "lock"}
    train, test = (Condition(split, 4, **about) for split in ("train", "test"))
    assert len(train) == 8 and test.defects == ["good"] * 2 + ["bent"] + ["missing"] * 4 and not test.has_masks
    assert {*train.paths}.isdisjoint(test.paths)
    write(tmp_path / "lock" / "ground_truth" / "bent", 1)
    refused(Condition, ["masks, which need folders train and test"], **about)


def test_wrong_layouts_of_condition(tmp_path):
    refused(Condition, ["is not in", "none", "overview, lock, ring or ring-surface"], root=str(tmp_path), category="x")
    part(tmp_path, "ring")
    about = {"root": str(tmp_path), "category": "ring"}
    refused(Condition, ["data.category=lock", "folders there: ring"], root=str(tmp_path), category="lock")
    refused(Condition, ["data.abnormal=rust", "broken, worn"], **about, abnormal=("rust", "worn"))
    refused(Condition, ["leave out data.split_seed"], **about, split_seed=1)
    (tmp_path / "ring/ground_truth/worn/2.png").unlink()
    with pytest.raises(UserError, match="has no mask"):
        Condition("test", 4, **about)
    assert Condition("test", 4, **about, masks="some").mask_known.tolist() == [True] * 7 + [False]
    (tmp_path / "ring/test/good").rename(tmp_path / "ring/test/fine")
    refused(Condition, ["test has no folders of normal images", "broken, fine, worn"], **about)


@pytest.mark.parametrize("name", ["scavport_anom", "condition"])
def test_training_images_linked_into_the_test_are_refused(tmp_path, name):
    root = tmp_path / "ring"
    write(root / "train" / "good", 2)
    write(root / "test" / "bad", 2)
    (root / "test" / "good").symlink_to(root / "train" / "good")
    about = {"root": str(root)} if name == "scavport_anom" else {"root": str(tmp_path), "category": "ring"}
    refused(DATASETS[name], ["the same folder"], **about)


@pytest.mark.parametrize("name", ["scavport_class", "scavport_anom", "condition"])
def test_broken_images_are_left_out_on_demand(tmp_path, name):
    root = tmp_path / "ring"
    for split in ("train", "test"):
        write(root / split / "good", 2)
        write(root / split / "bad", 2)
    (root / "train" / "good" / "9.png").write_bytes(b"no image")
    about = {
        "scavport_class": {"root": str(root), "n_classes": 2},
        "scavport_anom": {"root": str(root)},
        "condition": {"root": str(tmp_path), "category": "ring"},
    }[name]
    whole, some = (DATASETS[name]("train", 4, **about, on_error=how) for how in ("fail", "skip"))
    assert len(whole) == len(some) + 1 and some.left_out["not readable"] == 1
    assert [path for path in whole.paths if path not in some.paths] == [str(root / "train/good/9.png")]
