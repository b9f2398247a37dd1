"""Boxes of COCO's and FiftyOne's JSON files, cut out: places against a plain loop, splits by image, what is wrong."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import train_ssl
from data import DataConfig, build_dataset
from data.datasets.detections import Detections, crop_of, five_of
from data.splits import write_splits
from runtime import config
from runtime.errors import UserError
from tests.data.datasets.layouts import annotation, coordinates, write, write_fiftyone

COCO = {7: "ship", 3: "buoy", 90: "person"}  # with gaps, as COCO's own


def coco(root, part, images, boxes, **more):
    """As COCO publishes: images in <part>/, annotations/instances_<part>.json."""
    rows = [{"id": i, "file_name": f"{i:012}.png", "height": 30, "width": 40, "license": 1} for i in images]
    for row in rows:
        write(root / part / row["file_name"], coordinates(row["id"] % 256))
    content = {"info": {}, "licenses": [], "images": rows, "annotations": boxes}
    content["categories"] = [{"id": k, "name": name, "supercategory": "x"} for k, name in COCO.items()]
    path = root / "annotations" / f"instances_{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | more))
    return f"annotations/instances_{part}.json"


def rows_of(dataset):
    """(number of the image, class, top, left, height, width) of each item, from the pixels alone."""
    found = []
    for i, label in enumerate(dataset.labels.tolist()):
        image = dataset.original(i).numpy()
        _, height, width = image.shape
        top, left = image[0].min(), image[1].min()
        assert (image[0] == np.arange(top, top + height)[:, None]).all()
        assert (image[1] == np.arange(left, left + width)).all() and dataset.sizes[i].tolist() == [height, width]
        found.append((int(image[2, 0, 0]), dataset.classes[label], int(top), int(left), height, width))
    return found


@pytest.fixture
def ships(tmp_path):
    write_fiftyone(
        tmp_path,
        [
            (1, 1, [2.0, 3.0, 10.0, 5.0]),  # ship
            (1, 0, [20.5, 10.25, 12.0, 8.0]),  # buoy, the largest
            (2, 1, [-5.0, -5.0, 15.0, 15.0]),  # over the corner
            (2, 0, [30.0, 20.0, 30.0, 30.0]),  # equally large inside: the first counts
            (4, 0, [0.0, 0.0, 40.0, 30.0]),
        ],
    )
    return tmp_path


EVERY = {"test_fraction": 0.0}


def test_fiftyones_export(ships):
    largest = Detections("train", 8, root=str(ships), **EVERY)
    assert largest.classes == ["buoy", "ship"] and largest.labels.dtype == torch.int64
    expected = [(1, "buoy", 10, 20, 9, 13), (2, "ship", 0, 0, 10, 10), (4, "buoy", 0, 0, 30, 40)]
    assert rows_of(largest) == expected
    assert largest.left_out == {"images without boxes": 1, "boxes beside the largest": 2}
    image, label, index = largest[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and (label, index) == (1, 1)
    assert largest.names == ["data/01.png#10,20,9,13", "data/02.png#0,0,10,10", "data/04.png#0,0,30,40"]
    every = Detections("train", 8, root=str(ships), boxes="all", **EVERY)
    more = [(1, "ship", 3, 2, 5, 10), expected[0], expected[1], (2, "buoy", 20, 30, 10, 10), expected[2]]
    assert rows_of(every) == more and every.left_out == {"images without boxes": 1}
    assert every.matched == f"train of {ships}: 5 images (3 buoy, 2 ship)"


def test_five_parts_of_the_largest(ships):
    five = Detections("train", 8, root=str(ships), boxes="five", **EVERY)
    places = [(0, 0), (0, 20), (15, 0), (15, 20), (7, 10)]
    assert rows_of(five)[10:] == [(4, "buoy", top, left, 15, 20) for top, left in places]
    assert rows_of(five)[:2] == [(1, "buoy", 10, 20, 5, 7), (1, "buoy", 10, 26, 5, 7)]
    assert five_of([3, 4, 1, 1]) == [[3, 4, 1, 1]] * 5
    for height in range(1, 9):
        for width in range(1, 9):
            parts = five_of([2, 5, height, width])
            seen = {(y, x) for a, b, h, w in parts for y in range(a, a + h) for x in range(b, b + w)}
            assert seen == {(y, x) for y in range(2, 2 + height) for x in range(5, 5 + width)}


@pytest.mark.parametrize("context", [1.0, 1.3, 2.0, 10.0])
def test_places_against_a_plain_loop(context):
    """The pixels that a box touches, by asking each pixel; grown boxes from their centers."""
    rng, outside = np.random.default_rng(0), 0
    for _ in range(300):
        height, width = rng.integers(1, 14, 2).tolist()
        x, y = rng.uniform(-8, 16, 2).round(1).tolist()
        w, h = (rng.integers(1, 100, 2) / 10).tolist()
        found = crop_of((x, y, w, h), context, (height, width))
        inside = x < width and y < height and x + w > 0 and y + h > 0
        cx, cy, gw, gh = x + w / 2, y + h / 2, w * context / 2, h * context / 2
        tiny = 6e-4  # of a pixel, which rounding may lose
        columns = [i for i in range(width) if i + 1 > cx - gw + tiny and i < cx + gw - tiny]
        rows = [i for i in range(height) if i + 1 > cy - gh + tiny and i < cy + gh - tiny]
        outside += not inside
        if not inside:
            assert found is None
        else:
            assert found == [rows[0], columns[0], len(rows), len(columns)], (x, y, w, h, height, width)
    assert 30 < outside < 270


def test_the_smallest_parts_of_a_pixel_stay_inside():
    assert crop_of((39.99999, 0, 5, 5), 1.0, (30, 40)) == [0, 39, 5, 1]
    assert crop_of((-4.99999, 0, 5, 5), 1.0, (30, 40)) == [0, 0, 5, 1]
    assert crop_of((40, 0, 5, 5), 3.0, (30, 40)) is None and crop_of((-5, 0, 5, 5), 3.0, (30, 40)) is None
    assert crop_of((0.1 * 640, 0, 0.2 * 640, 5), 1.0, (30, 1000)) == [0, 64, 5, 128]
    assert crop_of((3, 3, 1e-6, 1e-6), 1.0, (30, 40)) == [3, 3, 1, 1]
    assert math.prod(crop_of((-1e8, -1e8, 3e8, 3e8), 100.0, (30, 40))[2:]) == 1200


def test_context_and_the_smallest_crop(ships):
    some = Detections("train", 8, root=str(ships), boxes="all", context=1.5, min_crop_size=13, **EVERY)
    assert rows_of(some) == [
        (1, "buoy", 8, 17, 13, 19),  # 20.5 - 3, 10.25 - 2
        (2, "ship", 0, 0, 14, 14),  # -5 + 15 + 3.75
        (2, "buoy", 12, 22, 18, 18),
        (4, "buoy", 0, 0, 30, 40),
    ]
    assert some.left_out == {"images without boxes": 1, "below data.min_crop_size=13": 1}
    with pytest.raises(
        UserError, match=r"no box of the split 'train' of .* can be cut out: 1 images without boxes, 5 below data"
    ):
        Detections("train", 8, root=str(ships), boxes="all", min_crop_size=41, **EVERY)


def test_coco_with_a_file_for_each_split(tmp_path):
    boxes = [annotation(10, 5, 90, [1, 2, 3, 4], iscrowd=0), annotation(11, 5, 7, [0, 0, 40, 30], iscrowd=1)]
    boxes += [
        annotation(12, 6, 7, [5, 5, 4, 4]),
        annotation(13, 6, 7, [5, 5, 0, 4]),
        annotation(14, 6, 3, [50, 5, 9, 9]),
    ]
    train = coco(tmp_path, "train2017", [6, 5], boxes)
    test = coco(tmp_path, "val2017", [9], [annotation(1, 9, 7, [1, 1, 2, 2]), annotation(2, 9, 90, [3, 3, 2, 2])])
    about = {"root": str(tmp_path), "annotations": train, "test_annotations": test, "boxes": "all"}
    learned, tested = (Detections(split, 8, **about) for split in ("train", "test"))
    assert learned.classes == tested.classes == ["buoy", "person", "ship"]
    assert rows_of(learned) == [(5, "person", 2, 1, 4, 3), (6, "ship", 5, 5, 4, 4)]
    assert learned.left_out == {"crowds": 1, "boxes without area": 1, "boxes outside the image": 1}
    assert rows_of(tested) == [(9, "ship", 1, 1, 2, 2), (9, "person", 3, 3, 2, 2)]
    assert learned.splits == ("train", "test") and learned.divisions == {}
    with pytest.raises(UserError, match=r"val2017\.json divides the set, so leave out data\.test_fraction"):
        Detections("train", 8, **about, test_fraction=0.2)
    with pytest.raises(
        UserError, match=r"no images for validation: it has train, test; set data\.validation_annotations"
    ):
        Detections("validation", 8, **about)
    merged = Detections("train", 8, **about, merge={"person": "thing", "ship": "thing"})
    assert merged.classes == ["buoy", "thing"] and merged.labels.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"data\.merge: shop is no class, did you mean 'ship'"):
        Detections("train", 8, **about, merge={"shop": "thing"})
    section = {"name": "detections", "size": 8, "root": str(tmp_path), "annotations": train, "boxes": "all"}
    one = coco(tmp_path, "one", [9], [annotation(1, 9, 7, [1, 1, 2, 2])])
    with pytest.raises(UserError, match=r"split test of .* lacks person"):
        build_dataset(config.build(DataConfig, section | {"test_annotations": one}), "test")
    with pytest.raises(UserError, match=r"one/000000000009.png is in .*one.json and in .*one.json"):
        Detections("train", 8, root=str(tmp_path), annotations=one, test_annotations=one)


def test_all_boxes_of_an_image_are_in_one_split(tmp_path):
    rng = np.random.default_rng(1)
    boxes = [
        (int(i), int(c), [1.0, 1.0, 4.0 + i % 5, 5.0])
        for i, c in zip(rng.integers(1, 41, 150), rng.integers(0, 2, 150))
    ]
    write_fiftyone(tmp_path, boxes, 40)
    about = {"root": str(tmp_path), "boxes": "all", "test_fraction": 0.2, "validation_fraction": 0.2}
    sets = {split: Detections(split, 8, **about) for split in ("train", "validation", "test")}
    images = {split: {*its.paths} for split, its in sets.items()}
    assert sum(map(len, sets.values())) == 150 and sum(map(len, images.values())) == len(set.union(*images.values()))
    assert all(
        4 <= len(images[split]) <= 10 and {*sets[split].labels.tolist()} == {0, 1} for split in ("validation", "test")
    )
    write_splits(sets["train"], tmp_path / "run")
    text = (tmp_path / "run/splits.csv").read_text().split()
    assert len(text) == 41 and len({line.split(",")[0] for line in text}) == 41  # every image of the file once
    del about["test_fraction"], about["validation_fraction"]
    # with other crops too, the same images are in the same splits
    for boxes in ("all", "largest", "five"):
        for split, old in images.items():
            again = Detections(split, 8, **about | {"splits": str(tmp_path / "run/splits.csv"), "boxes": boxes})
            assert {*again.paths} == old
    grouped = {split: Detections(split, 8, **about, group=r"(.)[0-9]\.png") for split in ("train", "test")}
    tens = [{path[-6] for path in its.paths} for its in grouped.values()]
    assert tens[0].isdisjoint(tens[1]) and tens[0] | tens[1] == {*"01234"}
    assert f"in {len(tens[1])} groups" in grouped["test"].matched
    # the file's own order of images and annotations means nothing for the splits
    content = json.loads((tmp_path / "labels.json").read_text())
    content["images"].reverse()
    (tmp_path / "labels.json").write_text(json.dumps(content))
    assert {*Detections("test", 8, root=str(tmp_path), boxes="all").paths} == {
        *Detections("test", 8, root=str(tmp_path), boxes="all", test_fraction=0.2).paths
    }


def test_windows_names_folders_and_missing_files(ships):
    content = json.loads((ships / "labels.json").read_text())
    (ships / "data/sub").mkdir()
    (ships / "data/01.png").rename(ships / "data/sub/01.png")
    content["images"][0]["file_name"] = r"sub\01.png"
    (ships / "labels.json").write_text(json.dumps(content))
    assert rows_of(Detections("train", 8, root=str(ships), **EVERY))[-1][0] == 1  # in the order of the names
    (ships / "data/02.png").unlink()
    (ships / "data/04.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 images that .*labels\.json names are not there, the first is .*02\.png"):
        Detections("train", 8, root=str(ships), **EVERY)
    some = Detections("train", 8, root=str(ships), on_error="skip", **EVERY)
    assert len(some) == 1 and some.left_out["missing images"] == some.left_out["not readable"] == 1
    (ships / "data").rename(ships / "photos")
    with pytest.raises(UserError, match=r"none of the 4 images of .*, as 02\.png, is in .*: set data\.images"):
        Detections("train", 8, root=str(ships), **EVERY)
    assert len(Detections("train", 8, root=str(ships), images="photos", on_error="skip", **EVERY)) == 1


def test_boxes_are_of_the_upright_image(ships):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(coordinates(4)).transpose(Image.Transpose.ROTATE_90).save(ships / "data/04.png", exif=exif)
    assert rows_of(Detections("train", 8, root=str(ships), **EVERY))[-1] == (4, "buoy", 0, 0, 30, 40)
    write(ships / "data/04.png", coordinates(4, 15, 20))
    with pytest.raises(UserError, match=r"04\.png has 15 x 20 pixels, and .*labels\.json says 30 x 40"):
        Detections("train", 8, root=str(ships), **EVERY)


def change(key, value):
    def apply(content):
        *parents, last = key
        for parent in parents:
            content = content[parent]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (change(["images", 1, "id"], 1), ["id=1 twice in images", "01.png", "02.png"]),
        (change(["images", 1, "file_name"], "01.png"), ["1 images more than once", "01.png"]),
        (change(["categories", 1, "id"], 0), ["id=0 twice in categories", "buoy", "ship"]),
        (change(["annotations", 1, "id"], 1), ["annotation 1 of", "twice"]),
        (change(["annotations", 1, "id"], [1]), ["annotation [1] of", "id"]),
        (change(["annotations", 1, "image_id"], 77), ["annotation 2 of", "image_id=77", "no such image"]),
        (change(["annotations", 1, "category_id"], 2), ["category_id=2", "no such category"]),
        (change(["annotations", 1, "category_id"], None), ["category_id=None"]),
        (change(["annotations", 1, "bbox"], [1, 2, 3]), ["annotation 2 of", "bbox=[1, 2, 3]", "four numbers"]),
        (change(["annotations", 1, "bbox"], [1, 2, 3, float("nan")]), ["bbox=[1, 2, 3, nan]"]),
        (change(["annotations", 1, "bbox"], [1, 2, "3", 4]), ["four numbers"]),
        (change(["annotations", 1, "bbox"], None), ["bbox=None"]),
        (change(["images", 0, "file_name"], 5), ["one of images", "file_name=5"]),
        (change(["images", 0, "id"], None), ["one of images", "id=None"]),
        (change(["images"], None), ["no list of images", "keys there: info, licenses, categories"]),
        (change(["images"], []), ["no list of images"]),
        (change(["annotations"], {}), ["no list of annotations"]),
        (change(["annotations"], None), ["no box of the split 'train'", "4 images without boxes"]),
        (change(["categories"], [1]), ["no list of categories"]),
    ],
)
def test_what_is_wrong_with_a_file_is_named(ships, apply, words):
    content = json.loads((ships / "labels.json").read_text())
    apply(content)
    (ships / "labels.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        Detections("train", 8, root=str(ships), **EVERY)
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 300 and all(word in text for word in words), text


def test_files_that_are_none(ships):
    for text, words in {"[]": "results are none", "{": "is no JSON file", "[" * 100000: "is no JSON file"}.items():
        (ships / "labels.json").write_text(text)
        with pytest.raises(UserError, match=words):
            Detections("train", 8, root=str(ships))
    (ships / "labels.json").rename(ships / "other.json")
    with pytest.raises(
        UserError, match=r"there is no .*labels\.json; JSON files there: other\.json; expected <root>/labels"
    ):
        Detections("train", 8, root=str(ships))


def test_pretraining_on_crops(ships, tmp_path, capsys):
    words = ["configs/demo/simclr_demo.yaml", "backbone=mobilenet_v2", "backbone.width=0.25", "data=detections"]
    words += [f"data.root={ships}", "data.boxes=all", "data.test_fraction=0", "data.size=32", "augment.size=32"]
    words += ["data.merge.buoy=thing", "batch_size=4", "epochs=1", "holdout=0", f"runs={tmp_path}/runs", "run_name=run"]
    train_ssl.main(words)
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["steps"] == 1 and "simclr on 5 images" in err
    assert "5 images (2 ship, 3 thing)" in err
    assert (tmp_path / "runs/run/splits.csv").read_text().split()[0] == "path,split"
