"""Several sets as one: names of images and classes, merged and rare classes, balanced epochs, a training run."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import train_ssl
from data import DataConfig, build_dataset, settled
from data.loading import Loader
from runtime import config
from runtime.errors import UserError


def write(folder, value: int, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((6, 8, 3), value + i, dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def roots(tmp_path):
    """Set a: classes dent (3, 2), hole (4, 1) of train and test; set b: dent (2, 1), rust (1, 1)."""
    for split, counts in {"train": (3, 4, 2, 1), "test": (2, 1, 1, 1)}.items():
        for (name, value), count in zip(
            (("a/{}/dent", 10), ("a/{}/hole", 50), ("b/{}/dent", 90), ("b/{}/rust", 130)), counts
        ):
            write(tmp_path / name.format(split), value, count)
    return tmp_path


def section(roots, **more) -> DataConfig:
    sets = {name: {"name": "folder", "root": str(roots / name)} for name in "ab"}
    return config.build(DataConfig, {"name": "mixed", "size": 8, "sets": sets, **more})


def values_of(dataset) -> list[int]:
    return [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]


def test_sets_follow_one_another(roots):
    train, test = (build_dataset(section(roots), split) for split in ("train", "test"))
    assert train.classes == test.classes == ["a/dent", "a/hole", "b/dent", "b/rust"]
    assert train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] and test.labels.tolist() == [0, 0, 1, 2, 3]
    assert values_of(train) == [10, 11, 12, 50, 51, 52, 53, 90, 91, 130]
    assert train.names[0] == "a/train/dent/0.png" and train.names[-1] == "b/train/rust/0.png"
    assert len({*train.names}) == 10 and train.sizes.tolist() == [[6, 8]] * 10
    assert settled(section(roots, size="native")).size == (6, 8)


def test_classes_merge_by_short_or_full_name(roots):
    merged = build_dataset(section(roots, merge={"dent": "dent", "b/rust": "dent"}), "train")
    assert merged.classes == ["a/hole", "dent"] and merged.labels.tolist() == [1] * 3 + [0] * 4 + [1] * 3
    with pytest.raises(UserError, match=r"data\.merge: rst is no class"):
        build_dataset(section(roots, merge={"rst": "dent"}), "train")


def test_classes_with_few_training_images_leave_all_splits(roots):
    train, test = (build_dataset(section(roots, min_per_class=3), split) for split in ("train", "test"))
    assert train.classes == test.classes == ["a/dent", "a/hole"]
    assert train.labels.tolist() == [0] * 3 + [1] * 4 and test.labels.tolist() == [0, 0, 1]
    assert values_of(test) == [10, 11, 50] and train.left_out == {"of 2 classes with too few": 3}
    with pytest.raises(UserError, match=r"data\.min_per_class=5: the largest class has 4 images"):
        build_dataset(section(roots, min_per_class=5), "train")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, r"data\.sets is empty"),
        ({"a": {"name": "foldr", "root": "x"}}, r"data\.sets\.a\.name='foldr' is unknown"),
        ({"a": {"name": "folder"}}, r"missing key 'data\.sets\.a\.root'"),
        ({"a": {"name": "folder", "root": "nowhere"}}, r"data\.sets\.a\.root=nowhere is not a folder"),
        ({"a": "nowhere"}, r"data\.sets\.a"),
    ],
)
def test_mistakes(sets, message):
    with pytest.raises(UserError, match=message):
        build_dataset(config.build(DataConfig, {"name": "mixed", "size": 8, "sets": sets}), "train")


@pytest.mark.parametrize("counts", [(7, 2, 1), (3, 3, 3), (10,), (1, 1, 8, 13)])
def test_a_balanced_epoch_has_equally_many_of_each_class(counts):
    class Labels:
        labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return torch.zeros(3, 2, 2, dtype=torch.uint8), int(self.labels[i]), i

    loader = Loader(Labels(), sum(counts), "cpu", shuffle=True, balanced=True, cache="none")
    seen = []
    for epoch in range(4):
        ((_, labels, items),) = loader.epoch(epoch)
        found, times = Counter(labels.tolist()), Counter(items.tolist())
        assert len(found) == len(counts) and max(found.values()) - min(found.values()) <= 1
        for label in found:  # all of a class come before any comes again
            of_class = [times[i] for i in range(sum(counts)) if Labels.labels[i] == label]
            assert max(of_class) - min(of_class) <= 1
        seen.append(items.tolist())
    assert len({*map(tuple, seen)}) == 4 or len(counts) == sum(counts)
    ((_, _, again),) = loader.epoch(0)
    assert again.tolist() == seen[0]


def test_pretraining_on_two_sets(roots, tmp_path, capsys):
    sets = [word for n in "ab" for word in (f"data.sets.{n}.name=folder", f"data.sets.{n}.root={roots / n}")]
    more = [
        "data=mixed",
        *sets,
        "data.balanced=true",
        "data.size=32",
        "augment.size=32",
        "batch_size=4",
        "epochs=1",
        "holdout=0",
    ]
    train_ssl.main(
        [
            "configs/demo/simclr_demo.yaml",
            "backbone=mobilenet_v2",
            "backbone.width=0.25",
            *more,
            f"runs={tmp_path}",
            "run_name=run",
        ]
    )
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["steps"] == 2 and "simclr on 10 images" in err
