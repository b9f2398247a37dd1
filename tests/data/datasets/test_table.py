"""Tables of images: columns by name, splits, groups, anomalies, and each way in which a table can be wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets.table import Table
from runtime.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Images 00.png to 39.png, each of its own gray value, and masks of the same names."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(40):
        Image.new("L", (6, 4), i).save(tmp_path / f"images/{i:02}.png")
        mask = np.zeros((4, 6), np.uint8)
        mask[1:3, 2:4] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/{i:02}.png")
    return tmp_path


def write(root, columns, rows, name="images.csv", separator=","):
    text = "\n".join(separator.join(map(str, row)) for row in [columns.split(), *rows]) + "\n"
    (root / name).write_text(text)


def numbers(dataset):
    return [int(path[-6:-4]) for path in dataset.paths]


def refused(root, *words, split="train", **options):
    with pytest.raises(UserError) as caught:
        Table(split, 4, root=str(root), **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(("name", "separator"), [("images.csv", ","), ("list.tsv", "\t"), ("excel.csv", ";")])
def test_classes_and_splits_in_any_order_of_columns(root, name, separator):
    rows = [("b", f"images/{i:02}.png", "x", ("train", "Test", "val")[i % 3]) for i in range(6)]
    rows += [("a", r"images\39.png", "", "train")]
    write(root, "label path note split", rows, name, separator)
    sets = {split: Table(split, 4, root=str(root), table=name) for split in ("train", "validation", "test")}
    assert {split: numbers(its) for split, its in sets.items()} == {
        "train": [0, 3, 39],
        "validation": [2, 5],
        "test": [1, 4],
    }
    train = sets["train"]
    assert train.classes == sets["test"].classes == ["a", "b"] and train.labels.tolist() == [1, 1, 0]
    assert train[2][0].unique().tolist() == [39] and train.defects is None
    assert train.splits == ("train", "validation", "test")
    assert train.matched == f"train of {root}: 3 images (1 a, 2 b)"


def test_a_table_may_name_its_columns_as_it_likes_and_lie_elsewhere(root):
    rows = [(root / f"images/{i:02}.png", "cat" if i % 2 else "dog", "train") for i in range(4)]
    write(root / "masks", "file kind fold", rows)
    about = {"path_column": "file", "label_column": "kind", "split_column": "fold"}
    dataset = Table("train", 4, root=str(root), table="masks/images.csv", **about)
    assert numbers(dataset) == [0, 1, 2, 3] and dataset.classes == ["cat", "dog"]
    assert dataset.names[0] == "images/00.png"


def test_quotes_a_byte_order_mark_and_blank_lines(root):
    Image.new("L", (6, 4), 77).save(root / "a, b.png")
    text = '\ufeffpath,label\r\n"a, b.png","one, ""two"""\r\n\r\nimages/01.png,three\r\n'
    (root / "images.csv").write_bytes(text.encode())
    dataset = Table("train", 4, root=str(root), test_fraction=0.0)
    assert dataset.classes == ['one, "two"', "three"] and dataset[0][0].unique().tolist() == [77]


def test_without_labels_or_splits_all_are_trained_on(root):
    write(root, "path", [(f"images/{i:02}.png",) for i in range(5)])
    dataset = Table("train", 4, root=str(root))
    assert len(dataset) == 5 and dataset.classes == ["unlabelled"] and dataset.splits == ("train",)
    assert numbers(Table("test", 4, root=str(root), test_fraction=0.4)) != []
    refused(root, "no image of the split 'test'", split="test")


def test_a_drawn_split_is_stratified_and_depends_on_the_paths_alone(root):
    rows = [(f"images/{i:02}.png", "ab"[i >= 30]) for i in range(40)]
    write(root, "path label", rows)
    train, test = (Table(split, 4, root=str(root)) for split in ("train", "test"))
    assert test.labels.bincount().tolist() == [6, 2] and train.labels.bincount().tolist() == [24, 8]
    assert sorted(numbers(train) + numbers(test)) == list(range(40)) and train.left_out["kept for testing"] == 8
    write(root, "path label", rows[::-1])
    assert sorted(numbers(Table("test", 4, root=str(root)))) == numbers(test)
    assert sorted(numbers(Table("test", 4, root=str(root), split_seed=1))) != numbers(test)


def test_groups_are_never_on_both_sides(root):
    write(root, "path label group", [(f"images/{i:02}.png", "ab"[i // 20], f"g{i // 4}") for i in range(40)])
    train, test = (Table(split, 4, root=str(root)) for split in ("train", "test"))
    groups = [{i // 4 for i in numbers(dataset)} for dataset in (train, test)]
    assert groups[0].isdisjoint(groups[1]) and test.labels.bincount().tolist() == [4, 4] and len(train) == 32
    write(root, "path label ship split", [(f"images/{i:02}.png", "a", "s", ("train", "test")[i]) for i in range(2)])
    assert len(Table("train", 4, root=str(root))) == 1
    refused(root, "group s", "is in train and, line 3, in test", group_column="ship")


def defective(root, rows, **options):
    write(root, "path label split mask", rows)
    return {split: Table(split, 4, root=str(root), **options) for split in ("train", "test")}


def test_masks_make_it_a_set_with_defects(root):
    rows = [(f"images/{i:02}.png", "good", "train", "") for i in range(3)]
    rows += [("images/03.png", "dent", "train", "masks/03.png"), ("images/04.png", "good", "test", "")]
    rows += [("images/05.png", "dent", "test", "masks/05.png"), ("images/06.png", "hole", "test", "masks/06.png")]
    sets = defective(root, rows)
    train, test = sets["train"], sets["test"]
    assert numbers(train) == [0, 1, 2] and not train.has_masks
    assert train.left_out == {"anomalous, in the training split": 1, "kept for testing": 0}
    assert test.defects == ["good", "dent", "hole"] and test.has_masks and test.labels.tolist() == [0, 1, 1]
    assert not test.mask(0).any() and test.mask(1, original=True).sum() == 4
    assert test.matched.endswith("(1 good, 1 dent, 1 hole), 2 masks")
    rows[-1] = ("images/06.png", "hole", "test", "")
    write(root, "path label split mask", rows)
    refused(root, "line 8", "has no mask", "data.masks=some", split="test")
    assert Table("test", 4, root=str(root), masks="some").mask_known.tolist() == [True, True, False]
    rows[-1] = ("images/06.png", "hole", "test", "masks/99.png")
    write(root, "path label split mask", rows)
    refused(root, "1 files", "not there", "masks/99.png", split="test")


def test_a_normal_label_without_masks(root):
    write(root, "path label", [(f"images/{i:02}.png", ("ok", "worn")[i >= 10]) for i in range(14)])
    train, test = (Table(split, 4, root=str(root), normal="ok") for split in ("train", "test"))
    assert len(train) == 8 and {*train.defects} == {"good"}
    assert test.defects == ["good"] * 2 + ["worn"] * 4 and not test.has_masks
    refused(root, "no label fine", "ok, worn", normal="fine")
    write(root, "path label", [("images/00.png", "ok"), ("images/01.png", "good")])
    refused(root, "label good", "rename", normal="ok")


def test_masks_alone_say_what_is_good(root):
    write(root, "path mask", [(f"images/{i:02}.png", f"masks/{i:02}.png" if i >= 10 else "") for i in range(12)])
    test = Table("test", 4, root=str(root))
    assert test.defects == ["good"] * 2 + ["anomalous"] * 2 and test.labels.sum() == 2


def test_groups_with_an_anomaly_are_tested_on(root):
    rows = [(f"images/{i:02}.png", "worn" if i in (1, 9) else "ok", f"ship{i // 4}") for i in range(40)]
    write(root, "path label group", rows)
    train, test = (Table(split, 4, root=str(root), normal="ok") for split in ("train", "test"))
    ships = [{i // 4 for i in numbers(dataset)} for dataset in (train, test)]
    assert ships[0].isdisjoint(ships[1]) and {0, 2} <= ships[1] and len(ships[0]) == 6  # of 8 clean ones 2 are tested
    assert test.labels.sum() == 2
    write(root, "path label group", [row[:2] + ("one",) for row in rows])
    refused(root, "no normal image of the split 'train'", normal="ok")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no row below"]),
        ("path,label\n", ["no row below"]),
        ("file,label\nimages/00.png,a\n", ["no column path (data.path_column)", "there are file, label"]),
        ("path,label,label\na,b,c\n", ["two columns of one name"]),
        ("path,label\nimages/00.png\n", ["line 2", "has 1 cells", "2 columns"]),
        ("path,label\nimages/00.png,a\n\nimages/01.png,a,b\n", ["line 4", "has 3 cells"]),
        ("path,label\n,a\n", ["line 2", "empty cell in column path"]),
        ("path,label\nimages/00.png,\n", ["line 2", "empty cell in column label"]),
        ("path,split\nimages/00.png,\n", ["line 2", "empty cell in column split"]),
        ("path,split\nimages/00.png,training\n", ["line 2", "the split training", "train, test, validation"]),
        ("path,label\nimages/00.png,a\nimages/00.png,b\n", ["1 images more than once", "images/00.png"]),
        ("path,label\nimages/00.png,a\nimages/98.png,a\nimages/99.png,a\n", ["2 files", "not there", "98.png"]),
        ("path,label,split\nimages/00.png,a,train\nimages/01.png,b,test\n", ["no training image of b"]),
        ('path,label\n"images/00.png,a\n', ["is not CSV"]),
        ("path,mask\nimages/00.png,masks/00.png\n", ["no label good"]),
    ],
)
def test_what_is_wrong_with_a_table_is_named(root, text, words):
    (root / "images.csv").write_text(text)
    refused(root, "images.csv", *words, **({"test_fraction": 0.0} if "split" not in text else {}))


def test_wrong_places_and_options(root):
    refused(root, "there is no table", "tables there: none", "data.table")
    (root / "other.tsv").write_text("path\n")
    refused(root, "tables there: other.tsv")
    (root / "images.csv").write_bytes(b"path,label\n\xff\xfe.png,a\n")
    refused(root, "cannot read table", "UTF-8")
    write(root, "path split", [("images/00.png", "train")])
    refused(root, "leave out data.test_fraction", test_fraction=0.2)
    refused(root, "no column kind (data.label_column)", label_column="kind")
    refused(root, "no image of the split 'validation'", split="validation")


def test_broken_and_missing_files_are_left_out_on_demand(root):
    (root / "images/01.png").write_bytes(b"")
    write(root, "path", [("images/00.png",), ("images/01.png",), ("images/nowhere.png",)])
    dataset = Table("train", 4, root=str(root), on_error="skip")
    assert numbers(dataset) == [0] and dataset.left_out["not readable"] == 2
    assert torch.equal(dataset.labels, torch.tensor([0]))
