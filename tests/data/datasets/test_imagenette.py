"""Imagenette: WordNet numbers, `val`, and what torchvision is asked to fetch."""

from urllib.error import URLError

import pytest
import torchvision

from data.datasets.folder import WORDS, Imagenette
from runtime.errors import UserError
from tests.data.datasets.layouts import write


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        for i, name in enumerate(WORDS):
            for k in range(count):
                write(tmp_path / f"imagenette2-160/{split}/{name}/{name}_{k}.JPEG", 20 * i)
    (tmp_path / "imagenette2-160/noisy_imagenette.csv").write_text("path\n")
    return tmp_path


def test_classes_are_words(root):
    train, test = (Imagenette(split, 8, root=str(root), version="160") for split in ("train", "test"))
    assert len(train) == 20 and len(test) == 10 and train.classes == test.classes and test.classes[5] == "French horn"
    assert test.labels.tolist() == list(range(10)) and abs(int(test[9][0][0, 0, 0]) - 180) < 3
    words = {name: names[0] for name, names in torchvision.datasets.Imagenette._WNID_TO_CLASS.items()}
    assert words == WORDS and list(words) == list(WORDS)


def test_half_present(root):
    with pytest.raises(
        UserError, match=r"there is no .*imagenette2/train: expected <root>/imagenette2/{train,val}/<Word"
    ):
        Imagenette("train", 8, root=str(root))
    (root / "imagenette2-160/val/n03028079").rename(root / "church")
    with pytest.raises(UserError, match=r"val has not the ten classes .*: n03028079 differ"):
        Imagenette("test", 8, root=str(root), version="160")


def test_download_is_torchvisions(root, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets, "Imagenette", lambda root, **about: asked.append((root, about)))
    Imagenette("test", 8, root=str(root), version="160", download=True)
    assert asked == []  # it is there
    with pytest.raises(UserError, match=r"there is no .*imagenette2-320/val"):
        Imagenette("test", 8, root=str(root), version="320", download=True)
    assert asked == [(str(root), {"size": "320px", "download": True})]

    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "Imagenette", fail)
    with pytest.raises(
        UserError, match=r"data\.download=true: cannot fetch the set into .*no network.*; unpack it there"
    ):
        Imagenette("test", 8, root=str(root), download=True)
