"""train_anomaly.py when something is wrong: too few images, NaN, a full disk, options that do not go together."""

import json
import shutil

import pytest
import torch
import torchvision
from PIL import Image

import train_anomaly
from models.anomaly import DETECTORS
from runtime.errors import UserError
from runtime.run import Window
from tests.images import write_mvtec
from tests.scripts.test_train_anomaly import BY_GRADIENT, HEAVY, TINY, words
from tests.slow import leaving


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda top: shutil.rmtree(top / "train"), "there are no images in"),
        (lambda top: (top / "ground_truth/spot/001_mask.png").unlink(), "has no mask"),
        (lambda top: Image.new("L", (9, 9)).save(top / "ground_truth/spot/001_mask.png"), "is 9 x 9"),
        (lambda top: (top / "train/good/003.png").write_bytes(b"no image"), "cannot read image"),
    ],
)
def test_bad_images_are_one_line(change, message, tmp_path):
    images = write_mvtec(tmp_path)
    change(images / "part")
    with pytest.raises(UserError, match=message):
        train_anomaly.main(words("patchcore", images, tmp_path))


@pytest.mark.parametrize("name", leaving(HEAVY, TINY))
@pytest.mark.parametrize("count", [1, 2])
def test_one_training_image_or_identical_ones(name, count, tmp_path, capsys):
    """Results, with a threshold where one can be had, or a line that says what to do; never a traceback."""
    images = write_mvtec(tmp_path, normal=1)
    if count == 2:
        shutil.copy(images / "part/train/good/000.png", images / "part/train/good/001.png")
    own = {"embedding": ["detector.k=1"], "cutpaste": ["batch_size=1", "detector.density=kde"]}
    own["regad"] = ["batch_size=2"]  # of the other category
    own = own.get(name, ["batch_size=1"] if name in BY_GRADIENT else [])
    run = words(name, images, tmp_path, "holdout=0", *own)
    train_anomaly.main(run)
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert results["n_train"] == count and results["image_auroc"] is not None
    # PatchCore's bank never needs a patch of the second copy, and without the first none would be left
    assert (results["threshold"] is None) == (count == 1 or name in BY_GRADIENT or name == "patchcore")
    assert err.count("no threshold: ") == (results["threshold"] is None)


def test_images_are_counted_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Window, "next", None)  # no step is made
    images = write_mvtec(tmp_path, normal=2)
    with pytest.raises(UserError, match=r"needs 3 training images for a covariance, there are 2: .*density=kde"):
        train_anomaly.main(words("cutpaste", images, tmp_path, "holdout=0", "batch_size=2"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gone", ["good", "spot"])
def test_a_test_set_of_one_class_has_no_figures_but_scores(gone, tmp_path, capsys):
    images = write_mvtec(tmp_path)
    shutil.rmtree(images / "part" / "test" / gone)
    train_anomaly.main(words("patchcore", images, tmp_path))
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["image_auroc"] is None and results["threshold"] > 0
    assert len((tmp_path / "run" / "test_scores.csv").read_text().splitlines()) == 5


def test_features_that_are_not_numbers_are_named(images, tmp_path, monkeypatch):
    monkeypatch.setattr("models.weights.load.is_finite", lambda _: True)  # which refuses such weights before
    weights = torchvision.models.resnet18().state_dict()
    weights["layer2.0.conv1.weight"][0] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    for name in ("patchcore", "embedding", "padim"):
        with pytest.raises(UserError, match="NaN"):
            train_anomaly.main(words(name, images, tmp_path, f"backbone.weights={tmp_path}/weights.pth"))


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_loss_that_is_no_number_stops_the_run(name, images, tmp_path, monkeypatch):
    monkeypatch.setattr("models.weights.load.is_finite", lambda _: True)  # which refuses such weights before
    weights = torchvision.models.resnet18().state_dict()
    weights["layer2.0.conv1.weight"][0] = torch.nan
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"the loss is nan by step 1 at lr .* there is no checkpoint yet"):
        train_anomaly.main(words(name, images, tmp_path, f"backbone.weights={tmp_path}/weights.pth"))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_full_disk_leaves_nothing_half_written(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.checkpoint.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        train_anomaly.main(words("patchcore", images, tmp_path))
    assert not list((tmp_path / "run").glob("last.pt*"))


def test_mistakes_are_one_line(images, tmp_path):
    def error(name, *more):
        with pytest.raises(UserError) as caught:
            train_anomaly.main(words(name, images, tmp_path, *more))
        return str(caught.value)

    assert "did you mean 'coreset'" in error("patchcore", "detector.corset=0.1")
    assert f"one of: {', '.join(DETECTORS)}" in error("patchcore", "detector.name=pdm")
    assert "nothing" in error("patchcore", "data.category=nothing")
    assert "detector.student='vgg' is unknown; one of: auto, resnet18" in error("rd4ad", "detector.student=vgg")
    assert "epochs=0: at least 1" in error("rd4ad", "epochs=0")
    assert "needs an optim section" in error("patchcore", "detector=rd4ad", "detector.image_score=max")
    sgd, best = ["optim.name=sgd", "optim.lr=0.1"], "detector.image_score=max"  # not PatchCore's own
    assert "data.name=mvtec has no split 'others'" in error("patchcore", "detector=regad", best, *sgd)
    assert "data.shots=13, but" in error("regad", "data.shots=13")
    for name, held in {"rd4ad": [1.0], "nsa": torch.ones(3), "cutpaste": torch.ones(3)}.items():
        torch.save(held, tmp_path / "strange.pt")
        assert "not a state_dict" in error(name, f"detector.weights={tmp_path}/strange.pt")
    torch.save({"bn": torch.ones(3), "decoder": torch.ones(3)}, tmp_path / "strange.pt")
    assert "does not fit RD4AD" in error("rd4ad", f"detector.weights={tmp_path}/strange.pt")
    assert "cannot read nowhere.pt" in error("patchcore", "backbone.weights=nowhere.pt")
