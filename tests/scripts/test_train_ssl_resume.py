"""What may change when a run of train_ssl.py resumes, and what may not."""

import json
import shutil

import pytest
import torch

import train_ssl
from runtime import checkpoint
from runtime.errors import UserError
from runtime.run import Window
from tests.images import write_classes
from tests.scripts.test_train_ssl import losses, words


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.mark.slow
def test_what_cannot_change_the_result_may_change_on_resume(images, tmp_path, monkeypatch):
    train_ssl.main(words("simclr", images, tmp_path / "a"))
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train_ssl.main(words("simclr", images, tmp_path / "b"))
    (tmp_path / "link").symlink_to(images)
    (tmp_path / "b").rename(tmp_path / "moved")
    own = ["data.cache=none", "data.workers=1", "log_every=2", "save.every=5", "save.keep_last=1"]
    own += [] if torch.cuda.is_available() else ["device=auto"]
    train_ssl.main(words("simclr", tmp_path / "link", tmp_path / "moved", *own))
    whole, resumed = (checkpoint.load(tmp_path / x / "run" / "last.pt") for x in ("a", "moved"))
    assert whole["model"].keys() == resumed["model"].keys() and str(whole["optimizer"]) == str(resumed["optimizer"])
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    assert sorted(losses(tmp_path / "moved" / "run")) == [1, 2, 3, 4, 5, 6, 8, 10, 12]  # 1 to 3 were before the kill
    for change in ("optim.lr=1", "save.best=true", "data.size=40", "eval_every=1"):
        with pytest.raises(UserError, match=change.partition("=")[0]):
            train_ssl.main(words("simclr", images, tmp_path / "moved", change))


@pytest.mark.slow
def test_a_run_does_not_resume_with_other_images(images, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train_ssl.main(words("simclr", copy, tmp_path))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    expected = sorted(str(path.relative_to(copy)) for path in (copy / "train").rglob("*.png"))
    assert state["names"] == expected and len(state["learned"]) == 33 and set(state["learned"]) < set(range(36))
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def refused(text):
        with pytest.raises(UserError, match=text):
            train_ssl.main(words("simclr", copy, tmp_path))
        assert (tmp_path / "run" / "last.pt").read_bytes() == before

    class0 = copy / "train" / "class0"
    shutil.copy(class0 / "000.png", class0 / "0000.png")
    refused(r"changed since it began \(1 added: train/class0/0000\.png\): choose another run_name, or resume=never")
    (class0 / "000.png").unlink()
    refused(r"\(1 added: train/class0/0000\.png; 1 removed: train/class0/000\.png\)")
    (class0 / "0000.png").rename(class0 / "000.png")
    train_ssl.main(words("simclr", copy, tmp_path))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 12
    before = (tmp_path / "run" / "last.pt").read_bytes()
    (class0 / "000.png").unlink()  # of a run that is done
    refused(r"changed since its results \(1 removed: train/class0/000\.png\)")
    train_ssl.main(words("simclr", copy, tmp_path, "resume=never"))


def interrupt_at(step, patch):
    """Ctrl-C in the given step of train_ssl.py or train_anomaly.py."""
    read, batches = Window.next, iter(range(1, step))

    def interrupted(window, loader):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return read(window, loader)

    patch.setattr(Window, "next", interrupted)
