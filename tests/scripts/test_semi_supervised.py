"""train_classifier.py with images without labels: what a step is made of, every rule, killed and resumed, two processes
against one, and mistakes."""

import copy
import json
import re
import shutil

import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

import train_classifier
from data import build_dataset, settled
from data.augment.views import Augment
from data.splits import few_per_class
from losses.pseudo_labels import PSEUDO_LABELS
from models.backbones import BACKBONES
from models.classifier import build_classifier
from models.semi_supervised import SemiSupervised
from models.weights.load import load_weights
from runtime import checkpoint, config
from runtime.errors import UserError
from runtime.run import Run
from tests.images import write_classes
from tests.processes import kill_script, script
from tests.scripts.test_train_classifier import as_trained, curves, interrupt_at, results_of, words
from tests.slow import leaving
from training.ema import Averaged

FEW = ["labels_per_class=4", "batch_size=6", "semi.ratio=2", "epochs=2"]  # 12 of 36 labelled, 3 steps in an epoch
OFTEN = {"fixmatch": "semi.threshold=0.4", "flexmatch": "semi.threshold=0.5", "freematch": "semi.momentum=0.5"}
OFTEN |= {"dash": "semi.least=1", "self_training": "semi.threshold=0.34"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


def run_of(name, images, runs, *more):
    run = words(images, runs, *FEW, f"semi={name}", OFTEN[name], "unfreeze.head_epochs=0")
    return config.overlay(run, list(more))


def prepared(words):
    cfg = config.load(train_classifier.Config, words)
    return cfg, train_classifier.prepare_data(cfg, Run(cfg))


def test_a_draw_has_so_many_of_each_class_and_no_more():
    labels = torch.tensor([0] * 9 + [2] * 5 + [1] * 7)[torch.randperm(21)]
    drawn = few_per_class(labels, 5, 3)
    assert labels[drawn].bincount().tolist() == [5, 5, 5] and drawn.unique().tolist() == drawn.tolist()
    assert few_per_class(labels, 5, 3).tolist() == drawn.tolist() != few_per_class(labels, 5, 4).tolist()
    with pytest.raises(ValueError, match="class 2 has 5 items, fewer than 6"):
        few_per_class(labels, 6, 0)


def test_the_views_of_a_step(images, tmp_path):
    """Labelled ones first, then weak and strong views of the same unlabelled images; each by the hash alone."""
    cfg, data = prepared(run_of("fixmatch", images, tmp_path, "semi.cutout=0"))
    assert len(data.loader.indices) == 12 and len(data.semi.loader.indices) == 36 and data.epoch_steps == 3
    labels = data.loader.dataset.labels[data.loader.indices]
    assert labels.bincount().tolist() == [4, 4, 4] and len(data.loader) == 2
    batches, seen = data.batches(0), []
    for step in range(6):
        stored, labels, ids = next(batches)
        views, targets = data.views(stored, labels, ids, step)
        assert views.shape == (6 + 24, 3, 33, 33) and torch.equal(targets.argmax(1), labels)
        (expected,) = data.augment(stored, ids, step // 2)
        assert torch.equal(views[:6], expected)
        unlabelled = torch.stack([data.loader.dataset[i][0] for i in data.semi.ids])
        both = Augment(data.semi.augment.views, 0, data.loader.dataset.sizes, first=1)(
            unlabelled, data.semi.ids, step // 3
        )
        assert torch.equal(views[6:], torch.cat(both))
        weak, strong = data.semi.augment.views
        assert (strong.operations, strong.cutout, weak.operations) == (3, 0, 0) and not torch.equal(*both)
        seen.append(data.semi.ids)
    for epoch in (seen[:3], seen[3:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(36))  # each unlabelled image once
    again = SemiSupervised(cfg.semi, data.semi.loader, data.augment, 3, sizes=None, truth=None)
    again.views(4)
    assert torch.equal(again.ids, seen[4])  # from anywhere


def test_labelled_and_weak_views_of_an_image_are_drawn_apart(images, tmp_path):
    _, data = prepared(run_of("fixmatch", images, tmp_path))
    stored, ids = data.loader.dataset[5][0][None], torch.tensor([5])
    weak, _ = data.semi.augment(stored, ids, 0)
    assert not torch.equal(data.augment(stored, ids, 0)[0], weak)


def test_the_loss_is_the_sum_of_both(images, tmp_path):
    _, data = prepared(run_of("fixmatch", images, tmp_path, "semi.weight=0.5", "semi.threshold=0.6"))
    views, targets = data.views(*next(data.batches(0)), 0)
    logits = torch.randn(len(views), 3, generator=torch.Generator().manual_seed(0)).mul(2).requires_grad_()
    loss = data.loss(logits, targets)
    loss.backward()
    rows, extra, right = logits.detach().double(), 0.0, 0
    for number, (weak, strong) in enumerate(zip(rows[6:18].softmax(1), rows[18:].log_softmax(1))):
        if weak.max() >= 0.6:
            extra -= float(strong[weak.argmax()]) / 12
            right += int(weak.argmax() == data.loader.dataset.labels[data.semi.ids[number]])
    labelled = -(targets.double() * rows[:6].log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(float(labelled) + 0.5 * extra, rel=1e-6)
    assert logits.grad[6:18].abs().max() == 0 < logits.grad[18:].abs().max()
    kept = int((rows[6:18].softmax(1).amax(1) >= 0.6).sum())
    found = {key: float(value) for key, value in data.semi.curves().items()}
    assert 0 < kept < 12 and found == pytest.approx({"semi/kept": kept / 12, "semi/right": right / kept})


@pytest.mark.parametrize("apart", [False, True])
def test_whom_batch_norm_sees(apart, images, tmp_path):
    """All views of a step together, or strong ones by themselves, which then leave its running statistics alone."""
    _, data = prepared(run_of("fixmatch", images, tmp_path, f"semi.apart={apart}", "semi.warmup_epochs=1"))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    oracle, norm = copy.deepcopy(network), network[1]
    batches = data.batches(0)
    for step in range(4):  # three of the warm-up
        views, targets = data.views(*next(batches), step)
        logits = data.logits(network, views)
        parts = views.split([18, 12]) if apart and step == 3 else [views]
        assert len(views) == (30 if step == 3 else 6) and len(targets) == 6
        assert torch.equal(logits[: len(parts[0])], oracle(parts[0]))
        assert torch.equal(norm.running_mean, oracle[1].running_mean)
        assert torch.equal(norm.running_var, oracle[1].running_var) and norm.num_batches_tracked == step + 1
    if apart:
        assert torch.equal(logits[18:], oracle(parts[1]))  # by a batch of their own
    logits.square().mean().backward()  # through both
    assert norm.weight.grad.abs().min() > 0 and norm.training and norm.track_running_stats


@pytest.mark.parametrize("name", leaving({*PSEUDO_LABELS} - {"flexmatch"}, PSEUDO_LABELS))
def test_every_rule_trains_and_is_resumed(name, images, tmp_path, monkeypatch):
    """Interrupted within an epoch, it ends with the weights, their average, the rule's state and the curves of a run in
    one go."""
    more = ["ema=0.6", "semi.apart=true"] if name in ("flexmatch", "fixmatch") else []
    more += ["semi.round_epochs=1"] if name == "self_training" else ["semi.warmup_epochs=1"] if name == "dash" else []
    train_classifier.main(run_of(name, images, tmp_path / "a", *more, "save_every=1"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train_classifier.main(run_of(name, images, tmp_path / "b", *more, "save_every=1"))
    assert 0 < checkpoint.load(tmp_path / "b" / "run")["step"] < 6
    train_classifier.main(run_of(name, images, tmp_path / "b", *more, "save_every=1"))
    whole, resumed = (checkpoint.load(tmp_path / x / "run") for x in "ab")
    assert ("learner" in whole) == ("ema=0.6" in more)
    for part in {"model", "learner", "semi"} & whole.keys():
        assert whole[part].keys() == resumed[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), key
    points = curves(tmp_path / "a" / "run")
    assert points == curves(tmp_path / "b" / "run")
    assert any(value > 0 for (_, key), value in points.items() if key == "semi/kept")
    if name == "flexmatch":
        assert (whole["semi"]["last"] >= 0).any()
    if name == "dash":
        assert whole["semi"]["first"] > 0 and whole["semi"]["steps"] == 3
        assert (3, "semi/kept") in points and points[3, "semi/kept"] == 0 < points[4, "semi/kept"]


@pytest.mark.slow
def test_the_average_is_what_is_tested_and_kept(images, tmp_path, capsys, monkeypatch):
    """It is that of the weights after every step, by a loop in float64, and what load_classifier loads; the steps are
    those of a run without it."""
    states, update = [], Averaged.update

    def recorded(averaged):
        update(averaged)
        states.append({name: value.clone() for name, value in averaged.trained.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(Averaged, "update", recorded)
        train_classifier.main(run_of("fixmatch", images, tmp_path / "a", "ema=0.6"))
    results, _ = results_of(capsys)
    train_classifier.main(run_of("fixmatch", images, tmp_path / "b"))
    state, plain = (checkpoint.load(tmp_path / x / "run") for x in "ab")
    cfg = config.load(train_classifier.Config, run_of("fixmatch", images, tmp_path / "c"))
    torch.manual_seed(cfg.seed)
    expected = {
        name: value.double() for name, value in build_classifier(cfg.backbone, cfg.head, 3)[0].state_dict().items()
    }
    for after in states:
        for name, value in after.items():
            expected[name] = 0.6 * expected[name] + 0.4 * value.double() if value.is_floating_point() else value
    assert len(states) == 6
    for name, value in state["model"].items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(state["learner"][name], plain["model"][name]), name
    classifier = as_trained(tmp_path / "a" / "run")
    paths = sorted((images / "test").rglob("*.png"))
    truth = [classifier.classes.index(path.parent.name) for path in paths]
    found = classifier(paths)
    assert results["test_loss"] == pytest.approx(log_loss(truth, found.double().numpy(), labels=[0, 1, 2]), rel=1e-5)
    backbone = BACKBONES["mobilenet_v2"](width=0.25)
    load_weights(backbone, tmp_path / "a" / "run")  # for every script's backbone.weights
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state["model"][f"backbone.{name}"]), name


@pytest.mark.slow
def test_early_stopping_keeps_the_best_average(images, tmp_path, capsys):
    """The validation images see the average, and the weights of the lowest loss are the average's."""
    more = ["ema=0.6", "holdout=0.2", "labels_per_class=none", "batch_size=8", "early_stopping.patience=1"]
    train_classifier.main(words(images, tmp_path, *more, "early_stopping.min_delta=9"))
    results, _ = results_of(capsys)
    assert (results["tested_epoch"], results["chosen"]) == (1, "lowest validation loss")
    points, state = curves(tmp_path / "run"), checkpoint.load(tmp_path / "run")
    first = min(step for step, key in points if key == "validation/loss")
    assert results["validation_loss"] == pytest.approx(points[first, "validation/loss"], rel=1e-6)
    kept = state["watch"]["weights"]
    assert all(torch.equal(value, kept[name]) for name, value in state["model"].items())
    assert any(not torch.equal(value, state["learner"][name]) for name, value in state["model"].items())


@pytest.mark.slow
def test_killed_and_resumed(images, tmp_path):
    script(["train_classifier.py", *run_of("flexmatch", images, tmp_path / "a", "epochs=4", "save_every=4")])
    again = ["train_classifier.py", *run_of("flexmatch", images, tmp_path / "b", "epochs=4", "save_every=4")]
    kill_script(again, tmp_path / "b" / "run" / "metrics.jsonl", 6)
    assert checkpoint.load(tmp_path / "b" / "run")["step"] < 12
    script(again)
    whole, resumed = (checkpoint.load(tmp_path / x / "run") for x in "ab")
    for part in ("model", "semi"):
        assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items())
    assert curves(tmp_path / "a" / "run") == curves(tmp_path / "b" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flexmatch", "freematch", "self_training"])
def test_two_processes_give_the_weights_of_one(name, images, tmp_path):
    about = ["backbone=convnext_atto", "backbone.patch=4", "optim=sgd", "optim.lr=0.01"]
    about += ["semi.round_epochs=1"] if name == "self_training" else ["ema=0.6", "semi.apart=true"]
    for n in (1, 2):
        run = [word for word in run_of(name, images, tmp_path / str(n), *about) if "backbone.width" not in word]
        script(["train_classifier.py", *run], processes=n)
    one, two = (checkpoint.load(tmp_path / str(n) / "run") for n in (1, 2))
    for part in {"model", "learner", "semi"} & one.keys():
        for key, value in one[part].items():
            torch.testing.assert_close(value, two[part][key], rtol=1e-4, atol=1e-6, msg=key)
    first, second = (curves(tmp_path / str(n) / "run") for n in (1, 2))
    for point, value in first.items():
        assert value == pytest.approx(second[point], rel=1e-3, abs=1e-6), point
    assert any(value > 0 for (_, key), value in first.items() if key == "semi/kept")


def test_unlabelled_images_of_a_folder(images, tmp_path, capsys, monkeypatch):
    """Without classes; no curve says what is right, and other images do not resume."""
    pool = tmp_path / "pool"
    pool.mkdir()
    for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
        shutil.copy(path, pool / f"{number}.png")
    more = ["unlabelled=folder", f"unlabelled.root={pool}", "unlabelled.size=40", "labels_per_class=none"]
    run = run_of("flexmatch", images, tmp_path, *more, "holdout=0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(5, patch)
        train_classifier.main(run)
    (pool / "3.png").rename(pool / "x.png")
    with pytest.raises(UserError, match=r"unlabelled images .* changed since it began"):
        train_classifier.main(run)
    (pool / "x.png").rename(pool / "3.png")
    train_classifier.main(run)
    results, err = results_of(capsys)
    assert results["n_train"] == 36 and results["steps"] == 6 and "semi: 36 images without labels" in err
    state = checkpoint.load(tmp_path / "run")
    assert len(state["unlabelled"]) == 36 and state["config"]["unlabelled"]["size"] == [40]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("semi/kept" in line and "semi/right" not in line for line in lines)


def test_few_labels_without_semi_are_a_baseline(images, tmp_path, capsys):
    """On the same labelled images as with it."""
    train_classifier.main(words(images, tmp_path, "labels_per_class=4", "batch_size=6", "epochs=1", "seed=3"))
    results, err = results_of(capsys)
    assert (results["n_train"], results["n_validation"]) == (12, 0) and "24 beyond labels_per_class=4" in err
    cfg, data = prepared(run_of("fixmatch", images, tmp_path / "x", "seed=3"))
    assert data.loader.indices.tolist() == checkpoint.load(tmp_path / "run")["learned"]
    assert build_dataset(settled(cfg.data), "train").names == data.names["names"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["labels_per_class=none"], "set labels_per_class=4, or unlabelled=folder"),
        (["labels_per_class=13"], "labels_per_class=13 must be at most 12, the training images of class0"),
        (["semi.ratio=7"], r"36 images without labels make no step of semi\.ratio=7 x batch_size=6"),
        (["loss=bce"], "loss=bce has none: set loss=cross_entropy"),
        (["semi.weight=-1"], r"semi\.weight=-1 must be at least 0"),
        (["semi.threshold=2"], r"semi\.threshold=2 must be"),
        (["semi=softmatch"], "one of: fixmatch, flexmatch, freematch, dash, self_training"),
        (["semi.warmup_epochs=2"], r"semi\.warmup_epochs=2 leaves none of epochs=2"),
        (["batch_size=15", "semi.ratio=2"], "12 images make no full batch of batch_size 15"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(more, text, images, tmp_path):
    with pytest.raises(UserError, match=text) as error:
        train_classifier.main(run_of("fixmatch", images, tmp_path, *more))
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_unlabelled_without_semi(images, tmp_path):
    more = ["unlabelled=folder", f"unlabelled.root={images}", "unlabelled.size=33"]
    with pytest.raises(UserError, match="unlabelled names images for semi, and there is none: set semi=fixmatch"):
        train_classifier.main(words(images, tmp_path, *more))


def test_a_mistake_in_unlabelled_names_its_keys(images, tmp_path):
    """The section's own, whether the set is opened or an image of it decoded; those of `data` keep theirs."""
    pool, root = tmp_path / "data.root", tmp_path / "nothing"
    shutil.copytree(images / "train" / "class0", pool)
    keys = ("name=folder", f"root={root}")
    for more, said in (
        (["unlabelled=folder", f"unlabelled.root={root}"], f"unlabelled.root={root}"),
        (["unlabelled=folder", f"unlabelled.root={pool}", "unlabelled.size=9,9,9"], "unlabelled.size=9,9,9 must"),
        (["unlabelled=mixed", *(f"unlabelled.sets.a.{key}" for key in keys)], f"unlabelled.sets.a.root={root}"),
    ):
        more = more if "unlabelled.size" in str(more) else [*more, "unlabelled.size=33"]
        with pytest.raises(UserError) as error:
            train_classifier.main(run_of("fixmatch", images, tmp_path, "labels_per_class=none", *more))
        assert said in str(error.value) and not re.search(r"(?<!/)data\.", str(error.value))
    broken = sorted(pool.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:60])
    more = [f"unlabelled.root={pool}", "unlabelled=folder", "unlabelled.size=33", "labels_per_class=none"]
    for name in ("fixmatch", "self_training"):
        with pytest.raises(UserError, match=r"data.root/.* \(unlabelled\.on_error=skip leaves such"):
            train_classifier.main(run_of(name, images, tmp_path / name, *more, "semi.ratio=1"))
    with pytest.raises(UserError, match=rf"data\.root={root}"):
        train_classifier.main(
            run_of("fixmatch", images, tmp_path, f"data.root={root}", *more, "unlabelled.on_error=skip")
        )
