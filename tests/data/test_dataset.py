"""What the base class gives a layout that somebody adds: a table of images, from its file to both training scripts."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_anomaly
import train_ssl
from data import DATASETS, AugmentConfig, DataConfig, DefectConfig, build_dataset
from data.dataset import Dataset
from data.datasets.mvtec import MVTec
from data.geometry import Geometry
from data.loading import Loader
from runtime import config
from runtime.errors import UserError
from tests.data.csv_table import CSVTable
from tests.images import write_classes, write_mvtec

SCRIPT = ["data.size=32", "backbone=mobilenet_v2", "backbone.width=0.25", "batch_size=4", "device=cpu", "run_name=run"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """A category in MVTec layout, and images.csv that names its images in their order."""
    root = write_mvtec(tmp_path_factory.mktemp("mvtec"), normal=8)
    with open(root / "images.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["split", "file", "defect", "mask"])
        for split, defect, count in (("train", "good", 8), ("test", "good", 4), ("test", "spot", 4)):
            for i in range(count):
                mask = f"part/ground_truth/spot/{i:03}_mask.png" if defect == "spot" else ""
                rows.writerow([split, f"part/{split}/{defect}/{i:03}.png", defect, mask])
    return str(root)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    monkeypatch.setitem(DATASETS, "table", CSVTable)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_table_is_what_it_names(root, split):
    size = Geometry(24, 40, "pad")
    ours, theirs = CSVTable(split, size, root=root), MVTec(split, size, root=root, category="part")
    assert len(ours) == len(theirs) == 8 and ours.classes == theirs.classes and ours.defects == theirs.defects
    assert torch.equal(ours.labels, theirs.labels) and ours.labels.dtype == torch.int64
    assert torch.equal(ours.sizes, theirs.sizes) and torch.equal(ours.mask_known, theirs.mask_known)
    assert ours.names == theirs.names == [path[len(root) + 1 :] for path in ours.paths]
    for i in range(8):
        assert len(ours[i]) == len(theirs[i]) == (3 if split == "train" else 4)
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours[i], theirs[i]))


def test_pretraining_on_a_table(root, tmp_path):
    """The losses are those of the folder whose images, in the same order, the table names."""
    losses = {}
    for name, where in (("table", root), ("folder", f"{root}/part/train")):
        about = [f"data={name}", f"data.root={where}", f"runs={tmp_path / name}", "method=simclr", "method.out=8"]
        about += ["augment=simclr", "augment.size=24", "epochs=2", "optim=sgd", "optim.lr=0.1", "log_every=1"]
        about += ["data.test_fraction=0", "optim.warmup_epochs=0"] if name == "folder" else ["optim.warmup_epochs=0"]
        train_ssl.main(about + SCRIPT)
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses["table"]) == 4 and losses["table"] == losses["folder"]


def test_anomalies_of_a_table(root, tmp_path, capsys):
    """The results are those of the MVTec layout whose images the table names."""
    results = {}
    for name, options in (("table", []), ("mvtec", ["data.category=part"])):
        about = [f"data={name}", f"data.root={root}", *options, f"runs={tmp_path / name}", "detector=patchcore"]
        train_anomaly.main(about + SCRIPT)
        results[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
        for key in [key for key in results[name] if "second" in key]:
            del results[name][key]
    assert results["table"] == results["mvtec"] and {"aupro", "image_auroc"} <= results["table"].keys()


def test_the_splits_are_declared(root):
    section = config.build(DataConfig, {"name": "table", "root": root, "size": 8})
    with pytest.raises(UserError, match=r"^data\.name=table has no split 'others', which this needs: use few_shot$"):
        build_dataset(section, "others")
    with pytest.raises(UserError, match=r"has no split 'all', which this needs: use $"):
        build_dataset(section, "all")


def test_an_empty_split(tmp_path):
    (tmp_path / "images.csv").write_text("split,file,defect,mask\ntrain,0.png,good,\n")
    with pytest.raises(UserError, match=r"^data\.root=.* holds no image of the split 'test'$"):
        CSVTable("test", 8, root=str(tmp_path))


def test_broken_images_are_skipped_with_their_masks_and_the_rest_is_cached(root, tmp_path, capsys):
    for name in ("part", "images.csv"):
        (tmp_path / name).symlink_to(Path(root, name))
    broken = Path(root, "images.csv").read_text() + "test,broken.png,spot,\ntest,part/test/spot/001.png,dent,\n"
    (tmp_path / "broken.csv").write_text(broken)
    (tmp_path / "broken.png").write_bytes(b"none")
    test = CSVTable("test", 8, root=str(tmp_path), table="broken.csv", on_error="skip")
    assert test.left_out == {"not readable": 1} and "broken.png" in capsys.readouterr().err
    assert test.defects == ["good"] * 4 + ["spot"] * 4 + ["dent"] and test.mask_known.tolist() == [True] * 8 + [False]
    for cache in ("ram", "none"):
        [(images, masks, labels, indices)] = Loader(test, 9, "cpu", cache=cache).epoch(0)
        assert torch.equal(images, torch.stack([test.image(i) for i in range(9)]))
        assert (
            torch.equal(masks, torch.stack([test.mask(i) for i in range(9)]))
            and masks[4:8].any()
            and not masks[8].any()
        )
        assert labels.tolist() == [0] * 4 + [1] * 5 and indices.tolist() == list(range(9))


def test_a_mask_must_fit_its_image(root, tmp_path):
    Image.new("L", (4, 4), 255).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png is 4 x 4 .* but its image .*000\.png is 48 x 48"):
        Dataset("test", 8, root, [f"{root}/part/test/spot/000.png"], defects=["spot"], masks=[f"{tmp_path}/mask.png"])


def test_a_set_without_defects_tests_no_detector(tmp_path):
    root = write_classes(tmp_path / "classes", each=3, size=32)
    about = ["data=folder", f"data.root={root}", f"runs={tmp_path}/runs", "detector=patchcore"]
    with pytest.raises(UserError, match=r"data\.name=folder has no defects to find"):
        train_anomaly.main(about + SCRIPT)


@pytest.mark.parametrize(
    ("schema", "section", "known"),
    [
        (DataConfig, {"name": "folder", "on_error": "ignore"}, "fail, skip"),
        (DataConfig, {"name": "folder", "cache": "disk"}, "auto, device, ram, file, none"),
        (DataConfig, {"name": "folder", "resample": "nearest"}, "bilinear, bicubic, lanczos"),
        (DataConfig, {"name": "mvtec", "category": "part", "masks": "few"}, "all, some"),
        (AugmentConfig, {"name": "patches", "color": "gray"}, "drop, project, none"),
        (DefectConfig, {"name": "nsa", "gradients": "both"}, "source, mixed"),
    ],
)
def test_unknown_words_are_refused_by_the_configuration_alone(schema, section, known):
    (word,) = list(section.values())[-1:]
    more = {"root": "nowhere", "size": 8} if schema is DataConfig else {}
    with pytest.raises(UserError, match=rf"='{word}' is unknown; one of: {known}$"):
        config.build(schema, section | more)
