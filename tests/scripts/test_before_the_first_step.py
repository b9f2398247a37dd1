"""What cannot work is found before a run begins, which leaves no folder then and no trace of the search else."""

import json

import pytest
import torch

import train_anomaly
import train_ssl
from runtime.errors import UserError
from tests.images import write_classes, write_mvtec
from tests.scripts import test_train_anomaly, test_train_ssl
from tests.slow import leaving


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("simclr", ["data.size=40", "augment.size=32", "VIT"], r"data\.size=40: ViTTiny .* 16 x 16 .*\(to 32, 48\)"),
        ("simclr", ["data.size=48", "augment.size=40", "VIT"], r"augment\.size=40: ViTTiny .*\(to 32, 48\)"),
        ("dino", ["data.size=48", "augment.size=32", "augment.local_crops=1", "augment.local_size=30", "VIT"],
         r"augment\.local_size=30: ViTTiny .*\(to 16, 32\)"),
        ("simclr", ["batch_size=1"], "simclr compares the images of a step .* batch_size=1 must be at least 2"),
        ("vicreg", ["batch_size=1"], "vicreg compares the images of a step"),
        ("byol", ["batch_size=1"], "batch_size=1 leaves one image per process and pass"),
        ("byol", ["batch_size=4", "accumulate=4"], "batch_size=4 leaves one image per process and pass"),
        ("moco_v2", ["batch_size=8", "method.splits=3"], r"method\.splits=3 does not divide the 8"),
        ("moco_v2", ["method.queue=7"], "a step makes 8 embeddings and the queue holds 7"),
        ("moco_v2", ["method.queue=15", "method.symmetric=true"], "a step makes 16 embeddings and the queue holds 15"),
        ("simclr", ["method.bank=15", "accumulate=4"], "a step makes 16 embeddings and the queue holds 15"),
        ("simclr", ["backbone.num_classes=3"], r"backbone\.num_classes=3: pretraining has no use for a classifier"),
        ("moco_v2", ["augment=patches", "augment.size=11", "augment.gap=1", "augment.jitter=0"],
         "method=moco_v2 cannot learn from augment=patches: use augment=moco"),
        ("patch_position", ["augment=simclr", "augment.size=24", "augment.views=9"],
         "method=patch_position cannot learn from augment=simclr: use augment=patches"),
        ("patch_position", ["augment.size=12"], "are too small|at least"),
        ("simclr", ["optim.warmup_epochs=10"], r"longer than epochs=3: set optim\.warmup_epochs=0\.3"),
        ("dino", ["method.warmup_teacher_epochs=30", "optim.warmup_epochs=4"],
         r"are longer than epochs=3: set optim\.warmup_epochs=0\.3 method\.warmup_teacher_epochs=0"),
        ("simclr", ["optim.schedule=steps", "optim.steps=60,80"], r"optim\.steps\[0\]=60 must be above 0 and below 1"),
        ("simclr", ["data.fit=squash", "data.resize=64"], r"set data\.resize=none"),
        ("simclr", ["spd=scar"], "too small for Scar"),
    ],
)  # fmt: skip
def test_pretraining_that_cannot_work(name, more, message, images, tmp_path):
    words = test_train_ssl.words(name, images, tmp_path, *(word for word in more if word != "VIT"))
    if "VIT" in more:
        words = [word for word in words if not word.startswith("backbone")] + ["backbone.name=vit_tiny"]
    if "augment=simclr" in more:
        words = [word for word in words if not word.startswith(("augment.gap", "augment.jitter"))]
    with pytest.raises(UserError, match=message):
        train_ssl.main(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["patch_position", "dino", "triplet", "revd"])
def test_one_image_per_pass_is_enough_where_nothing_needs_two(name, images, tmp_path):
    more = ["method.head_batch_norm=false"] if name == "dino" else []
    more += ["batch_size=1", "save.every=100", "log_every=100", "overfit=1", "epochs=2"]
    train_ssl.main(test_train_ssl.words(name, images, tmp_path, *more))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2


def test_an_old_run_outlives_a_command_that_cannot_work(images, tmp_path):
    words = test_train_ssl.words("simclr", images, tmp_path, "epochs=1")
    train_ssl.main(words)
    with pytest.raises(UserError, match="the queue holds 8"):
        train_ssl.main([*words, "resume=never", "method.bank=8"])  # which would remove it
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.slow
def test_warnings(images, tmp_path, capsys):
    train_ssl.main(test_train_ssl.words("moco_v2", images, tmp_path, "epochs=1", "augment.size=48", "method.queue=37"))
    said = capsys.readouterr().err
    assert "augment.size=48 is larger than data.size=36: views are enlarged" in said
    assert "method.queue=37 is longer than the training set of 33 images" in said and "set method.queue=16" in said
    about = ["epochs=1", "method.bank=60", "batch_size=16", "run_name=bank"]
    train_ssl.main(test_train_ssl.words("simclr", images, tmp_path, *about))
    assert "set method.bank=32" in capsys.readouterr().err  # a step makes 32
    about = ["epochs=1", "method.bank=33", "augment.size=36", "run_name=fine"]
    train_ssl.main(test_train_ssl.words("simclr", images, tmp_path, *about))
    said = capsys.readouterr().err
    assert "is larger than" not in said and "is longer than" not in said


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dino", ["method.head_batch_norm=true"]),
        pytest.param("moco_v2", ["method.splits=2"], marks=pytest.mark.slow),
        pytest.param("revd", ["backbone.drop_path=0.5"], marks=pytest.mark.slow),
    ],
)
def test_a_rehearsal_changes_no_bit(name, more, images, tmp_path, monkeypatch):
    train_ssl.main(test_train_ssl.words(name, images, tmp_path, "epochs=1", *more))
    monkeypatch.setattr(train_ssl, "rehearse", lambda *_, **__: [])
    train_ssl.main(test_train_ssl.words(name, images, tmp_path, "epochs=1", "run_name=without", *more))
    one, other = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("run", "without"))
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key
    assert str(one["optimizer"]) == str(other["optimizer"])


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("patchcore", ["backbone=vit_tiny", "data.size=72"], r"data\.size=72: ViTTiny .*\(to 64, 80\)"),
        ("patchcore", ["backbone=vit_tiny", "data.size=64,72"], r"data\.size=64,72: ViTTiny .*\(to 64, 80\)"),
        ("rd4ad", ["data.size=72"], r"set data\.size to a multiple of 32"),
        ("nsa", ["data.size=72"], r"set data\.size to multiples of"),
        ("regad", ["batch_size=1"], "no batch of one class has 2 images: raise batch_size"),
        ("rd4ad", ["optim.warmup_epochs=5"], r"longer than epochs=4: set optim\.warmup_epochs=0\.4"),
    ],
)
def test_a_detector_that_cannot_work(name, more, message, parts, tmp_path):
    with pytest.raises(UserError, match=message):
        train_anomaly.main(test_train_anomaly.words(name, parts, tmp_path, *more))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", leaving(["rd4ad", "cflow"], ["rd4ad", "cflow"]))
def test_a_rehearsal_changes_no_bit_of_a_detector(name, parts, tmp_path, monkeypatch):
    more = ["epochs=1", "batch_size=1"]
    train_anomaly.main(test_train_anomaly.words(name, parts, tmp_path, *more))
    monkeypatch.setattr("models.anomaly.detector.Detector.rehearse", lambda *_, **__: None)
    train_anomaly.main(test_train_anomaly.words(name, parts, tmp_path, *more, "run_name=without"))
    one, other = (torch.load(tmp_path / run / "last.pt", weights_only=True)["model"] for run in ("run", "without"))
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
