"""The scripts with `device=cuda` on a machine without a GPU: no operand on the wrong device, and within a training step
no value that the host reads. tests/pretended_cuda.py says how, and what only a GPU can show."""

import json
from unittest.mock import patch

import pytest
import torch

import eval as evaluate
import predict
import train_anomaly
import train_classifier
import train_ssl
from losses.pseudo_labels import PSEUDO_LABELS
from models.backbones import BACKBONES
from runtime.config import overlay
from tests.images import write_classes, write_mvtec
from tests.networks import FourStages
from tests.pretended_cuda import pretended_cuda
from tests.scripts import test_semi_supervised, test_train_anomaly, test_train_classifier, test_train_ssl
from tests.slow import leaving

# Files that read values of the device by design, none of them in every step: run.py, log.py and collapse.py read when a
# point of the curves is due, integrity.py when a checkpoint is, sheets.py after the first step, knn.py and features.py
# when it is evaluated.
CURVES = {"run.py", "log.py", "collapse.py", "sheets.py", "integrity.py"}
EVALUATION = {"features.py", "knn.py"}
COMPARED = {"bounds.py", "nearest.py"}  # at the end of a classifier, with the features of training images
# A detector is fitted and measured by whole sets, not by steps: one verdict per set on whether values are finite, the
# findings of each batch, and what the exact searches branch on (the coreset's pool, the candidates of the kNN).
EXAMINATION = {"detection.py", "bounds.py"}
READ = {
    "embedding": {"nearest.py"},
    "patchcore": {"nearest.py", "coreset.py", "patches.py", "bank.py", "patchcore.py"},
    "padim": {"padim.py"},
    "cutpaste": {"cutpaste.py", "gaussian.py"},
    "regad": {"padim.py", "regad.py"},
    "subspace": {"subspace.py"},
}
NEED_THEIR_OWN = {"cutpaste", "nsa", "rd4ad", "regad"}  # detectors that suit few backbones


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("parts"))


def on_cuda(main, words, *more):
    """Run the script on the pretended device; returns {(file, function): how often the host read a value there}."""
    with pretended_cuda() as cuda, patch("runtime.distributed.setup", lambda _: torch.device("cuda")):
        main(overlay(words, [*more, "device=cuda"]))
    return cuda.reads


@pytest.fixture
def small_backbone(monkeypatch):
    """Words that choose a backbone of few operations, for each one costs some 0.2 ms here."""
    monkeypatch.setitem(BACKBONES, "four_stages", FourStages)
    return ["backbone=four_stages"]


def without_backbone(words):
    return [word for word in words if not word.startswith("backbone")]


def test_what_a_gpu_would_refuse_is_refused_and_what_it_would_wait_for_is_counted():
    with pretended_cuda() as cuda:
        x = torch.arange(6.0, device="cuda").reshape(2, 3).requires_grad_()
        assert x.device.type == (x * 2).T.device.type == torch.zeros_like(x).device.type == "cuda" and x.is_cuda
        for wrong in (
            lambda: x + torch.ones(2, 3),
            lambda: torch.cat([x, torch.ones(1, 3)]),
            lambda: x @ torch.ones(3, 1),
            lambda: torch.nn.Linear(3, 1)(x),
            lambda: torch.index_select(x, 0, torch.tensor([0])),
            lambda: x.detach().numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError), match="device"):
                wrong()
        assert not cuda.reads
        (x * torch.tensor(2.0)).max(dim=1).values.sum().backward()  # a scalar may lie on the CPU
        assert x.grad.device.type == "cuda" and not cuda.reads
        assert x.grad.cpu().tolist() == [[0, 0, 2], [0, 0, 2]]
        assert float(x.sum()) == 15 and x[x > 3].shape == (2,) and len(x.detach().nonzero()) == 5
        assert x[torch.tensor([1])].device.type == "cuda"  # torch copies the index there
        assert sum(cuda.reads.values()) == 5, cuda.reads
    assert torch.ones(1).device.type == "cpu" and type(torch.nn.Linear(1, 1).weight) is torch.nn.Parameter


@pytest.mark.parametrize("name", leaving(test_train_ssl.HEAVY, test_train_ssl.TINY))
def test_a_step_of_pretraining_reads_nothing(name, classes, small_backbone, tmp_path, capsys):
    """Four steps with a point of the curves and a kNN evaluation at the end, checkpoint and all."""
    words = test_train_ssl.words(name, classes, tmp_path)
    words = words if name == "revd" else [*without_backbone(words), *small_backbone]
    reads = on_cuda(train_ssl.main, words, "epochs=1", "log_every=9", "save.every=9")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4
    assert {file for file, _ in reads} <= CURVES | EVALUATION
    assert reads["run.py", "read"] == 1


def test_a_step_of_fine_tuning_reads_nothing(classes, small_backbone, tmp_path, capsys):
    """Mixed, in stages, with validation after each epoch: twelve steps, of which three have a point of the curves."""
    more = [*test_train_classifier.MIXED, *test_train_classifier.STAGES, "early_stopping.patience=2", "save_every=9"]
    words = [*without_backbone(test_train_classifier.words(classes, tmp_path, *more)), *small_backbone]
    reads = on_cuda(train_classifier.main, words, "log_every=9")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 12
    assert {file for file, _ in reads} <= CURVES | EVALUATION | COMPARED | {"train_classifier.py"}, reads
    assert reads["train_classifier.py", "measure"] <= 2 * 5  # logits and labels of three validations and the end's two
    assert sum(count for (file, _), count in reads.items() if file == "nearest.py") <= 3 * 3  # three of a batch


@pytest.mark.parametrize("name", leaving({*PSEUDO_LABELS} - {"fixmatch"}, PSEUDO_LABELS))
def test_unlabelled_images(name, classes, small_backbone, tmp_path):
    """Dash looks at the labelled images once, self-training at all of them, in features.py."""
    about = ["ema=0.9", "semi.apart=true"] if name == "flexmatch" else []
    more = test_semi_supervised.run_of(name, classes, tmp_path, "save_every=9", "log_every=9", *about)
    reads = on_cuda(train_classifier.main, [*without_backbone(more), *small_backbone])
    assert {file for file, _ in reads} <= CURVES | EVALUATION | COMPARED | {"train_classifier.py"}, reads
    assert reads["train_classifier.py", "measure"] <= 2  # logits and labels at the end


@pytest.mark.parametrize("name", leaving(test_train_anomaly.HEAVY, test_train_anomaly.TINY))
def test_a_detector_reads_what_it_must(name, parts, small_backbone, tmp_path, capsys):
    more = ["epochs=1", "log_every=9"] if name in test_train_anomaly.BY_GRADIENT else []
    words = test_train_anomaly.words(name, parts, tmp_path)
    words = words if name in NEED_THEIR_OWN else [*without_backbone(words), *small_backbone]
    reads = on_cuda(train_anomaly.main, words, *more)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["detector"] == name
    assert {file for file, _ in reads} <= CURVES | EXAMINATION | {"detector.py"} | READ.get(name, set()), reads


@pytest.mark.slow
def test_numbers_are_those_of_the_cpu(classes, parts, tmp_path, capsys):
    """The pretended device computes with the CPU's kernels, so a difference is code that branches on the device."""
    for script, words in (
        (train_ssl, test_train_ssl.words("simclr", classes, tmp_path / "ssl", "epochs=1", "optim.lr=1e-30")),
        (train_anomaly, test_train_anomaly.words("patchcore", parts, tmp_path / "anomaly")),
    ):
        script.main(overlay(words, ["run_name=cpu"]))
        expected = json.loads(capsys.readouterr().out.splitlines()[-1])
        on_cuda(script.main, words, "run_name=cuda")
        results = json.loads(capsys.readouterr().out.splitlines()[-1])
        for key in {"loss", "knn20_top1", "threshold", "image_auroc", "pixel_ap"} & {*expected}:
            assert results[key] == pytest.approx(expected[key], rel=1e-5)


@pytest.mark.slow
def test_what_follows_training_runs_too(classes, parts, small_backbone, tmp_path, capsys):
    """kNN and linear evaluation of a backbone; a coreset updated with new images; prediction, whole and in tiles."""
    backbone = [f"data.root={classes}", "data.name=folder", "data.size=36", *small_backbone, f"runs={tmp_path}"]
    for task in (["task=knn"], ["task=linear", "task.epochs=2"]):
        on_cuda(evaluate.main, [*task, *backbone], "run_name=eval")
    words = [*without_backbone(test_train_anomaly.words("patchcore", parts, tmp_path)), *small_backbone]
    train_anomaly.main(words)
    on_cuda(train_anomaly.main, words, f"update={tmp_path}/run/last.pt", "run_name=updated", "holdout=0.1")
    for more in ([], ["tile=64", "overlap=32", "threshold=1"]):
        on_cuda(predict.main, [f"{tmp_path}/run", f"{parts}/part/test"], f"out={tmp_path}/out", *more)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 8
