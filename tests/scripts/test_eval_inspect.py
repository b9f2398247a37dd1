"""eval.py task=embedding, correspondence and segment: what they write, what they refuse, and a killed run resumed."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import scavenge
from evaluation.inspect.correspondence import mutual_matches, patches
from models.backbones.mobilenet import MobileNetV2
from runtime import checkpoint
from runtime.errors import UserError
from runtime.run import Run
from tests.images import write_classes, write_mvtec
from tests.processes import script

SMALL = [
    "backbone.name=mobilenet_v2",
    "backbone.width=0.35",
    "data.size=64",
    "batch_size=4",
    "data.workers=0",
    "device=cpu",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("mvtec"))


def results_of(words, tmp_path, capsys):
    evaluate.main([*words, *SMALL, f"runs={tmp_path}"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_embedding(images, tmp_path, capsys):
    words = ["task=embedding", "data.name=folder", f"data.root={images}"]
    found = results_of([*words, "perplexity=8"], tmp_path, capsys)
    folder = tmp_path / "eval/eval_embedding"
    assert (found["images"], found["classes"], found["split"]) == (48, 3, "all")
    assert {"trustworthiness", "knn", "knn_space"} == set(found["pca"]) == set(found["tsne"])
    with open(folder / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["class", "split", "path", "pca_x", "pca_y", "tsne_x", "tsne_y"] and len(rows) == 48
    assert [row["split"] for row in rows].count("test") == 12
    with open(folder / "00000/images/metadata.tsv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file, delimiter="\t")] == [row["path"] for row in rows]
    for name in ("points", "thumbnails"):
        assert Image.open(folder / f"{name}.png").width > 1000
    found = results_of([*words, "split=test", "images=9", "perplexity=2"], tmp_path / "test", capsys)
    assert found["images"] == 9
    with pytest.raises(UserError, match=r"split=.tset. is unknown.*one of: train, test"):
        evaluate.main([*words, *SMALL, "split=tset", f"runs={tmp_path}/wrong"])


@pytest.mark.slow
def test_correspondence_of_two_files_and_of_a_set(images, tmp_path, capsys):
    pair = [str(path) for path in sorted((images / "test/class0").iterdir())[:2]]
    words = ["task=correspondence", f"images={','.join(pair)}", "data.name=folder", f"data.root={images}"]
    found = results_of([*words, "point=10,20"], tmp_path, capsys)["pairs"][0]
    assert (found["first"], found["second"], found["patches"]) == (*pair, 64) and 0 < found["mutual"] <= 64
    assert found["point"] == [10, 20] and -1 <= found["its_cosine"] <= 1 and 0 <= found["found_in_mirror"] <= 1
    folder = tmp_path / "eval/eval_correspondence"
    with open(folder / "matches.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["mutual"]
    assert all(0 < float(row[f"{axis}_{side}"]) < 40 for row in rows for axis in "xy" for side in ("first", "second"))
    cosines = [float(row["cosine"]) for row in rows]
    assert cosines == sorted(cosines, reverse=True) and found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-3)
    assert Image.open(folder / "pair_1.png").height > 900  # with the map of the point
    found = results_of([*words[:1], *words[2:], "pairs=2"], tmp_path, capsys)["pairs"]
    assert len(found) == 2 and all(its["first"] != its["second"] for its in found)
    assert sorted(path.name for path in folder.glob("pair_*")) == ["pair_1.png", "pair_2.png"]
    same = results_of([words[0], f"images={pair[0]},{pair[0]}", *words[2:]], tmp_path, capsys)["pairs"][0]
    assert same["cosine"] == pytest.approx(1.0, abs=1e-5)  # not all 64: at the border patches may be equal


def test_what_correspondence_refuses(images, tmp_path):
    base = ["task=correspondence", "backbone.name=mobilenet_v2", f"runs={tmp_path}"]
    file = next((images / "test/class0").iterdir())
    for words, message in (
        ([], r"needs images=a.png,b.png, or a data set"),
        ([f"images={file}"], r"must be two files, a,b"),
        ([f"images={file},{tmp_path}/no.png"], r"no.png is not a file"),
        ([f"images={file},{file}", "point=40,3"], r"point=40,3 lies outside .*40 x 40"),
        ([f"images={file},{file}", "point=-1,3"], r"at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*base, *words, "backbone.width=0.35", "device=cpu"])


SEGMENT = [
    "task=segment",
    "data.name=mvtec",
    "data.category=part",
    "learn=test",
    "steps=6",
    "log_every=2",
    "save_every=3",
]
SEGMENT += ["stego.samples=4", "dim=8"]


@pytest.mark.slow
def test_segment_with_masks_a_kill_and_a_resume(parts, tmp_path, capsys, monkeypatch):
    words = [*SEGMENT, f"data.root={parts}", "linear=true"]
    found = results_of(words, tmp_path / "whole", capsys)
    assert (found["clusters"], found["n_learned"], found["n_tested"], found["steps"]) == (2, 8, 8, 6)
    for method in ("stego", "k_means", "all_normal", "linear"):
        its = found[method]
        assert its["miou"] == pytest.approx((its["iou"]["normal"] + its["iou"]["defect"]) / 2)
    masks = [np.asarray(Image.open(path)) > 0 for path in (parts / "part/ground_truth/spot").iterdir()]
    assert found["all_normal"]["accuracy"] == pytest.approx(1 - np.mean(masks) / 2, abs=0.01)  # half of the images
    folder = tmp_path / "whole/eval/eval_segment"
    assert Image.open(folder / "segments.png").width > 900

    real = Run.save

    def killed(self, done, **about):
        real(self, done, **about)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main([*words, *SMALL, f"runs={tmp_path}/killed"])
    assert checkpoint.load(tmp_path / "killed/eval/eval_segment/last.pt")["step"] == 3
    resumed = results_of(words, tmp_path / "killed", capsys)
    for key in ("loss", "stego", "k_means", "linear"):
        assert resumed[key] == found[key]
    one, other = (checkpoint.load(tmp_path / x / "eval/eval_segment/last.pt") for x in ("whole", "killed"))
    for part in ("head", "probe"):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
    again = results_of(words, tmp_path / "killed", capsys)  # done before: printed again
    assert again == resumed
    with pytest.raises(UserError, match="another config"):
        evaluate.main([*words, *SMALL, "stego.intra_shift=0.3", f"runs={tmp_path}/killed"])


@pytest.mark.slow
def test_segment_without_masks(images, tmp_path, capsys):
    words = ["task=segment", "data.name=folder", f"data.root={images}", "steps=3", "stego.samples=4", "clusters=3"]
    found = results_of(words, tmp_path, capsys)
    assert found["clusters"] == 3 and "stego" not in found and (tmp_path / "eval/eval_segment/segments.png").exists()
    with pytest.raises(UserError, match="learns from masks, and the test images have none"):
        evaluate.main([*words, *SMALL, "linear=true", f"runs={tmp_path}/large"])
    with pytest.raises(UserError, match="learn=train has 36 images, and a step needs batch_size=64"):
        evaluate.main([*words, *SMALL[:3], "batch_size=64", "device=cpu", f"runs={tmp_path}/large"])


@pytest.mark.slow
def test_two_processes_segment_as_one(parts, tmp_path):
    words = ["eval.py", *SEGMENT, f"data.root={parts}", *SMALL, f"runs={tmp_path}"]
    one, two = (script([*words, f"run_name={n}"], processes=n) for n in (1, 2))
    for method in ("stego", "k_means"):
        assert two[method]["miou"] == pytest.approx(one[method]["miou"], abs=1e-3)


@pytest.mark.slow
def test_the_same_from_python(images, tmp_path):
    network = MobileNetV2(width=0.35)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = scavenge.load_backbone(tmp_path / "weights.pth", name="mobilenet_v2", size=64, width=0.35, device="cpu")
    paths = sorted((images / "test").rglob("*.png"))
    maps = backbone.patches(paths)
    assert maps.shape == (12, sum(network.stage_channels[1:3]), 8, 8)
    assert torch.equal(backbone.patches(paths, (3, 2)), maps)
    found = backbone.correspondence(paths[:2])
    expected = mutual_matches(*(patches(some) for some in maps[:2]))
    assert all(torch.equal(*both) for both in zip(found, expected))
    with pytest.raises(ValueError, match="of two images, not of 3"):
        backbone.correspondence(paths[:3])
    points = backbone.plane(paths, perplexity=3)
    assert points.shape == (12, 2) and torch.equal(points, backbone.plane(paths, perplexity=3))
