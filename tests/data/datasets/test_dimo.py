"""DIMO's layout: where the parts lie, every kind of label, scenes on one side, and what is wrong with half of a set."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch

import train_anomaly
import train_ssl
from data import DATASETS, DataConfig, build_dataset, settled
from data.datasets.bop import project
from data.datasets.dimo import DIMO, DIMOOneVsAll
from data.loading import Loader
from runtime import config
from runtime.errors import UserError
from tests.data.datasets.layouts import write, write_dimo
from tests.images import TOP


@pytest.fixture
def root(tmp_path):
    write_dimo(tmp_path)
    return tmp_path


def edit(path, change):
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


def whole_set(root, **options):
    return DIMO("train", 16, root=str(root), test_fraction=0, **options)


def refused(words, kind=DIMO, split="train", **options):
    with pytest.raises(UserError) as caught:
        kind(split, 16, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text.replace(options.get("root", "/data"), "/data")) <= 300, text
    for word in words:
        assert word in text, text


def rectangle(corners, rotation, translation, camera):
    """Corner by corner; None if one is not before the camera."""
    us, vs = [], []
    for corner in corners:
        p = [sum(rotation[i][j] * corner[j] for j in range(3)) + translation[i] for i in range(3)]
        q = [sum(camera[i][j] * p[j] for j in range(3)) for i in range(3)]
        if p[2] <= 0:
            return None
        us.append(q[0] / q[2])
        vs.append(q[1] / q[2])
    return [min(us), min(vs), max(us), max(vs)]


def test_rectangles_are_those_of_a_plain_loop():
    random = np.random.default_rng(0)
    boxes = random.uniform(-80, 80, (200, 8, 3))
    rotations = np.linalg.qr(random.normal(size=(200, 3, 3)))[0]
    translations = random.normal(0, 60, (200, 3)) + [0, 0, 150]  # of some a corner or all are behind the camera
    translations[0], translations[1, 2] = [0, 0, -900], 0
    cameras = np.zeros((200, 3, 3))
    cameras[:, 0] = [700, 3, 320]  # skew too
    cameras[:, 1] = [0, 710, 240]
    cameras[:, 2, 2] = 1
    found = project(boxes, rotations, translations, cameras)
    expected = [rectangle(*(x.tolist() for x in row)) for row in zip(boxes, rotations, translations, cameras)]
    behind = [row is None for row in expected]
    assert 20 < sum(behind) < 180 and behind[0] and behind[1]
    assert np.isnan(found).all(1).tolist() == behind == np.isnan(found).any(1).tolist()
    in_front = [i for i in range(200) if not behind[i]]
    np.testing.assert_allclose(found[in_front], [expected[i] for i in in_front], rtol=1e-12)
    assert project(boxes[:0], rotations[:0], translations[:0], cameras[:0]).shape == (0, 4)


def test_a_part_straight_ahead_is_centered_on_the_principal_point():
    box = np.array([[[x, y, z] for x in (-10, 10) for y in (-20, 20) for z in (-5, 5)]], dtype=float)
    camera = np.array([[[500, 0, 321.5], [0, 500, 240], [0, 0, 1]]], dtype=float)
    left, top, right, bottom = project(box, np.eye(3)[None], np.array([[0, 0, 1000.0]]), camera)[0]
    assert (left + right) / 2 == pytest.approx(321.5) and (top + bottom) / 2 == pytest.approx(240)
    assert (right - left) / 2 == pytest.approx(500 * 10 / 995)  # the nearer face is the larger one


def test_a_crop_shows_its_part_and_nothing_else(root):
    dataset = whole_set(root, crop="object")
    assert dataset.classes == ["part1", "part2"] and len(dataset) == 24 + 12  # without the carriers
    for i in range(len(dataset)):
        image, label, index = dataset[i]
        assert image.shape == (3, 16, 16) and index == i
        assert image.unique().tolist() == [100 * (label + 1)]
        assert dataset.original(i).unique().tolist() == [100 * (label + 1)]
    part1 = dataset.labels == 0
    assert dataset.sizes[part1].unique(dim=0).tolist() == [[20, 40]]
    assert dataset.sizes[~part1].unique(dim=0).tolist() == [[60, 20]]
    assert dataset.boxes[:2].tolist() == [[24, 24, 20, 40], [24, 26, 20, 40]]
    assert dataset.names[0] == "real_jaigo/000000/rgb/000000.png#24,24,20,40"
    assert len({*dataset.names}) == len(dataset)
    assert dataset.matched == (
        f"train of {root}: 36 images (24 part1, 12 part2), in 6 groups, from 12 scenes of real_jaigo, "
        "sim_jaigo_rand_light"
    )


def test_whole_images_are_whole(root):
    dataset = whole_set(root)
    assert len(dataset) == 24 and dataset.sizes.unique().tolist() == [128] and dataset.boxes is None
    assert dataset.names[:3] == [f"real_jaigo/00000{i}/rgb/00000{j}.png" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert dataset[2][0].max() == 200 and dataset[2][0].min() == 0


@pytest.mark.parametrize("crop", ["image", "object"])
@pytest.mark.parametrize(("label", "numbers"), [("lighting", 2), ("carrier", 3), ("composition", 2)])
def test_labels_of_images_in_both_spellings(root, crop, label, numbers):
    """Those of the real scenes have keys as light_id, those of the synthetic ones as light."""
    dataset = whole_set(root, crop=crop, label=label)
    assert dataset.classes == [f"{label}{i}" for i in range(numbers)]
    for name, found in zip(dataset.names, dataset.labels.tolist()):
        assert found == int(name.split("/")[1][:6]) % numbers


def test_labels_that_are_texts_or_lists(root):
    for path in root.glob("*/*/scene_info.json"):
        number = int(path.parent.name[:6])

        def change(entries, number=number):
            for entry in entries.values():
                entry |= {
                    "carrier_id": ["bin", "metal pallet"][number % 2],
                    "composition_type": [1, 2][: 1 + number % 2],
                }

        edit(path, change)
    assert whole_set(root, label="carrier").classes == ["bin", "metal pallet"]
    assert whole_set(root).classes == ["composition1", "composition1+2"]


def test_classes_are_in_the_order_of_their_numbers(root):
    for path in root.glob("*/*/scene_info.json"):
        edit(path, lambda entries: [entry.update(carrier_id=(9, 10, 2)[i]) for i, entry in enumerate(entries.values())])
    assert whole_set(root, label="carrier").classes == ["carrier9", "carrier10"]


def test_parts_partly_outside_behind_unseen_or_small(root):
    def place(entries):
        entries["0"][0]["cam_t_m2c"] = [-360, -150, 1000]  # from -28 to 12 pixels
        entries["1"][0]["cam_t_m2c"] = [-420, -150, 1000]  # its right end is at 0: not a pixel of it is seen

    edit(root / "real_jaigo/000000/scene_gt.json", place)

    def hide(entries):
        entries["0"][0]["cam_t_m2c"] = [0, 0, -1000]
        entries["1"][0]["cam_t_m2c"] = [0, 0, 0]

    edit(root / "real_jaigo/000002/scene_gt.json", hide)
    every = whole_set(root, crop="object", min_crop_size=1)
    assert every.left_out == {"behind the camera": 2, "outside the image": 1} and len(every) == 33
    assert every.boxes[0].tolist() == [24, 0, 20, 12]
    assert whole_set(root, crop="object", min_crop_size=12).names == every.names
    large = whole_set(root, crop="object", min_crop_size=13)
    assert large.names == every.names[1:] and large.left_out["below data.min_crop_size=13"] == 1
    assert whole_set(root, crop="object").names == large.names
    refused(
        ["can be cut out", "2 behind the camera, 1 outside the image"],
        root=str(root),
        test_fraction=0,
        crop="object",
        min_crop_size=61,
    )


def test_boxes_end_with_the_image_on_the_right_and_below(root):
    def shift(entries):
        entries["0"][0]["cam_t_m2c"] = [300, 290, 1000]  # to 144 and 132 of 128 pixels

    edit(root / "real_jaigo/000000/scene_gt.json", shift)
    dataset = whole_set(root, crop="object", min_crop_size=8)
    assert dataset.boxes[0].tolist() == [112, 104, 16, 24]
    assert dataset.original(0).shape == (3, 16, 24)


def test_boxes_end_at_whole_pixels_around_the_part(root):
    def shift(entries):
        entries["0"][0]["cam_t_m2c"] = [-99, -151, 1000]  # 24.2 to 64.2, 23.8 to 43.8

    edit(root / "real_jaigo/000000/scene_gt.json", shift)
    assert whole_set(root, crop="object").boxes[0].tolist() == [23, 24, 21, 41]


def scene_of(name):
    return name.split("/")[1][:6]


@pytest.mark.parametrize(
    "about", [{}, {"crop": "object"}, {"label": "carrier"}, {"subsets": ("sim_jaigo_rand_light",)}]
)
def test_no_scene_is_on_both_sides(tmp_path, about):
    write_dimo(tmp_path, scenes=12)
    sides = {}
    for seed in range(3):
        train, test = (
            DIMO(split, 16, root=str(tmp_path), test_fraction=0.34, split_seed=seed, **about)
            for split in ("train", "test")
        )
        scenes = [{scene_of(name) for name in dataset.names} for dataset in (train, test)]
        assert not scenes[0] & scenes[1] and scenes[0] | scenes[1] == {f"{i:06d}" for i in range(12)}
        assert train.classes == test.classes == whole_set(tmp_path, **about).classes
        every = whole_set(tmp_path, **about)
        assert sorted(train.names + test.names) == sorted(every.names)
        assert train.left_out == {"kept for testing": len(test)} and test.left_out == {"kept for training": len(train)}
        again = DIMO("test", 16, root=str(tmp_path), test_fraction=0.34, split_seed=seed, **about)
        assert again.names == test.names
        sides[seed] = test.names
    assert len({tuple(names) for names in sides.values()}) > 1


def test_scenes_with_other_names_are_scenes_of_their_own(tmp_path):
    """`scene_3` is no variant of a scene called `scene`."""
    write_dimo(tmp_path, scenes=10)
    for folder in sorted((tmp_path / "real_jaigo").iterdir()):
        folder.rename(folder.with_name(f"scene_{int(folder.name)}"))
    about = {"root": str(tmp_path), "subsets": ("real_jaigo",)}
    train, test = (DIMO(split, 16, **about) for split in ("train", "test"))
    assert len(train) == 16 and len(test) == 4
    assert not {name.split("/")[1] for name in train.names} & {name.split("/")[1] for name in test.names}


def test_sub_sets_have_any_names_and_may_be_deeper(root):
    (root / "unpacked/again").mkdir(parents=True)
    (root / "real_jaigo").rename(root / "unpacked/real_jaigo_000-150")
    (root / "sim_jaigo_rand_light").rename(root / "@eaDir")  # of a network drive
    dataset = whole_set(root, crop="object")
    assert len(dataset) == 18 and dataset.matched.endswith("6 scenes of unpacked/real_jaigo_000-150")
    assert whole_set(root, subsets=("unpacked/real_jaigo_000-150",)).names == whole_set(root).names
    refused(
        ["data.subsets=real_jaigo is not in", "unpacked/real_jaigo_000-150"], root=str(root), subsets=("real_jaigo",)
    )


def test_only_the_chosen_sub_sets_are_read(root):
    (root / "sim_jaigo_rand_light/000003_07/scene_info.json").write_text("{")
    dataset = whole_set(root, subsets=("real_jaigo",))
    assert {name.split("/")[0] for name in dataset.names} == {"real_jaigo"} and len(dataset) == 12


def test_images_of_another_format_and_other_numbers(root):
    scene = root / "real_jaigo/000000"
    for name in ("gt", "camera", "info"):
        edit(scene / f"scene_{name}.json", lambda e: e.update({"12": e.pop("1"), "9": e.pop("0")}))
    shutil.rmtree(scene / "rgb")
    for name in ("12.jpg", "000009.png"):
        write(scene / "rgb" / name, np.full((128, 128), 7, np.uint8))
    names = [f"real_jaigo/000000/rgb/{name}" for name in ("000009.png#24,24,20,40", "12.jpg#24,26,20,40")]
    assert whole_set(root, crop="object").names[:2] == names
    (scene / "rgb/000009.png").rename(scene / "rgb/9.png")
    assert whole_set(root, crop="object").names[0] == "real_jaigo/000000/rgb/9.png#24,24,20,40"


HALF = {  # what is done to a scene: what the message names
    "no images": (lambda s: shutil.rmtree(s / "rgb"), ["no images in", "000001/rgb", "expected"]),
    "no poses": (lambda s: (s / "scene_gt.json").unlink(), ["scene_gt.json: No such file", "expected"]),
    "no camera": (lambda s: (s / "scene_camera.json").unlink(), ["scene_camera.json: No such file"]),
    "broken": (
        lambda s: (s / "scene_gt.json").write_text('{"0": [{"obj'),
        ["scene_gt.json: JSONDecodeError", "obj_id"],
    ),
    "empty": (lambda s: (s / "scene_camera.json").write_text(""), ["scene_camera.json: JSONDecodeError", "cam_K"]),
    "bytes": (lambda s: (s / "scene_gt.json").write_bytes(b"\xff\xfe\x00"), ["cannot read", "UnicodeDecodeError"]),
    "deep": (lambda s: (s / "scene_gt.json").write_text("[" * 100000), ["cannot read", "RecursionError"]),
    "list": (lambda s: (s / "scene_gt.json").write_text("[]"), ["scene_gt.json: AttributeError", "obj_id"]),
    "folder": (
        lambda s: [(s / "scene_gt.json").unlink(), (s / "scene_gt.json").mkdir()],
        ["cannot read", "scene_gt.json"],
    ),
    "no number": (lambda s: edit(s / "scene_gt.json", lambda e: e.update(a=[])), ["scene_gt.json of a: ValueError"]),
    "no pose": (
        lambda s: edit(s / "scene_gt.json", lambda e: e["1"][0].pop("cam_t_m2c")),
        ["of 1: KeyError('cam_t_m2c')"],
    ),
    "short": (
        lambda s: edit(s / "scene_camera.json", lambda e: e["0"]["cam_K"].pop()),
        ["of 0: ValueError", "9 numbers"],
    ),
    "NaN": (lambda s: edit(s / "scene_camera.json", lambda e: e["0"].update(cam_K=[float("nan")] * 9)), ["not finite"]),
    "unknown part": (
        lambda s: edit(s / "scene_gt.json", lambda e: e["0"][0].update(obj_id=7)),
        ["part 7", "it has 1, 2"],
    ),
    "fewer entries": (
        lambda s: edit(s / "scene_camera.json", lambda e: e.pop("1")),
        ["scene_camera.json says nothing of", "000001.png"],
    ),
    "no file": (lambda s: (s / "rgb/000001.png").unlink(), ["1 images that", "rgb/000001.png", "on_error=skip"]),
    "name": (lambda s: write(s / "rgb/view.png"), ["view.png is not called by a number"]),
    "twice": (lambda s: write(s / "rgb/1.png"), ["is not called by a number of its own"]),
    "camera that looks aside": (
        lambda s: edit(s / "scene_camera.json", lambda e: e["0"].update(cam_K=[200, 0, -1, 0, 200, 64, 0, 0, 1])),
        ["has its center at -1, 64"],
    ),
    "cameras of larger images": (
        lambda s: edit(s / "scene_camera.json", lambda e: e["0"].update(cam_K=[4000, 0, 1280, 0, 4000, 1024, 0, 0, 1])),
        ["has its center at 1280, 1024", "128 x 128 pixels"],
    ),
}


@pytest.mark.parametrize("about", HALF)
def test_half_of_a_scene_is_named(root, about):
    spoil, words = HALF[about]
    spoil(root / "real_jaigo/000001")
    refused(words, root=str(root), crop="object", test_fraction=0)


def test_half_of_a_set_is_named(root, tmp_path_factory):
    text = str(root)
    refused(["is not a folder", "expected"], root=f"{text}/nowhere")
    refused(["has no scenes, but nothing", "expected"], root=str(tmp_path_factory.mktemp("empty")))
    refused(["has no scenes, but models_info.json", "expected"], root=f"{text}/models")
    refused(["real_jaigo/models/models_info.json: No such file"], root=f"{text}/real_jaigo", crop="object")
    assert len(whole_set(root / "real_jaigo")) == 12  # whole images need no models
    edit(root / "models/models_info.json", lambda models: models["2"].pop("size_z"))
    refused(["models_info.json of 2: KeyError('size_z')", "min_x"], root=text, crop="object")
    (root / "sim_jaigo_rand_light/000004_07/scene_info.json").unlink()
    refused(["000004_07/scene_info.json: No such file"], root=text)
    edit(root / "real_jaigo/000002/scene_info.json", lambda e: [e["0"].pop("light_id"), e["1"].pop("light_id")])
    refused(
        ["000002/scene_info.json of 0", "carrier_id, composition_type, viewpoint_id", "light_id or light"],
        root=text,
        label="lighting",
    )


def test_parts_alone_need_no_scene_info(root):
    for path in root.glob("*/*/scene_info.json"):
        path.unlink()
    assert len(whole_set(root, crop="object")) == 36


def test_options_that_do_not_go_together(root):
    refused(["data.label=part", "data.crop=object"], root=str(root), label="part")
    refused(["data.min_crop_size", "data.crop=object"], root=str(root), min_crop_size=8)
    refused(["has no scene for test", "test_fraction=0"], split="test", root=str(root), test_fraction=0)


def test_a_set_with_carriers_only(root):
    for path in root.glob("*/*/scene_gt.json"):
        edit(path, lambda entries: [parts.__delitem__(slice(0, -1)) for parts in entries.values()])
    refused(["no part with a number below 100"], root=str(root), crop="object")


def test_a_class_of_one_scene_is_never_tested_on(root, tmp_path):
    """Part 2 lies beside part 1 in one scene, which no seed takes away from the training, but a file can."""
    for path in root.glob("*/*/scene_gt.json"):
        edit(path, lambda e: [parts.insert(0, dict(parts[0], obj_id=1)) for parts in e.values()])
        if path.parent.name[:6] != "000003":
            edit(
                path, lambda e: [part.update(obj_id=1) for parts in e.values() for part in parts if part["obj_id"] == 2]
            )
    for seed in range(20):
        train = DIMO("train", 16, root=str(root), crop="object", split_seed=seed)
        assert train.labels.unique().tolist() == list(range(len(train.classes))) and train.division.of("test")
    file = tmp_path / "hand.csv"
    rows = {f"{name},{'test' if '/000003' in name else 'train'}" for name in train.division.names}
    file.write_text("\n".join(["path,split", *sorted(rows)]))
    message = f"no scene of {root} with part2 is for training: give it one in data.splits"
    with pytest.raises(UserError, match=re.escape(message)):
        DIMO("train", 16, root=str(root), crop="object", splits=str(file))
    some = sorted(rows)[0].replace("train", "test")  # one image alone, of a scene with several
    file.write_text("\n".join(["path,split", some, *sorted(rows)[1:]]))
    with pytest.raises(UserError, match="in two splits"):
        DIMO("train", 16, root=str(root), crop="object", splits=str(file))


@pytest.mark.parametrize("crop", ["image", "object"])
def test_broken_and_missing_images_are_left_out_by_option(root, crop, capsys):
    first = root / "real_jaigo/000001/rgb/000000.png"
    first.write_bytes(first.read_bytes()[:100])
    (root / "real_jaigo/000001/rgb/000001.png").unlink()
    refused(["000001.png", "not there"], root=str(root), crop=crop, test_fraction=0)
    dataset = whole_set(root, crop=crop, on_error="skip")
    lost = 2 if crop == "image" else 4
    assert dataset.left_out == {"not readable": lost} and len(dataset) == {"image": 24, "object": 36}[crop] - lost
    assert not any("real_jaigo/000001" in name for name in dataset.names)
    said = capsys.readouterr().err
    assert "left out 2 of 24 images, not readable" in said and "000001/rgb/000000.png" in said
    write(root / "real_jaigo/000001/rgb/000001.png", np.zeros((128, 128), np.uint8))
    if crop == "object":  # its header can be read, and whoever decodes it is told
        broken = whole_set(root, crop=crop)
        with pytest.raises(UserError, match=r"000000\.png"):
            [broken[i] for i in range(len(broken))]


@pytest.mark.parametrize("normal", [1, 2])
def test_one_part_against_the_others(root, normal):
    about = {"root": str(root), "normal": normal, "test_fraction": 0.34}
    train, test = (DIMOOneVsAll(split, 16, **about) for split in ("train", "test"))
    assert {*train.defects} == {"good"} and {*test.defects} == {"good", f"part{3 - normal}"}
    assert not {scene_of(name) for name in train.names} & {scene_of(name) for name in test.names}
    scenes = {name.partition("/rgb/")[0] for name in test.names}
    assert test.matched.endswith(f", from {len(scenes)} scenes of real_jaigo, sim_jaigo_rand_light")
    assert not test.has_masks and train.left_out.keys() == {"kept for testing", "of other classes"}
    for i in range(len(train)):
        assert train[i][0].unique().tolist() == [100 * normal]
    for i in range(len(test)):
        image, mask, label, _ = test[i]
        part = normal if label == 0 else 3 - normal
        assert image.unique().tolist() == [100 * part] and not mask.any()
        assert test.original(i).shape == ((3, 20, 40) if part == 1 else (3, 60, 20))
    assert len({*test.names}) == len(test) and "#" in test.names[0] and "#" in test.full_name(0)
    refused(["part9", "part1, part2"], DIMOOneVsAll, root=str(root), normal=9)


def test_broken_images_of_one_part_against_the_others(root):
    about = {"root": str(root), "normal": 1, "test_fraction": 0.34}
    before = {split: DIMOOneVsAll(split, 16, **about).names for split in ("train", "test")}
    path = root / "real_jaigo/000001/rgb/000000.png"
    path.write_bytes(path.read_bytes()[:100])
    for split, names in before.items():
        kept = [name for name in names if not name.startswith("real_jaigo/000001/rgb/000000.png")]
        some = DIMOOneVsAll(split, 16, **about, on_error="skip")
        assert some.names == kept and some.left_out.get("not readable", 0) >= len(names) - len(kept)


def test_the_configuration_builds_it_and_batches_come_from_a_cache_file(root, tmp_path, monkeypatch, capsys):
    """Crops of one file have rows of their own, also once the boxes have changed."""
    monkeypatch.chdir(tmp_path)
    about = {"name": "dimo", "root": str(root), "size": 16, "crop": "object", "test_fraction": 0}
    rows = {}
    for change in (0, 50):
        if change:
            edit(root / "models/models_info.json", lambda models: models["1"].update(size_x=250))
        section = settled(config.build(DataConfig, about, "data."))
        dataset = build_dataset(section, "train")
        loader = Loader(dataset, 6, "cpu", cache="file")
        batches = list(loader.epoch(0))
        images = torch.cat([batch[0] for batch in batches])
        assert torch.equal(images, torch.stack([dataset[i][0] for i in range(len(dataset))]))
        rows[change] = images
    assert not torch.equal(rows[0], rows[50])
    assert "from 12 scenes of real_jaigo" in capsys.readouterr().err


def test_they_are_rows_of_the_table():
    assert DATASETS["dimo"] is DIMO and DATASETS["dimo_one_vs_all"] is DIMOOneVsAll


@pytest.mark.slow
def test_parts_are_pretrained_on_and_one_is_told_from_the_other(root, monkeypatch):
    """The table of scores names each part of an image."""
    monkeypatch.chdir(TOP)
    about = [f"data.root={root}", "data.size=32", "device=cpu", f"runs={root}/runs"]
    small = ["epochs=1", "optim.warmup_epochs=0", "batch_size=8", "augment.size=32", "precision=fp32", "sync_bn=false"]
    train_ssl.main(["configs/simclr_dimo.yaml", *about, *small])
    weights = f"backbone.weights={root}/runs/simclr_dimo/last.pt"
    train_anomaly.main(["configs/embedding_dimo.yaml", *about, "data.normal=1", weights, "data.test_fraction=0.34"])
    test = DIMOOneVsAll("test", 32, root=str(root), normal=1, test_fraction=0.34)
    with open(root / "runs/embedding_dimo/test_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [test.full_name(i) for i in range(len(test))]
    assert [row["defect"] for row in rows] == test.defects and all("#" in row["nearest_training_image"] for row in rows)
