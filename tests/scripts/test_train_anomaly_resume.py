"""train_anomaly.py when a run resumes: its images are what they were, and the training before a fit is kept."""

import json
import shutil

import pytest
import torch
from PIL import Image

import train_anomaly
from models.anomaly import DETECTORS
from runtime import checkpoint
from runtime.config import overlay
from runtime.errors import UserError
from tests.images import write_mvtec
from tests.scripts.test_train_anomaly import METRICS, words
from tests.scripts.test_train_ssl_resume import interrupt_at


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("images"))


def test_a_run_does_not_go_on_with_other_images_or_lose_the_run_it_updates(images, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    run = words("patchcore", copy, tmp_path)
    train_anomaly.main(run)
    with pytest.raises(UserError, match=r"has other backbone weights"):  # before resume=never removes anything
        train_anomaly.main([*run, f"update={tmp_path}/run/last.pt", "resume=never", "seed=1"])
    first = (tmp_path / "run" / "last.pt").read_bytes()
    shutil.copy(copy / "part/train/good/000.png", copy / "part/train/good/0000.png")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(UserError, match=r"changed since it began \(1 added: part/train/good/0000\.png\).*with update="):
        train_anomaly.main(run)
    assert (tmp_path / "run" / "last.pt").read_bytes() == first


@pytest.mark.slow
def test_results_of_other_test_images_are_not_repeated(images, tmp_path, capsys):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    run = words("patchcore", copy, tmp_path)
    train_anomaly.main(run)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    broken = copy / "part/test/good/new.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"test images of .* changed since its results \(1 added: part/test/good/new\."):
        train_anomaly.main(run)
    (tmp_path / "run" / "results.json").unlink()  # as if the test had been killed: nothing is lost
    with pytest.raises(UserError, match=r"cannot read .*new\.png"):
        train_anomaly.main(run)
    broken.unlink()
    train_anomaly.main(run)
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: second[key] for key in METRICS} == {key: first[key] for key in METRICS}
    assert second["seconds_fit"] == first["seconds_fit"]  # it was not fitted again
    (copy / "part/test/good/000.png").unlink()
    with pytest.raises(UserError, match=r"1 removed: part/test/good/000\.png"):
        train_anomaly.main(run)
    shutil.copy(images / "part/test/good/000.png", copy / "part/test/good")
    train_anomaly.main(run)
    mask = copy / "part/ground_truth/spot/000_mask.png"
    Image.new("L", Image.open(mask).size, 255).save(mask)
    with pytest.raises(UserError, match=r"masks of the test images, .* changed since its results \(1 added: .*000_"):
        train_anomaly.main(run)


@pytest.mark.slow
def test_a_run_that_is_older_than_a_key_resumes_and_is_updated(images, tmp_path, capsys):
    run = words("patchcore", images, tmp_path)
    train_anomaly.main(run)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = tmp_path / "run" / "last.pt"
    state = checkpoint.load(last)
    for section, key in (("data", "white"), ("data", "masks"), ("detector", "neighbors")):
        del state["config"][section][key]
    torch.save(state, last)
    train_anomaly.main(run)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    updating = [f"update={last}", "run_name=updated"]
    train_anomaly.main(overlay(run, updating))
    with pytest.raises(UserError, match=r"fitted with detector\.neighbors=None, this config says 2: make them equal"):
        train_anomaly.main(overlay(run, updating, ["detector.neighbors=2", "run_name=other"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cflow", "cutpaste", "regad"])
def test_a_fit_that_fails_or_is_killed_does_not_lose_the_training_before_it(name, images, tmp_path, monkeypatch):
    """The training is not repeated, and the detector is that of a run without a stop."""
    monkeypatch.setattr(train_anomaly, "report", lambda *_, **__: {})
    train_anomaly.main(words(name, images, tmp_path / "a"))
    run = words(name, images, tmp_path / "b")
    for problem, text in (
        (
            UserError("out of luck"),
            "out of luck; the training is kept: detector.weights=.*last.pt epochs=0 fits it",
        ),
        (KeyboardInterrupt(), "^$"),
    ):
        with monkeypatch.context() as patch, pytest.raises(type(problem), match=text):
            patch.setattr(DETECTORS[name], "fit", lambda *_, problem=problem: (_ for _ in ()).throw(problem))
            train_anomaly.main(run)
        state = torch.load(tmp_path / "b" / "run" / "last.pt", weights_only=True)
        assert "calibration" not in state and state["fitted"] is False
    metrics = tmp_path / "b" / "run" / "metrics.jsonl"
    lines = metrics.read_text()
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)  # no step is made any more
        train_anomaly.main(run)
    assert metrics.read_text() == lines
    whole, resumed = (torch.load(tmp_path / x / "run" / "last.pt", weights_only=True) for x in "ab")
    assert whole["model"].keys() == resumed["model"].keys() and whole["step"] == state["step"]
    assert whole["calibration"] == resumed["calibration"]
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    # other options of the fit are set with the trained weights, as the error says
    more = [f"detector.weights={tmp_path}/b/run/last.pt", "epochs=0", "run_name=c"]
    train_anomaly.main(words(name, images, tmp_path, *more))


@pytest.mark.slow
def test_other_categories_and_a_fit_on_the_test_images_belong_to_the_run(images, tmp_path, monkeypatch):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    for name, more, image in (
        ("regad", ["data.size=32"], "other/train/good/000.png"),
        ("cflow", ["detector.normalize=test"], "part/test/spot/000.png"),
    ):
        run = words(name, copy, tmp_path, f"run_name={name}", "save_every=1", *more)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(2, patch)
            train_anomaly.main(run)
        (copy / image).rename(tmp_path / "kept.png")
        with pytest.raises(UserError, match=rf"that it learns from of .*1 removed: {image}"):
            train_anomaly.main(run)
        (tmp_path / "kept.png").rename(copy / image)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(1, patch)  # it would go on
            train_anomaly.main(run)


@pytest.mark.slow
def test_results_without_a_fitted_checkpoint_are_not_repeated(images, tmp_path, monkeypatch):
    """With epochs=0 there is no step to do, so a folder whose last.pt was removed looks finished by its steps alone."""
    monkeypatch.setattr(train_anomaly, "report", lambda *_, **__: {})
    train_anomaly.main(words("rd4ad", images, tmp_path / "trained", "epochs=1"))
    run = words("rd4ad", images, tmp_path, "epochs=0", f"detector.weights={tmp_path}/trained/run/last.pt")
    train_anomaly.main(run)
    (tmp_path / "run" / "last.pt").unlink()
    train_anomaly.main(run)
    assert (tmp_path / "run" / "last.pt").exists()
