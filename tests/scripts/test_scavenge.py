"""scavenge.py: what eval.py and predict.py say, from Python; docs/python.md runs as it stands."""

import csv
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import predict
import scavenge
import train_anomaly
import train_classifier
import train_ssl
from data import DataConfig, build_dataset
from data.geometry import Geometry
from data.loading import Loader
from data.normalize import normalization_of, normalize
from evaluation.features import extract
from evaluation.inspect.attention import attention
from models.backbones.build import BACKBONES
from models.backbones.resnet import ResNet18
from runtime import checkpoint, config, version
from runtime.errors import UserError
from tests.images import TOP, write_classes, write_mvtec


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """runs/ and images/ as docs/python.md names them, and the sets that the runs are of."""
    place = tmp_path_factory.mktemp("place")
    write_classes(place / "classes", each=6)
    write_mvtec(place / "mvtec")
    (place / "images").mkdir()
    for number, path in enumerate(sorted((place / "mvtec/part/test").rglob("*.png"))):
        os.link(path, place / "images" / f"{number}.png")
    about = [f"runs={place}/runs", "data.size=32", "device=cpu", "batch_size=4"]
    ssl = [f"data.root={place}/classes", "augment.size=24", "epochs=1", "run_name=simclr"]
    train_ssl.main([f"{TOP}/configs/demo/simclr_demo.yaml", *about, *ssl])
    anomaly = [f"data.root={place}/mvtec", "data.category=part"]
    train_anomaly.main([f"{TOP}/configs/demo/patchcore_demo.yaml", *about, *anomaly, "run_name=patchcore_own"])
    train_anomaly.main([f"{TOP}/configs/demo/embedding_demo.yaml", *about, *anomaly, "run_name=embedding"])
    classes = [f"data.root={place}/classes", "augment.size=32", "epochs=1", "run_name=classifier"]
    classes += ["unfreeze.head_epochs=1", "backbone=mobilenet_v2", "backbone.width=0.25"]
    train_classifier.main([f"{TOP}/configs/demo/classifier_demo.yaml", *about, *classes])
    return place


@pytest.fixture
def paths(place):
    return sorted((place / "images").glob("*.png"))


def test_the_documentation_runs_as_it_stands(place, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (TOP / "docs/python.md").read_text(), re.DOTALL)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [""])  # as in an interactive session
    names = {}
    for block in blocks:
        exec(block, names)
    out, err = capsys.readouterr()
    *lines, classes = out.splitlines()
    assert classes.startswith("['class") and names["probabilities"].shape == (8, 3)
    assert lines[0].startswith("torch.Size([8, 512]) [(8, 64, 8, 8), (8, 128, 4, 4), (8, 256, 2, 2), (8, 512, 1, 1)]")
    assert len(lines) == 1 + 8 + 1 and err == ""
    assert lines[-1].startswith("torch.Size([48, 48]) ") and Path(lines[-1].split()[-1]).is_file()
    assert [result.score for result in names["detector"](names["paths"])] == names["scores"]


@pytest.mark.parametrize("run", ["patchcore_own", "embedding"])
def test_results_are_the_rows_of_predict(run, place, paths, tmp_path):
    predict.main([f"{place}/runs/{run}", f"{place}/images", f"out={tmp_path}", "device=cpu"])
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    normals = checkpoint.load(place / "runs" / run)["calibration"]["scores"]
    results = scavenge.load_detector(place / "runs" / run, device="cpu")(paths)
    assert len(normals) == 12 and len(rows) == len(results) == 8
    for row, result in zip(rows, results):
        assert result.path == f"{place}/images/{row['path']}"
        assert (result.score, result.threshold) == (float(row["score"]), float(row["threshold"]))  # to the last bit
        assert result.is_anomalous == (row["is_anomalous"] == "1")
        assert result.p_value == (1 + sum(normal >= result.score for normal in normals)) / 13
        assert result.nearest_training_image == f"{place}/mvtec/{row['nearest_training_image']}"
        if run == "embedding":
            assert result.map is result.peak is None
        else:
            assert result.peak == (int(row["y"]), int(row["x"]))
            assert result.map.shape == (48, 48) and not result.map.is_inference()


def test_the_map_has_the_image_s_own_size(place, tmp_path):
    Image.open(place / "images/0.png").resize((70, 50)).save(tmp_path / "wide.png")
    detector = scavenge.load_detector(f"{place}/runs/patchcore_own/last.pt", threshold=0.0, device="cpu")
    (result,) = detector([str(tmp_path / "wide.png")])
    assert result.map.shape == (50, 70) and result.map.dtype == torch.float32
    assert result.is_anomalous and result.threshold == 0.0


def test_a_run_without_the_scores_of_its_normals_has_no_p_value(place, paths, tmp_path):
    state = checkpoint.read(place / "runs/patchcore_own")
    del state["calibration"]["scores"]
    torch.save(state, tmp_path / "last.pt")
    (result,) = scavenge.load_detector(tmp_path, device="cpu")(paths[:1])
    assert result.p_value is None and result.is_anomalous is not None


def test_features_are_those_of_eval(place):
    stored = checkpoint.load(place / "runs/simclr")["config"]
    dataset = build_dataset(config.build(DataConfig, stored["data"], "data."), "test")
    backbone = scavenge.load_backbone(place / "runs/simclr", device="cpu", batch_size=5)
    expected, _ = extract(backbone.network, Loader(dataset, 5, "cpu"))
    assert torch.equal(backbone(dataset.paths), expected)
    assert not backbone.network.training and not expected.requires_grad
    last = backbone.stages(dataset.paths)[-1]  # (N, D, h, w)
    assert torch.allclose(last.mean((2, 3)), expected, atol=1e-6)


def test_arrays_and_tensors_are_the_files(place, paths):
    backbone = scavenge.load_backbone(place / "runs/simclr", device="cpu")
    detector = scavenge.load_detector(place / "runs/patchcore_own", device="cpu")
    array = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])  # (8, 48, 48, 3)
    expected, results = backbone(paths), detector(paths)
    for images in (array, torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(backbone(images), expected)
        found = detector(images)
        assert [result.score for result in found] == [result.score for result in results]
        assert torch.equal(found[3].map, results[3].map) and found[3].path == "images[3]"


def test_published_weights_need_a_name(paths, tmp_path):
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    network.fc = torch.nn.Identity()
    backbone = scavenge.load_backbone(tmp_path / "weights.pth", name="resnet18", size=(32, 48), device="cpu")
    assert backbone.geometry == Geometry(32, 48) and backbone(paths).shape == (8, 512)
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(pixels / 255))
    assert torch.allclose(backbone(pixels), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"not a checkpoint of .*give the backbone: name='resnet50'"):
        scavenge.load_backbone(tmp_path / "weights.pth")


def test_mistakes(place, paths, monkeypatch):
    backbone = scavenge.load_backbone(place / "runs/simclr", device="cpu")
    array = np.zeros((2, 8, 8, 3), np.uint8)
    for images in (str(paths[0]), array[0], array.astype(np.float32), torch.zeros(2, 3, 8, 8), [array[0]], [1], None):
        with pytest.raises(ValueError, match=r"images must be a list of paths, a uint8 array \(N, H, W, 3\) or"):
            backbone(images)
    for images in ([], array[:0]):
        with pytest.raises(ValueError, match="there are no images"):
            backbone(images)
    with pytest.raises(UserError, match=r"cannot read image nowhere.png: there is no such file$"):
        backbone([*paths, "nowhere.png"])
    run, load_backbone, load_detector = place / "runs/patchcore_own", scavenge.load_backbone, scavenge.load_detector
    for call, text in (
        (lambda: load_backbone(run / "nothing"), "cannot read .*nothing"),
        (lambda: load_backbone(run, sise=3), "unknown key 'backbone.sise'"),
        (lambda: load_backbone(run, name="resnet81"), "did you mean 'resnet18'"),
        (lambda: load_detector(run / "nothing"), "has no last.pt"),
        (lambda: load_detector(place / "runs/simclr"), "without a detector"),
        (lambda: load_detector(run, precision="fp8"), "one of: fp32, bf16, fp16"),
        (lambda: load_detector(run, device="gpu"), "choose auto, cpu, cuda"),
        (lambda: load_detector(run, batch_size=0)(paths), "batch_size=0 must be at least 1"),
    ):
        with pytest.raises((UserError, ValueError), match=text):
            call()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA device"):
            load_detector(run, device="cuda")
    monkeypatch.setattr("runtime.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="one process"):
        load_detector(run)


def test_another_version_of_the_code_is_a_warning(place, monkeypatch, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scavenge.load_detector(place / "runs/patchcore_own", device="cpu")
    monkeypatch.setattr(version, "_PACKAGES", "00000000")
    with pytest.warns(UserWarning, match="made by another version of the code"):
        scavenge.load_detector(place / "runs/patchcore_own", device="cpu")
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_program_elsewhere_has_it_on_its_path(place, tmp_path):
    (tmp_path / "program.py").write_text(
        "import scavenge, sys\n"
        f"backbone = scavenge.load_backbone({str(place / 'runs/simclr')!r}, device='cpu')\n"
        f"print(tuple(backbone([{str(place / 'images/0.png')!r}]).shape))\n"
        "assert not any(name.startswith('models.ssl') for name in sys.modules)\n"
    )
    words = [sys.executable, "program.py"]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 512)\n", "")


def test_attention_is_of_one_image_at_a_time():
    """The maps of all blocks of a batch of large images would not fit into memory."""
    torch.manual_seed(0)
    network, seen = BACKBONES["vit_tiny"](patch=8, size=32).eval(), []
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    heads, rollout = attention(network, normalize(pixels, normalization_of(network)))
    network.patch_embed["proj"].register_forward_hook(lambda *call: seen.append(len(call[2])))
    found = scavenge.LoadedBackbone(network, Geometry(32, 32), torch.device("cpu"), 2).attention(pixels)
    assert found.heads.shape == (3, 3, 4, 4) and seen == [1, 1, 1]
    torch.testing.assert_close(found.heads, heads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.rollout, rollout, rtol=1e-4, atol=1e-6)


def test_grad_cam_is_bare_in_padding(tmp_path):
    torch.manual_seed(0)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 24, 3), np.uint8)).save(tmp_path / "high.png")
    geometry = Geometry(64, 64, "pad")
    backbone = scavenge.LoadedBackbone(ResNet18().eval(), geometry, torch.device("cpu"), 2)
    [result] = scavenge.grad_cam(backbone, [tmp_path / "high.png"])
    inside = geometry.inside(torch.tensor([[48, 24]]), "cpu")[0]
    assert (result.map[~inside] == result.map.min()).all() and result.map[inside].max() > result.map.min()


def test_grad_cam_is_what_the_task_measures(place, paths):
    detector = scavenge.load_detector(place / "runs/patchcore_own", device="cpu")
    for result, path in zip(scavenge.grad_cam(detector, paths[:2], normal=paths[0]), paths):
        assert result.path == str(path) and result.explains.startswith("anomaly score")
        assert result.map.shape == (32, 32) and result.faithfulness.faithfulness == pytest.approx(
            result.faithfulness.insertion - result.faithfulness.deletion
        )
    classifier = scavenge.load_classifier(place / "runs/classifier", device="cpu")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths[:2]])
    results = scavenge.grad_cam(classifier, pixels, class_name="class1")
    probabilities = classifier(pixels)[:, classifier.classes.index("class1")]
    found = [result.faithfulness.deletion_curve[0] for result in results]
    assert found == pytest.approx(probabilities.tolist(), abs=1e-5)
    backbone = scavenge.load_backbone(place / "runs/simclr", device="cpu")
    [result] = scavenge.grad_cam(backbone, [paths[1]], reference=paths[0])
    one, other = backbone(paths[:2])
    assert result.faithfulness.deletion_curve[0] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)))
    with pytest.raises(UserError, match="ResNet18 has none"):
        backbone.attention(paths)
