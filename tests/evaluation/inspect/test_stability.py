"""Shifts against a plain loop, neighboring frames by their names, and padding that is left alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import DataConfig, build_dataset
from data.loading import Loader
from evaluation.inspect.changed import corrupted, shifted
from evaluation.inspect.stability import between_frames, neighbors, under_shifts
from evaluation.inspect.subjects import Observed, changed_share, cosine
from evaluation.inspect.under_corruption import examples
from tests.images import write_classes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = write_classes(tmp_path_factory.mktemp("images"), classes=2, each=4, size=24)
    return build_dataset(DataConfig(name="folder", size=(16, 20), options={"root": str(root)}), "test")


class Means:
    """A subject that looks at the mean color of the upper left corner."""

    def look(self, loader, text):  # noqa: ARG002
        batches = list(loader.epoch(0))
        images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
        features = images[:, :, :4, :4].double().mean((2, 3))
        return Observed(features, features, labels)

    def decisions(self, observed):
        return observed.scores.sum(1) > 360


def test_a_shift_is_a_crop_of_the_mirrored_image(dataset):
    loader = Loader(dataset, 2, "cpu")
    images = torch.cat([b[0] for b in loader.epoch(0)])
    for down, right in ((3, 0), (-2, 0), (0, 5), (0, -1), (2, -3)):
        found = torch.cat([b[0] for b in shifted(loader, down, right).epoch(0)])
        for before, after in zip(images.numpy(), found.numpy()):
            padded = np.pad(before, ((0, 0), (8, 8), (8, 8)), mode="reflect")
            assert np.array_equal(after, padded[:, 8 - down : 24 - down, 8 - right : 28 - right])


def test_numbers_under_shifts_are_means_over_the_four_directions(dataset):
    loader, subject = Loader(dataset, 2, "cpu"), Means()
    clean = subject.look(loader, "")
    (row,) = under_shifts(subject, loader, clean, [3])
    seen = [subject.look(shifted(loader, *by), "") for by in ((3, 0), (-3, 0), (0, 3), (0, -3))]
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for s in seen for a, b in zip(clean[1], s[1])]
    changed = [bool(a.sum() > 360) != bool(b.sum() > 360) for s in seen for a, b in zip(clean[0], s[0])]
    assert row == {"shift": 3, "cosine": pytest.approx(np.mean(cosines)), "changed": pytest.approx(np.mean(changed))}


def test_frames_follow_each_other_by_number_within_a_video():
    names = ["a/f10.png", "b/f1.png", "a/f9.png", "a/f11.png", "c/x.png"]
    folders = SimpleNamespace(names=names, whole_groups=None)
    assert neighbors(folders).tolist() == [[2, 0], [0, 3]]
    groups = SimpleNamespace(names=names, whole_groups=["v", "v", "w", "v", "w"])
    assert neighbors(groups).tolist() == [[0, 3], [3, 1], [2, 4]]
    alone = SimpleNamespace(names=["a/1.png", "b/2.png"], whole_groups=None)
    assert neighbors(alone).shape == (0, 2)
    assert between_frames(Means(), alone, None) is None


def test_neighboring_frames_against_any_two():
    names = ["a/1", "a/2", "a/3", "b/1"]
    features = torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 0]])
    clean = Observed(torch.tensor([[400.0], [400], [1], [1]]), features, torch.zeros(4))
    found = between_frames(Means(), SimpleNamespace(names=names, whole_groups=None), clean)
    half = 0.5**0.5
    pairs = [half, 0, -1, half, -half, 0]  # of 1-2, 1-3, 1-4, 2-3, 2-4, 3-4
    assert found["pairs"] == 2 and found["changed"] == 0.5
    assert found["cosine"] == pytest.approx(half) and found["cosine_of_any_two"] == pytest.approx(sum(pairs) / 6)


def test_padding_stays_as_it_is(tmp_path):
    root = write_classes(tmp_path, classes=2, each=2, size=24)
    padded = build_dataset(DataConfig(name="folder", size=(16, 32), fit="pad", options={"root": str(root)}), "test")
    loader = Loader(padded, 3, "cpu")
    valid = padded.geometry.valid(padded.geometry.regions(padded.sizes))[:, None].expand(-1, 3, -1, -1)
    before = torch.cat([b[0] for b in loader.epoch(0)])
    changed = corrupted(loader, "gaussian_noise", 5, seed=0, constants=224)
    after = torch.cat([b[0] for b in changed.epoch(0)])
    assert 0 < valid.float().mean() < 1 and len(changed) == len(loader)
    assert torch.equal(after[~valid], before[~valid]) and (after[valid] != before[valid]).float().mean() > 0.8
    [(_, shown)] = examples(loader, ["gaussian_noise"], [5], seed=0, constants=224, published=None)
    assert torch.equal(shown, after[0])


def test_what_is_not_known_is_none():
    nothing = Observed(torch.zeros(2), None, torch.zeros(2))
    assert cosine(nothing, nothing) is None and changed_share(None, None) is None
