"""eval.py task=data: planted copies, damaged files, every layout, two processes, and a page that says so first."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluate
from data import opening
from data.duplicates import MOST_LEVELS
from data.image_files import find_images
from runtime.errors import UserError
from tests.attacks.hostile_images import KINDS, REFUSED
from tests.attacks.hostile_images import write as write_hostile
from tests.data.datasets.layouts import write_ad2, write_loco, write_visa
from tests.data.test_duplicates import surface
from tests.images import write_classes, write_mvtec
from tests.processes import script

NEU = Path(os.environ.get("SCAVENGE_DATA", "/nonexistent")) / "neu_steel"
TURNS = list(Image.Transpose)


def through_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def scaled(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


KINDS_OF_COPIES = {  # number -> what becomes of the image
    "exact": lambda image, _: image,
    "resized": lambda image, i: scaled(image, (0.5, 0.7, 1.5, 2)[i % 4]),
    "encoded": lambda image, i: through_jpeg(image, (40, 60, 80, 95)[i % 4]),
    "turned": lambda image, i: image.transpose(TURNS[i % len(TURNS)]),
    "turned and resized": lambda image, i: through_jpeg(scaled(image.transpose(TURNS[i % len(TURNS)]), 0.7), 60),
}


def look(words, tmp_path, capsys):
    evaluate.main(["task=data", *words, f"runs={tmp_path}/runs", "device=cpu"])
    out = capsys.readouterr()
    results = json.loads(out.out.splitlines()[-1])
    folder = tmp_path / "runs/eval/eval_data"
    assert results == json.loads((folder / "results.json").read_text())
    return results, folder


def plant(originals, folder, copies):
    """So many copies of each kind in turn, of the first originals: {name of the copy: the original's}."""
    folder.mkdir(parents=True, exist_ok=True)
    planted = {}
    for i, path in enumerate(originals[:copies]):
        kind = list(KINDS_OF_COPIES)[i % len(KINDS_OF_COPIES)]
        with Image.open(path) as image:
            KINDS_OF_COPIES[kind](image.convert("RGB"), i // len(KINDS_OF_COPIES)).save(folder / f"planted{i:03}.png")
        planted[f"planted{i:03}.png"] = path
    return planted


def found(folder):
    with open(folder / "copies.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] != row["other_split"]]


def check_planted(root, planted, folder):
    pairs = {os.path.basename(row["image"]): row for row in found(folder)}
    for name, original in planted.items():
        assert f"{root}/{pairs[name]['other_image']}" == original, name
        assert float(pairs[name]["distance"]) <= MOST_LEVELS
    return len(pairs) - len(planted)


def test_planted_copies_are_the_headline(tmp_path, capsys):
    root = tmp_path / "set"
    for split, numbers in (("train", range(20)), ("test", range(50, 56))):
        (root / split / "a").mkdir(parents=True)
        for i in numbers:
            surface(i).save(root / split / f"a/{i:02}.png")
    planted = plant(find_images(root / "train"), root / "test/a", 20)
    results, folder = look(["data.name=folder", f"data.root={root}"], tmp_path, capsys)
    assert check_planted(root, planted, folder) == 0
    assert results["problems"][0]["text"].startswith("20 images of test are also in train (4 exact, 16 near copies")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert "2_data/contact_sheets/a" in events.Tags()["images"] and "data/text_summary" in events.Tags()["tensors"]
    page = (folder / "report.html").read_text()
    assert page.index("20 images of test are also in train") < page.index("<h2")
    assert (folder / "report.md").read_text().index("also in train") < 400


@pytest.mark.slow
@pytest.mark.skipif(not NEU.is_dir(), reason="SCAVENGE_DATA is not set")
def test_200_copies_planted_into_steel(tmp_path, capsys):
    """None is missed, and of 1,417 images the only other pair is a real one."""
    paths = find_images(NEU)
    root = tmp_path / "set"
    for i, path in enumerate(paths):
        place = root / ("train" if i % 5 else "test") / Path(path).parent.name / Path(path).name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    trained = find_images(root / "train")
    planted = plant(trained[:: len(trained) // 200], root / "test/crazing", 200)
    assert len(planted) == 200
    results, folder = look(["data.name=folder", f"data.root={root}"], tmp_path, capsys)
    check_planted(root, planted, folder)
    with open(folder / "copies.csv", newline="") as file:
        pairs = [{Path(row[key]).name for key in ("image", "other_image")} for row in csv.DictReader(file)]
    others = [pair for pair in pairs if not any(name.startswith("planted") for name in pair)]
    assert others == [{"patches_101.jpg", "patches_105.jpg"}] and results["counts"]["test"]["crazing"] > 200


@pytest.mark.parametrize("kind", ["folder", "mvtec"])
def test_damaged_files_are_named(kind, tmp_path, capsys):
    """Also where one keeps the split from being made, as its mask is compared with it."""
    root = write_classes(tmp_path / "set") if kind == "folder" else write_mvtec(tmp_path / "set")
    place = root / ("test/class1" if kind == "folder" else "part/test/spot")
    (place / "cut.png").write_bytes((place / "000.png").read_bytes()[:60])
    (place / "empty.png").touch()
    if kind == "mvtec":
        for name in ("cut", "empty"):
            Image.new("L", (48, 48), 1).save(root / f"part/ground_truth/spot/{name}_mask.png")
    words = ["data.name=folder"] if kind == "folder" else ["data.name=mvtec", "data.category=part"]
    results, folder = look([*words, f"data.root={root}"], tmp_path, capsys)
    files = {os.path.basename(entry["image"]): entry["reason"] for entry in results["broken"]["files"]}
    assert set(files) == {"cut.png", "empty.png"} and files["empty.png"] == "the file is empty"
    assert results["problems"][0] == {"weight": "error", "text": "2 images of test cannot be read"}
    assert results["images"]["test"] == sum(results["counts"]["test"].values()) == (14 if kind == "folder" else 8)
    with open(folder / "images.csv", newline="") as file:
        rows = {os.path.basename(row["image"]): row for row in csv.DictReader(file) if row["split"] == "test"}
    assert rows["000.png"]["cannot_be_read"] == ""
    assert kind == "mvtec" or rows["cut.png"]["cannot_be_read"] == files["cut.png"]


def test_damaged_files_of_a_set_that_leaves_them_out(tmp_path, capsys):
    root = write_classes(tmp_path / "set")
    (root / "train/class1/bad.png").write_bytes(b"no image")
    for words in (["data.name=folder", f"data.root={root}", "data.on_error=skip"],
                  ["data.name=vessel_archive", f"data.root={root}", "data.min_side=8"]):  # fmt: skip
        results, _ = look(words, tmp_path, capsys)
        (entry,) = results["broken"]["files"]
        assert (entry["image"], entry["split"]) == ("train/class1/bad.png", "train")
        assert "not an image" in entry["reason"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged files
def test_200_hostile_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(opening, "total_memory", lambda: 2**30)  # of a small machine, whatever runs the tests
    root = write_classes(tmp_path / "set", classes=1)
    refused = set()
    for kind in list(KINDS):
        for i in range(5):
            path, expected = write_hostile(kind, i, root / "train/class0")
            if expected == REFUSED and path in map(Path, find_images(root / "train")):
                refused.add(path.name)
    results, _ = look(["data.name=folder", f"data.root={root}"], tmp_path, capsys)
    named = {os.path.basename(entry["image"]) for entry in results["broken"]["files"]}
    assert refused <= named and len(refused) >= 100
    assert not any("\n" in entry["reason"] for entry in results["broken"]["files"])


def test_anomaly_sets_and_what_is_missing(tmp_path, capsys):
    root = write_mvtec(tmp_path / "set")
    results, _ = look(["data.name=mvtec", f"data.root={root}", "data.category=part"], tmp_path, capsys)
    assert results["counts"] == {"train": {"good": 12}, "test": {"good": 4, "spot": 4}}
    share = 12 * 12 / 48**2  # of the square
    assert results["masks"] == {"test": {"spot": {"images": 4, "masks": 4, "blank": 0, "share": [share] * 3}}}
    mask = root / "part/ground_truth/spot/001_mask.png"
    Image.new("L", (48, 48)).save(mask)
    results, _ = look(["data.name=mvtec", f"data.root={root}", "data.category=part"], tmp_path, capsys)
    assert results["masks"]["test"]["spot"] | {"share": 0} == {"images": 4, "masks": 4, "blank": 1, "share": 0}
    assert "1 mask of test" in results["problems"][0]["text"]
    results, _ = look(["data.name=folder", f"data.root={root}/part/train/good"], tmp_path, capsys)
    assert results["images"] == {"train": 12}
    assert any(p["text"].startswith("no split test: ") and p["weight"] == "warning" for p in results["problems"])
    with pytest.raises(UserError, match="is not a folder"):
        look(["data.name=folder", f"data.root={tmp_path}/nothing"], tmp_path, capsys)
    root = write_classes(tmp_path / "classes", each=4)
    results, _ = look(["data.name=one_against_all", f"data.root={root}", "data.normal=class1"], tmp_path, capsys)
    assert results["counts"] == {"train": {"good": 4}, "test": {"good": 2, "class0": 2, "class2": 2}}


@pytest.mark.parametrize("name", ["visa", "mvtec_loco", "mvtec_ad2", "few_shot"])
def test_field_sets(name, tmp_path, capsys):
    root, words = tmp_path / "set", []
    if name == "visa":
        write_visa(root)
        words, images = ["data.category=candle"], {"train": 2, "test": 3}
    elif name == "mvtec_loco":
        write_loco(root / "part", size=24)
        words, images = ["data.category=part"], {"train": 6, "validation": 4, "test": 7}
    elif name == "mvtec_ad2":
        write_ad2(root / "can", size=24)
        images = {"train": 6, "validation": 4, "test": 5, "test_private": 2, "test_private_mixed": 1}
        words = ["data.category=can"]
    else:
        for category in ("part", "other"):
            write_mvtec(root, category=category)
        words, images = ["data.category=part", "data.shots=2"], {"train": 2, "test": 8, "others": 12}
    results, _ = look([f"data.name={name}", f"data.root={root}", *words], tmp_path, capsys)
    assert results["images"] == images and results["broken"]["count"] == 0
    assert not any("has no image" in problem["text"] for problem in results["problems"])
    assert sum(about["masks"] for about in results["masks"]["test"].values()) == {"few_shot": 4, "mvtec_loco": 4}.get(
        name, 2
    )


def test_tables_and_several_sets(tmp_path, capsys):
    root = write_classes(tmp_path / "set", classes=2, each=4)
    with open(root / "images.csv", "w") as file:
        file.write("path,label,split\n")
        for path in find_images(root):
            split, label, name = path.removeprefix(f"{root}/").split("/")
            file.write(f"{split}/{label}/{name},{label},{'val' if name == '003.png' else split}\n")
    results, _ = look(["data.name=table", f"data.root={root}"], tmp_path, capsys)
    assert results["images"] == {"train": 6, "validation": 2, "test": 4}
    sets = [f"data.sets.{name}.{key}" for name, kind in (("a", "folder"), ("b", "table"))
            for key in (f"name={kind}", f"root={root}")]  # fmt: skip
    results, _ = look(["data.name=mixed", *sets], tmp_path, capsys)
    assert results["images"] == {"train": 14, "test": 8}
    assert results["copies"]["within"]["train in train"]["exact"] == 6  # the same files, in both sets
    assert any("two classes" in problem["text"] for problem in results["problems"])


def test_one_image_and_a_class_without_any(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "one/a.png")
    results, folder = look(["data.name=folder", f"data.root={tmp_path}/one"], tmp_path, capsys)
    assert results["images"] == {"train": 1} and results["statistics"]["train"]["std"] == [0, 0, 0]
    assert (folder / "report.html").stat().st_size > 1000
    root = write_classes(tmp_path / "set", each=3)
    for path in (root / "test/class1").iterdir():
        path.unlink()
    (root / "test/class1").rmdir()
    results, _ = look(["data.name=folder", f"data.root={root}"], tmp_path, capsys)
    assert {"weight": "warning", "text": "test has no image of class1"} in results["problems"]
    for path in find_images(root):
        Path(path).write_bytes(b"")
    assert any((folder / "sheets").iterdir())
    results, _ = look(["data.name=folder", f"data.root={root}"], tmp_path, capsys)
    assert results["broken"]["count"] == 13 and results["statistics"] == {}
    assert not any((folder / "sheets").iterdir())


def test_two_processes_report_what_one_does(tmp_path):
    root = write_classes(tmp_path / "set", each=5)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65536, (20, 30)).astype(np.uint16)).save(root / "train/class0/deep.png")
    (root / "test/class1/bad.png").write_bytes(b"no image")
    (root / "test/class2/copy.png").write_bytes((root / "train/class2/001.png").read_bytes())
    words = ["eval.py", "task=data", "data.name=folder", f"data.root={root}", f"runs={tmp_path}", "device=cpu"]
    results = [script([*words, f"run_name={n}"], processes=n) for n in (1, 2)]
    assert results[0] == results[1] and results[0]["broken"]["count"] == 1
    assert results[0]["copies"]["across"]["test in train"]["exact"] == 1
    for name in ("report.html", "report.md", "images.csv", "copies.csv"):
        one, two = ((tmp_path / f"{n}/eval_data" / name).read_bytes() for n in (1, 2))
        assert one == two
