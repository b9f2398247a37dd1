"""train_classifier.py as a person runs it: what it leaves, stages, an early end, killed and resumed, under torchrun."""

import json
import shutil
from math import isfinite

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

import scavenge
import train_classifier
from models.weights.load import load_weights
from runtime import checkpoint, config
from runtime.errors import UserError
from tests.images import write_classes
from tests.processes import kill_script, script
from tests.scripts.test_train_ssl_resume import interrupt_at
from tests.slow import leaving

MIXED = ["mix.mixup=0.4", "mix.cutmix=1", "label_smoothing=0.1"]
EARLY = ["early_stopping.patience=1", "early_stopping.min_delta=100"]  # no loss of these falls by 100
STAGES = ["unfreeze.head_epochs=1", "unfreeze.layer_epochs=1", "unfreeze.layers=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


def words(images, runs, *more):
    about = [f"data.root={images}", "data.size=33", "augment.size=33", "backbone=mobilenet_v2", "backbone.width=0.25"]
    about += [f"runs={runs}", "run_name=run", "epochs=3", "batch_size=8", "save_every=3", "device=cpu"]
    return config.overlay(["configs/demo/classifier_demo.yaml"], about, list(more))


def curves(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in line if key not in TIMES}


TIMES = ("speed/images_per_second", "speed/data_wait_share", "step")


def results_of(capsys) -> tuple[dict, str]:
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_a_run_leaves_everything_behind(images, tmp_path, capsys):
    """Its metrics are scikit-learn's, of the probabilities that `load_classifier` gives of the same files."""
    run = words(images, tmp_path, *MIXED, *STAGES, "head=mlp", "head.hidden=16", "head.dropout=0.2")
    train_classifier.main(run)
    results, err = results_of(capsys)
    folder = tmp_path / "run"
    assert results == json.loads((folder / "results.json").read_text())
    left = {"config.yaml", "last.pt", "metrics.jsonl", "confusion.png", "confused.png"}
    assert left <= {path.name for path in folder.iterdir()}
    assert (results["steps"], results["epochs"], results["tested_epoch"]) == (12, 3, 3)
    assert (results["n_train"], results["n_validation"], results["n_test"]) == (33, 3, 12)
    assert (results["chosen"], results["ended"]) == ("last epoch", "after all epochs")
    assert "layers of the backbone that learn in the end: 2 of 19\n" in err
    assert "33 of 36 images are learned from, 3 held out for validation (holdout=0.1)" in err
    points = curves(folder)
    assert [points[step, "layers"] for step in range(1, 13)] == [0] * 4 + [1] * 4 + [2] * 4
    assert {step for step, key in points if key == "validation/macro_f1"} == {4, 8, 12}
    assert points[12, "validation/loss"] == results["validation_loss"]

    classifier = as_trained(folder, batch_size=5)
    paths = sorted((images / "test").rglob("*.png"))
    truth = [classifier.classes.index(path.parent.name) for path in paths]
    found = classifier(paths)
    assert found.dtype == torch.float32 and found.shape == (12, 3) and not classifier.network.training
    torch.testing.assert_close(found.sum(1), torch.ones(12))
    guesses = found.argmax(1).tolist()
    assert results["top1"] == accuracy_score(truth, guesses)
    assert results["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert results["test_loss"] == pytest.approx(log_loss(truth, found.double().numpy()), rel=1e-5)
    assert results["top5"] is None  # of three classes
    array = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert torch.equal(classifier(array), found)

    train_classifier.main(run)  # finds the run done
    assert results_of(capsys)[0] == results


def as_trained(folder, **about):
    """The run's classifier without its temperature."""
    classifier = scavenge.load_classifier(folder, device="cpu", **about)
    classifier.state["calibration"]["temperature"] = None
    return classifier


def test_top5_is_scikit_learns(tmp_path, capsys):
    images = write_classes(tmp_path / "images", classes=7, each=4)
    train_classifier.main(words(images, tmp_path, "epochs=1", "loss=bce", "holdout=0", "unfreeze.layers=0"))
    results, err = results_of(capsys)
    classifier = as_trained(tmp_path / "run")
    paths = sorted((images / "test").rglob("*.png"))
    truth = [classifier.classes.index(path.parent.name) for path in paths]
    found = classifier(paths)
    assert ((found > 0) & (found < 1)).all() and not torch.allclose(found.sum(1), torch.ones(len(paths)))  # sigmoids
    assert results["top5"] == top_k_accuracy_score(truth, found.numpy(), k=5) and results["n_validation"] == 0
    each = [log_loss(np.array(truth) == c, found.double().numpy()[:, c], labels=[False, True]) for c in range(7)]
    assert results["test_loss"] == pytest.approx(np.mean(each), rel=1e-5)
    assert "validation: none" in err and "validation/loss" not in {key for _, key in curves(tmp_path / "run")}


def test_layers_that_never_learn_are_those_of_the_weights(images, tmp_path):
    """After four steps: the seven highest layers have moved, the rest not by a bit, statistics included."""
    torch.manual_seed(5)
    old = train_classifier.build_classifier(*sections(images, tmp_path), 3)[0]
    torch.save(old.backbone.state_dict(), tmp_path / "weights.pth")
    about = [
        "unfreeze.layers=7",
        "unfreeze.head_epochs=0",
        "epochs=1",
        f"backbone.weights={tmp_path}/weights.pth",
        "optim.weight_decay=0.1",
    ]
    train_classifier.main(words(images, tmp_path, *about))
    new = checkpoint.load(tmp_path / "run")["model"]
    moved = {name: not torch.equal(value, new[f"backbone.{name}"]) for name, value in old.backbone.state_dict().items()}
    assert [name for name, has in moved.items() if has and int(name.split(".")[1]) < 12] == []
    for number in range(12, 19):
        assert any(has for name, has in moved.items() if name.startswith(f"features.{number}."))
    again = train_classifier.build_classifier(*sections(images, tmp_path), 3)[0]
    report = load_weights(again.backbone, tmp_path / "run")  # for every script's backbone.weights
    assert "part backbone" in report
    assert torch.equal(again.backbone.features[18][0].weight, new["backbone.features.18.0.weight"])


def sections(images, runs):
    cfg = config.load(train_classifier.Config, words(images, runs))
    return cfg.backbone, cfg.head


@pytest.mark.parametrize("restore", leaving([True], [True, False]))
def test_early_stopping_ends_and_says_which_epoch_it_tested(restore, images, tmp_path, capsys):
    run = words(images, tmp_path, *EARLY, "epochs=9", f"early_stopping.restore={restore}")
    train_classifier.main(run)
    results, _ = results_of(capsys)
    assert (results["steps"], results["epochs"], results["ended"]) == (8, 2, "by early_stopping")
    assert results["chosen"] == ("lowest validation loss" if restore else "last epoch")
    assert results["tested_epoch"] == (1 if restore else 2)
    points, state = curves(tmp_path / "run"), checkpoint.load(tmp_path / "run")
    assert results["validation_loss"] == points[4 if restore else 8, "validation/loss"]
    assert state["step"] == 8 and max(step for step, _ in points) == 8
    train_classifier.main(run)
    assert results_of(capsys)[0] == results
    for name in ("results.json", "confusion.png"):  # as if killed before they were written
        (tmp_path / "run" / name).unlink()
    train_classifier.main(run)
    again, _ = results_of(capsys)
    assert again | {"seconds": 0} == results | {"seconds": 0}


def test_a_plateau_lowers_the_rate(images, tmp_path, monkeypatch):
    """Every second epoch, for a loss that stays the same."""
    monkeypatch.setattr(train_classifier, "validate", lambda *_: {"validation/loss": 1.0})
    about = [
        "plateau.patience=1",
        "plateau.factor=0.15",
        "optim.schedule=constant",
        "epochs=6",
        "optim.lr=0.1",
        "optim.backbone_lr=0.01",
    ]
    train_classifier.main(words(images, tmp_path, *about, "unfreeze.layers=1", "unfreeze.head_epochs=0"))
    points = curves(tmp_path / "run")
    rates = [points[step, "lr"] for step in range(4, 25, 4)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.015, 0.015, 0.00225])
    groups = checkpoint.load(tmp_path / "run")["optimizer"]["param_groups"]
    assert {round(group["lr"], 9) for group in groups} == {0.00225, 0.000225}


@pytest.mark.slow  # test_semi_supervised.py interrupts and resumes the same script quickly
@pytest.mark.parametrize(
    "more",
    [
        [*MIXED, *STAGES, "plateau.patience=0", "early_stopping.patience=2"],
        ["loss=focal", "optim=adamw", "head=mlp", "head.dropout=0.5"],
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(more, images, tmp_path):
    script(["train_classifier.py", *words(images, tmp_path / "a", *more)])
    again = ["train_classifier.py", *words(images, tmp_path / "b", *more)]
    kill_script(again, tmp_path / "b" / "run" / "metrics.jsonl", 8)  # the checkpoint is of step 6
    assert checkpoint.load(tmp_path / "b" / "run")["step"] < 12
    script(again)
    whole, resumed = (checkpoint.load(tmp_path / x / "run") for x in "ab")
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert torch.equal(whole["bank"], resumed["bank"])
    for part in ("optimizer", "watch", "calibration"):
        assert str(whole[part]) == str(resumed[part]), part
    assert curves(tmp_path / "a" / "run") == curves(tmp_path / "b" / "run")


def test_killed_at_the_end_of_the_epoch_that_ends_it(images, tmp_path, monkeypatch, capsys):
    """The checkpoint says that the training has ended, though epochs are left."""
    run = words(images, tmp_path, *EARLY, "epochs=9")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_classifier, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_classifier.main(run)
    assert checkpoint.load(tmp_path / "run")["step"] == 8
    train_classifier.main(run)
    assert results_of(capsys)[0]["steps"] == 8


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(images, tmp_path):
    """Without BatchNorm, which sees a process's own images: mixed in pairs, unfrozen in stages, stopped together."""
    about = [
        *MIXED,
        *STAGES,
        "backbone=convnext_atto",
        "backbone.patch=4",
        "batch_size=12",
        "optim=sgd",
        "optim.lr=0.01",
    ]
    about = [word for word in about if word != "backbone.width=0.25"] + ["early_stopping.patience=2"]
    both = {
        n: script(["train_classifier.py", *without_width(words(images, tmp_path / str(n), *about))], processes=n)
        for n in (1, 2)
    }
    assert both[1]["steps"] == both[2]["steps"] == 6 and both[1]["confusion"] == both[2]["confusion"]
    one, two = (checkpoint.load(tmp_path / str(n) / "run")["model"] for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-6, msg=name)
    for key in ("validation_loss", "temperature", "threshold", "test_ece", "test_ece_uncalibrated"):
        assert both[1][key] == pytest.approx(both[2][key], rel=1e-4), key
    assert both[1]["temperature"] is not None


def without_width(words):
    return [word for word in words if not word.startswith("backbone.width")]


def test_a_set_with_a_split_for_validation_uses_it(tmp_path, capsys):
    root = write_classes(tmp_path / "images")
    rows = [path.relative_to(root) for path in sorted(root.rglob("*.png"))]
    folds = [("validation" if path.stem == "000" else "test") if path.parts[0] == "test" else "train" for path in rows]
    lines = [f"{path},{path.parent.name},{fold}" for path, fold in zip(rows, folds)]
    (root / "images.csv").write_text("\n".join(["path,label,split", *lines]))
    train_classifier.main(words(root, tmp_path, "data=table", "epochs=1"))
    results, err = results_of(capsys)
    assert (results["n_train"], results["n_validation"], results["n_test"]) == (36, 3, 9) and "held out" not in err
    assert {name[-7:] for name in checkpoint.load(tmp_path / "run")["validation"]} == {"000.png"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["augment=simclr"], "a classifier sees one view of an image, and augment=simclr makes 2: use augment=crop"),
        (["backbone.num_classes=3"], r"backbone\.num_classes=3: head makes the classes"),
        (["holdout=0", "plateau.patience=2"], r"need validation images, and holdout=0\.0 leaves none"),
        (["mix.mixup=1", "batch_size=7"], "mix takes images in pairs: batch_size=7 must be an even number"),
        (["mix.mixup=0"], r"mix needs mix\.mixup or mix\.cutmix above 0"),
        (["unfreeze.head_epochs=4"], r"unfreeze\.head_epochs=4 is longer than epochs=3"),
        (["batch_size=99"], "33 images make no full batch of batch_size 99"),
        (["data.size=16", "backbone=vit_tiny"], r"augment\.size=33: ViTTiny cuts images"),
        (["optim.backbone_lr=-1"], r"optim\.backbone_lr=-1 must be above 0"),
        (["batch_size=1", "data.size=8", "augment.size=8"], "batch_size=1 leaves one image per process"),
        (["head=conv"], "head.*one of: linear, mlp"),
        (["loss=hinge"], "one of: cross_entropy, bce, focal"),
        (["label_smoothing=1"], "label_smoothing=1 must be at least 0 and below 1"),
        (["data.tile=32"], r"data\.tile is for detectors"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(more, text, images, tmp_path):
    run = words(images, tmp_path, *more)
    with pytest.raises(UserError, match=text) as error:
        train_classifier.main(without_width(run) if "backbone=vit_tiny" in more else run)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_images_of_one_class(images, tmp_path):
    shutil.copytree(images / "train" / "class0", tmp_path / "one" / "only")
    with pytest.raises(UserError, match=r"all training images are of one: data\.root needs a folder for each"):
        train_classifier.main(words(tmp_path / "one", tmp_path))


def test_what_is_no_classifier(images, tmp_path):
    train_classifier.main(words(images, tmp_path, "epochs=1"))
    state = checkpoint.load(tmp_path / "run")
    for change, text in (
        (
            {"config": {k: v for k, v in state["config"].items() if k != "head"}},
            "holds no classifier: name a run folder",
        ),
        ({"classes": ["one"]}, "was edited: it has no names of classes"),
        ({"classes": ["a", "b", "c", "d"]}, r"does not fit its own config: model\.head"),
        ({"model": {}}, "does not fit its own config: .*is missing"),
    ):
        torch.save(state | change, tmp_path / "run" / "edited.pt")
        with pytest.raises(UserError, match=text) as error:
            scavenge.load_classifier(tmp_path / "run" / "edited.pt")
        assert len(str(error.value)) <= 300


def test_other_images_or_classes_do_not_resume(images, tmp_path, monkeypatch):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train_classifier.main(words(copy, tmp_path))
    (copy / "train" / "class0" / "000.png").unlink()
    with pytest.raises(UserError, match=r"training images .* changed since it began \(1 removed"):
        train_classifier.main(words(copy, tmp_path))
    with pytest.raises(UserError, match=r"unfreeze\.layers"):
        train_classifier.main(words(copy, tmp_path, "unfreeze.layers=3"))


@pytest.mark.slow
def test_it_learns(tmp_path, capsys):
    """Stripes of three directions, from random weights."""
    images = write_classes(tmp_path / "images", each=40)
    about = ["epochs=12", "batch_size=16", "augment.flip_p=0", "unfreeze.head_epochs=0", "optim.backbone_lr=none"]
    train_classifier.main(without_width(words(images, tmp_path, *about, "backbone=resnet18", "backbone.stem=cifar")))
    results, _ = results_of(capsys)
    assert results["top1"] >= 0.9 and isfinite(results["loss"])
