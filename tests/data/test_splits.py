"""Splits that a set makes itself: the file of them, groups, and that all splits have the same classes."""

import csv
import os
import re

import pytest
import torch
from PIL import Image

import train_anomaly
import train_ssl
from data import DATASETS, DataConfig, build_dataset
from data.splits import Draw, evenly, holdout, write_splits
from runtime import config
from runtime.errors import UserError
from tests.data.datasets.layouts import write_dimo, write_fiftyone

ODD = [
    "a,b.png",
    'q"q.png',
    "new\nline.png",
    "return\rhere.png",
    " blank .png",
    "back\\slash.png",
    "zwei\u2028x\x85y.png",
]
ODD.append(os.fsdecode(b"no utf-8 \xff.png"))


def write(folder, names, value=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names if not isinstance(names, int) else [f"ship{i % 5}_{i}.png" for i in range(names)]:
        Image.linear_gradient("L").resize((6, 4)).point(lambda x: x if value is None else value).save(folder / name)


@pytest.fixture
def trees(tmp_path):
    """{name of a data set: options} of all that make their own splits, their folders below `tmp_path`."""
    for i in range(8):
        write(tmp_path / "classes" / f"c{i}", 11 + i)
    write(tmp_path / "classes" / "c0", ODD)
    for good, other, folder in (("inlier", "outlier", "anom"), ("good", "worn", "parts/ring")):
        write(tmp_path / folder / good, 20)
        write(tmp_path / folder / other, 4)
    for i in range(12):
        place = tmp_path / "kolektor" / f"kos{i // 3:02}"
        write(place, [f"Part{i % 3}.jpg"])
        write(place, [f"Part{i % 3}_label.bmp"], 255 * (i % 4 == 0))
        write(tmp_path / "tiles/MT_Free/Imgs", [f"exp{i % 2}_num_{i // 2}.jpg"])
    write(tmp_path / "tiles/MT_Crack/Imgs", ["exp1_num_3.jpg"])
    write(tmp_path / "tiles/MT_Crack/Imgs", ["exp1_num_3.png"], 255)
    write_fiftyone(tmp_path / "boxes", [(i, i % 2, [4.0, 4.0, 20.0, 20.0]) for i in range(1, 31)], 30)
    write_dimo(tmp_path / "dimo", scenes=8)
    rows = [f"classes/c{k}/ship{i % 5}_{i}.png,c{k},g{i % 5}" for k in range(3) for i in range(10)]
    (tmp_path / "images.csv").write_text("\n".join(["path,label,group", *rows]))
    classes = {"root": str(tmp_path / "classes")}
    return {
        "folder": classes,
        "one_against_all": classes | {"normal": "c1"},
        "scavport_class": classes | {"validation_fraction": 0.2},
        "scavport_one_vs_all": classes | {"normal": "2", "split_seed": 4},
        "scavport_anom": {"root": str(tmp_path / "anom")},
        "condition": {"root": str(tmp_path / "parts"), "category": "ring"},
        "kolektor_sdd": {"root": str(tmp_path / "kolektor")},
        "magnetic_tile": {"root": str(tmp_path / "tiles")},
        "table": {"root": str(tmp_path)},
        "detections": {"root": str(tmp_path / "boxes"), "validation_fraction": 0.2},
        "dimo": {"root": str(tmp_path / "dimo"), "crop": "object"},
        "dimo_one_vs_all": {"root": str(tmp_path / "dimo"), "normal": 1, "test_fraction": 0.3},
    }


def all_splits(name, options):
    """Everything that the splits of a set have, but the reasons."""
    found = {}
    for split in DATASETS[name].splits:
        try:
            its = DATASETS[name](split, 4, **options)
        except UserError:
            continue
        found[split] = (its.paths, its.labels.tolist(), its.classes, its.defects, its.mask_paths, its.splits)
    assert len(found) >= 2
    return found


SHARES = ("test_fraction", "validation_fraction", "split_seed")


@pytest.mark.parametrize("name", [n for n in DATASETS if "splits" in DATASETS[n].__init__.__annotations__])
def test_a_written_file_gives_the_same_splits_again(name, trees, tmp_path):
    options = trees[name]
    before = all_splits(name, options)
    write_splits(DATASETS[name]("train", 4, **options), tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["splits.csv"]
    given = {key: value for key, value in options.items() if key not in SHARES}
    given["splits"] = str(tmp_path / "run" / "splits.csv")
    assert all_splits(name, given) == before
    write_splits(DATASETS[name]("test", 4, **given), tmp_path / "again")  # and so does a run that was handed one
    texts = [(tmp_path / run / "splits.csv").read_bytes() for run in ("run", "again")]
    assert texts[0] == texts[1] and texts[0].startswith(b"path,split\r\n")
    for key, value in {"test_fraction": 0.3, "split_seed": 0}.items():
        if key in DATASETS[name].__init__.__annotations__:
            with pytest.raises(UserError, match=rf"says all splits, so leave out data\.{key}"):
                DATASETS[name]("train", 4, **given, **{key: value})


def test_each_of_several_sets_has_its_own_file(trees, tmp_path):
    sets = {"ships": {"name": "folder"} | trees["folder"], "ring/a": {"name": "table"} | trees["table"]}
    write_splits(DATASETS["mixed"]("train", 4, sets=sets), tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == ["splits_ring_a.csv", "splits_ships.csv"]
    again = {name: about | {"splits": str(tmp_path / f"run/splits_{name[:4]}")} for name, about in sets.items()}
    again["ships"]["splits"] = str(tmp_path / "run/splits_ships.csv")
    again["ring/a"]["splits"] = str(tmp_path / "run/splits_ring_a.csv")
    for split in ("train", "test"):
        old, new = (DATASETS["mixed"](split, 4, sets=its) for its in (sets, again))
        assert old.paths == new.paths and old.labels.equal(new.labels)


@pytest.fixture
def two(tmp_path):
    write(tmp_path / "a", ["0.png", "1.png", "2.png"])
    write(tmp_path / "b", ["0.png", "1.png", "2.png"])
    return tmp_path


def by_hand(two, text, split="train", name="folder", **options):
    (two / "hand.tsv").write_text(text)
    return DATASETS[name](split, 4, root=str(two), splits=str(two / "hand.tsv"), **options)


def test_a_file_by_hand(two):
    text = "note\tsplit\tpath\n\tTrain\ta/0.png\n\tval\ta\\1.png\nx\ttest\t ./b/0.png\n\n\ttrain\tb/1.png\n"
    train, validation, test = (by_hand(two, text, split) for split in ("train", "validation", "test"))
    assert (train.names, validation.names, test.names) == (["a/0.png", "b/1.png"], ["a/1.png"], ["b/0.png"])
    file = two / "hand.tsv"
    assert train.left_out == {
        f"kept for validation ({file})": 1,
        f"kept for testing ({file})": 1,
        f"in no split of {file}": 2,
    }
    assert train.splits == ("train", "validation", "test") and train.classes == ["a", "b"]
    one = by_hand(two, text, "validation", "one_against_all", normal="a")
    assert one.names == ["a/1.png"] and "validation" in one.splits
    assert by_hand(two, "path,split\na/0.png,train\nb/0.png,test\n").splits == ("train", "test")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("path,split\na/0.png,train\na/0.png,test\n", ["a/0.png is in train on line 2 of", "and in test on line 3"]),
        ("path,split\na/0.png,train\n./a/0.png,train\n", ["in train on line 2", "in train on line 3"]),
        ("path,split\na/9.png,train\na/0.png,test\nc/0.png,test\n", ["2 of 3 images", "not in this set", "a/9.png"]),
        ("path,split\na/0.png,all\n", ["line 2", "the split all", "train, validation, test"]),
        ("path,split\na/0.png,\n", ["line 2", "the split "]),
        ("file,split\na/0.png,train\n", ["columns file, split", "need path and split"]),
        ("path,split\n", ["no row"]),
        ("path,split\na/0.png\n", ["line 2", "1 cells"]),
        ('path,split\n"a/0.png,train\n', ["is not CSV"]),
        ("path,split\na/0.png,train\nb/0.png,train\n", ["has no test image: name some there"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(two, rows, words):
    with pytest.raises(UserError) as caught:
        by_hand(two, rows, "test")
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in [*words, str(two)][: len(words) + ("line" in text)]), text


def test_a_missing_file_says_which_are_there(two):
    (two / "splits.csv").write_text("path,split\n")
    with pytest.raises(UserError, match=r"no table .*nowhere\.csv; tables there: splits\.csv; set data\.splits"):
        DATASETS["folder"]("train", 4, root=str(two), splits=str(two / "nowhere.csv"))


def test_no_anomaly_is_learned_from(two):
    (two / "a").rename(two / "good")
    about = {"root": str(two), "splits": str(two / "hand.csv")}
    (two / "hand.csv").write_text("path,split\ngood/0.png,train\ngood/1.png,test\nb/0.png,test\nb/1.png,train\n")
    with pytest.raises(UserError, match=r"has 1 anomalous images to learn from, the first is b/1\.png"):
        DATASETS["scavport_anom"]("test", 4, **about)
    (two / "hand.csv").write_text("path,split\ngood/0.png,train\ngood/1.png,test\nb/0.png,test\n")
    test = DATASETS["scavport_anom"]("test", 4, **about)
    assert test.names == ["good/1.png", "b/0.png"] and test.left_out == {f"in no split of {two}/hand.csv": 3}


@pytest.mark.parametrize("name", ["folder", "one_against_all", "scavport_class", "scavport_anom", "condition", "table"])
@pytest.mark.parametrize("option", ["splits", "group", "test_fraction"])
def test_a_set_divided_on_the_disk_takes_no_options_of_splits(name, option, tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "ring" / split / "good", 2)
        write(tmp_path / "ring" / split / "worn", 2)
    (tmp_path / "images.csv").write_text("path,split\nring/train/good/ship0_0.png,train\n")
    about = {"root": str(tmp_path if name in ("condition", "table") else tmp_path / "ring")}
    more = {
        "one_against_all": {"normal": "good"},
        "condition": {"category": "ring"},
        "scavport_class": {"n_classes": 2},
    }
    value = {"splits": str(tmp_path / "images.csv"), "group": "ship", "test_fraction": 0.2}[option]
    if (name, option) != ("table", "group"):
        with pytest.raises(UserError, match=rf"so leave out data\.{option}$"):
            DATASETS[name]("train", 4, **about, **more.get(name, {}), **{option: value})


GROUPED = ["folder", "one_against_all", "scavport_class", "scavport_one_vs_all", "scavport_anom", "condition"]


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("expression", ["ship[0-9]", "(ship[0-9])_[0-9]+"])
def test_a_group_is_never_on_both_sides(name, expression, trees, tmp_path):
    for odd in ODD:
        (tmp_path / "classes/c0" / odd).unlink()
    if name in ("scavport_anom", "condition"):  # every ship has an anomaly: all would be tested on
        for path in (tmp_path / {"scavport_anom": "anom", "condition": "parts/ring"}[name]).glob("[ow]*/ship[1-4]*"):
            path.unlink()
    options = trees[name] | {"group": expression}
    options.pop("validation_fraction", None)
    train, test = (DATASETS[name](split, 4, **options) for split in ("train", "test"))
    ships = [{re.search("ship[0-9]", path)[0] for path in its.paths} for its in (train, test)]
    assert ships[0].isdisjoint(ships[1]) and ships[0] and ships[1], ships
    assert f"in {len(ships[0])} groups" in train.matched and f"in {len(ships[1])} groups" in test.matched


def test_groups_against_a_plain_loop():
    """Groups of one class each, as in folders of scenes: of every class the same share of its groups."""
    paths = [
        f"/r/c{k}/scene{k}_{s}/{i}.png" for k in range(3) for s in range(5 + 5 * k) for i in range(1 + (s + k) % 4)
    ]
    labels = torch.tensor([int(path[4]) for path in paths])
    drawn = Draw(group="^[^/]+/([^/]+)", test_fraction=0.2, validation_fraction=0.2).divide("/r", paths, labels)
    split_of: dict = {}
    for path, split in zip(paths, drawn.splits):
        split_of.setdefault(path.split("/")[3], set()).add(split)
    assert all(len(its) == 1 for its in split_of.values())
    for k in range(3):
        found = [next(iter(its)) for name, its in split_of.items() if name.startswith(f"scene{k}")]
        assert [found.count(split) for split in ("train", "validation", "test")] == [3 + 3 * k, 1 + k, 1 + k]


def test_groups_that_anomalies_spoil_are_tested_on():
    paths = [f"/r/part{i // 3}/{i}.png" for i in range(30)]
    odd = [i in (4, 20) for i in range(30)]
    drawn = Draw(group="part[0-9]+").divide("/r", paths, tested=odd)
    by_part = [set(drawn.splits[i : i + 3]) for i in range(0, 30, 3)]
    assert all(len(its) == 1 for its in by_part) and by_part[1] == by_part[6] == {"test"}
    assert sum(its == {"test"} for its in by_part) == 4  # of 8 clean ones 2
    alone = Draw(group=".*", test_fraction=0.4).divide("/r", paths)  # every image is a group of its own
    assert (
        alone.splits == Draw(test_fraction=0.4).divide("/r", sorted(paths)).splits or alone.splits.count("test") == 12
    )
    assert {*Draw(group="part", test_fraction=0.4).divide("/r", paths).splits} == {"train"}  # one group: never all away
    assert Draw().divide("/r", paths, tested=[True] * 30).splits == ["test"] * 30
    assert Draw(group="part").divide("/r", paths, tested=[True] * 30).splits == ["test"] * 30


def test_expressions_that_find_nothing_or_are_none(two):
    about = {"root": str(two)}
    for expression, words in {
        "b/": r"data\.group=b/ finds nothing in 3 of 6 paths, the first is a/0\.png",
        "(x)?/": r"finds nothing in 6 of 6",
        "(": r"data\.group=\( is no regular expression: missing \)",
    }.items():
        with pytest.raises(UserError, match=words):
            DATASETS["folder"]("train", 4, **about, group=expression)
    with pytest.raises(UserError, match=r"has group 0 in two splits: a/0\.png in train, b/0\.png in test"):
        by_hand(two, "path,split\na/0.png,train\na/1.png,test\nb/0.png,test\nb/1.png,test\n", group="[0-9]")
    kept = by_hand(two, "path,split\na/0.png,train\na/1.png,test\nb/0.png,train\nb/1.png,test\n", group="[0-9]")
    assert kept.names == ["a/0.png", "b/0.png"]


def section(name, **options):
    return config.build(DataConfig, {"name": name, "size": 4} | options)


def test_all_splits_have_the_same_classes(tmp_path, capsys):
    for split, classes in {"train": "abc", "test": "ab"}.items():
        for name in classes:
            write(tmp_path / split / name, 2)
    build_dataset(section("folder", root=str(tmp_path)), "train")  # to pretrain on, no test is needed
    with pytest.raises(
        UserError, match=r"split test of .* lacks c, unlike split train of .*: all splits need the same"
    ):
        build_dataset(section("folder", root=str(tmp_path)), "test")
    sets = {"x": {"name": "folder", "root": str(tmp_path)}}
    with pytest.raises(UserError, match=r"split test of .* lacks x/c"):
        build_dataset(section("mixed", sets=sets), "test")
    merged = build_dataset(section("mixed", sets=sets, merge={"c": "x/a"}), "test")
    assert merged.classes == ["x/a", "x/b"]
    build_dataset(section("one_against_all", root=str(tmp_path), normal="a"), "test")  # one class is learned from
    write(tmp_path / "test/c", 1)
    assert len(build_dataset(section("folder", root=str(tmp_path)), "test")) == 5
    (tmp_path / "images.csv").write_text(
        "path,label,split\ntrain/a/ship0_0.png,a,train\ntrain/b/ship0_0.png,b,train\ntest/a/ship0_0.png,a,test\n"
    )
    with pytest.raises(UserError, match=r"split test of .* lacks b"):
        build_dataset(section("table", root=str(tmp_path)), "test")
    assert "warning" not in capsys.readouterr().err


def test_what_is_held_out_of_the_training_images_are_whole_groups(tmp_path):
    root = str(tmp_path / "ships")
    for folder in ("a", "b"):
        write(tmp_path / "ships" / folder, 20)  # of 5 ships
    about = {"name": "folder", "root": root, "group": "ship[0-9]"}
    write_dimo(tmp_path / "dimo")
    sets = {"grouped": about, "plain": {"name": "folder", "root": root}}
    for words in (
        about,
        {"name": "mixed", "sets": sets},
        {"name": "dimo", "root": str(tmp_path / "dimo"), "crop": "object"},
    ):
        dataset = build_dataset(section(**words), "train")
        train, held_out = holdout(dataset, 0.3, seed=0)
        groups = [[dataset.whole_groups[i] for i in side.tolist()] for side in (train, held_out)]
        assert held_out.numel() and not {*groups[0]} & {*groups[1]} and len(groups[1]) > len({*groups[1]})
        assert sorted([*train.tolist(), *held_out.tolist()]) == [*range(len(dataset))]
    assert build_dataset(section("folder", root=root), "train").whole_groups is None


def test_classes_of_a_drawn_split_and_of_one_handed_in(two, capsys):
    write(two / "c", 1)
    test = build_dataset(section("folder", root=str(two)), "test")
    assert test.labels.unique().tolist() == [0, 1]
    assert f"warning: split test of {two} lacks c, unlike split train" in capsys.readouterr().err
    write_splits(test, two / ".run")
    with pytest.raises(UserError, match=r"split test of .* lacks c"):
        build_dataset(section("folder", root=str(two), splits=str(two / ".run/splits.csv")), "test")


@pytest.mark.usefixtures("trees")
def test_a_run_writes_its_splits_and_takes_them_again(tmp_path):
    demo = ["configs/demo/simclr_demo.yaml", "backbone=mobilenet_v2", "backbone.width=0.25", "data.size=32"]
    demo += ["augment.size=32", "batch_size=4", "epochs=1", "holdout=0", f"runs={tmp_path}/runs", "overfit=4"]
    data = ["data=folder", f"data.root={tmp_path}/classes"]
    train_ssl.main([*demo, *data, "run_name=first", "data.group=ship[0-9]|^c0/"])
    with open(tmp_path / "runs/first/splits.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["path"] for row in rows}) == sum(11 + i for i in range(8)) + len(ODD)
    train_ssl.main([*demo, *data, "run_name=second", f"data.splits={tmp_path}/runs/first/splits.csv"])
    saved = [torch.load(tmp_path / "runs" / run / "last.pt", weights_only=False) for run in ("first", "second")]
    assert saved[0]["names"] == saved[1]["names"] and saved[0]["learned"] == saved[1]["learned"]
    texts = [(tmp_path / "runs" / run / "splits.csv").read_bytes() for run in ("first", "second")]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("trees")
def test_a_detector_writes_the_splits_of_what_it_was_tested_on(tmp_path):
    words = ["configs/demo/embedding_demo.yaml", "data=scavport_anom", f"data.root={tmp_path}/anom", "data.size=32"]
    train_anomaly.main([*words, "backbone=mobilenet_v2", "backbone.width=0.25", f"runs={tmp_path}", "run_name=run"])
    lines = (tmp_path / "run/splits.csv").read_text().split()
    assert len(lines) == 25 and sum(line.endswith(",train") for line in lines) == 16
    assert sum(line.startswith("outlier/") and line.endswith(",test") for line in lines) == 4


def test_images_are_spread_evenly():
    found = [evenly(*of).tolist() for of in ((10, 4), (3, 8), (1, 5), (9, 1), (0, 3))]
    assert found == [[0, 3, 6, 9], [0, 1, 2], [0], [0], []]
