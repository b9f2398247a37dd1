"""Hungarian matching against all permutations, IoU against loops, and what STEGO learns from."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from data import DataConfig, build_dataset
from data.loading import Loader
from evaluation.inspect.segmentation import (
    batch_numbers,
    clusters_of,
    confusion,
    counts_of,
    halves_with_masks,
    k_means,
    linear_probe,
    match,
    near_images,
    scores,
    some_patches,
)
from runtime.errors import UserError
from tests.images import write_mvtec


@pytest.mark.parametrize(("k", "n"), [(2, 2), (4, 4), (5, 3), (6, 2)])
def test_the_matching_is_the_best_of_all_permutations(k, n):
    for trial in range(10):
        counts = torch.randint(0, 4 if trial % 2 else 50, (k, n))  # small numbers tie
        assigned = match(counts)
        best = max(sum(int(counts[c, label]) for label, c in enumerate(chosen)) for chosen in permutations(range(k), n))
        assert sorted(x for x in assigned if x is not None) == list(range(n)) and len(assigned) == k
        assert sum(int(counts[c, label]) for c, label in enumerate(assigned) if label is not None) == best


def test_scores_are_those_of_a_loop_over_pixels():
    clusters, labels = torch.randint(0, 4, (3, 9, 9)), torch.randint(0, 2, (3, 9, 9))
    counts = counts_of(clusters, labels, 4, 2)
    for c in range(4):
        for label in range(2):
            assert counts[c, label] == int(((clusters == c) & (labels == label)).sum())
    found = scores(counts, ["normal", "defect"])
    predicted = torch.tensor([-1 if label is None else label for label in found["matching"]])[clusters]
    assert found["accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
    for label, name in enumerate(("normal", "defect")):
        both = ((predicted == label) & (labels == label)).sum() / ((predicted == label) | (labels == label)).sum()
        assert found["iou"][name] == pytest.approx(float(both))
    assert found["miou"] == pytest.approx(sum(found["iou"].values()) / 2)


class Bright:
    """A segmenter whose second cluster is what is brighter than 200."""

    centers = torch.zeros(2, 1)

    def __call__(self, images):
        return dict.fromkeys(("stego", "k_means"), (images[:, 0] > 200).long())


def test_padding_counts_in_no_cluster(tmp_path):
    root = write_mvtec(tmp_path, normal=1, size=32, width=24)
    options = {"root": str(root), "category": "part"}
    tested = build_dataset(DataConfig(name="mvtec", size=(32, 40), fit="pad", options=options), "test")
    expected = torch.zeros(2, 2, dtype=torch.int64)
    for i, (top, left, height, width) in enumerate(tested.geometry.regions(tested.sizes).tolist()):
        assert (height, width) == (32, 24)
        image, mask = (x[..., top : top + height, left : left + width] for x in (tested.image(i)[0], tested.mask(i)))
        for cluster in range(2):
            for label in range(2):
                expected[cluster, label] += ((image > 200) == cluster).logical_and(mask == label).sum()
    found = confusion(Bright(), Loader(tested, 3, "cpu"))
    assert torch.equal(found["stego"], expected) and expected.sum() == 8 * 32 * 24 and expected[1, 1] > 0


def test_a_class_without_pixels_has_no_iou_and_an_empty_cluster_none_right():
    found = scores(torch.tensor([[7, 0], [2, 0]]), ["normal", "defect"])
    assert found["iou"] == {"normal": 7 / 9, "defect": None} and found["miou"] == 7 / 9 == found["accuracy"]
    found = scores(torch.tensor([[90, 10], [0, 0]]), ["normal", "defect"], [0, 1])
    assert found["iou"] == {"normal": 0.9, "defect": 0.0} and found["accuracy"] == 0.9 and found["miou"] == 0.45


def test_near_images_are_those_of_a_loop():
    maps = torch.randn(9, 5, 3, 4)
    means = torch.stack([(m / m.norm(dim=0)).mean((1, 2)) for m in maps.double()])
    means = means / means.norm(dim=1, keepdim=True)
    near = near_images(maps, 3)
    for i in range(9):
        order = sorted((j for j in range(9) if j != i), key=lambda j: -float(means[i] @ means[j]))
        assert near[i].tolist() == order[:3]
    assert near_images(maps[:2]).tolist() == [[1], [0]]


def test_an_epoch_sees_each_image_once_and_steps_can_be_asked_for_alone():
    seen = [batch_numbers(10, 3, step, 5) for step in range(6)]
    for epoch in (seen[:3], seen[3:]):
        assert len({*torch.cat(epoch).tolist()}) == 9
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert torch.equal(batch_numbers(10, 3, 4, 5), seen[4]) and not torch.equal(batch_numbers(10, 3, 4, 6), seen[4])
    assert sorted(batch_numbers(4, 4, 1, 0).tolist()) == [0, 1, 2, 3]


def test_clusters_are_of_the_largest_cosine_after_interpolation():
    codes, centers = torch.randn(2, 4, 3, 2), torch.randn(5, 4)
    labels = clusters_of(codes, centers, (12, 8))
    large = F.interpolate(codes, (12, 8), mode="bilinear", align_corners=False)
    for b, y, x in ((0, 0, 0), (1, 11, 7), (0, 6, 3), (1, 2, 5)):
        cosines = F.cosine_similarity(large[b, :, y, x][None], centers)
        assert labels[b, y, x] == cosines.argmax()


def two_kinds():
    """Features of four images whose left half is of one kind and whose right half of another, and that half."""
    kinds, right = torch.randn(2, 6) * 3, torch.zeros(4, 6, 8, dtype=torch.bool)
    right[..., 4:] = True
    return kinds[right.long()].permute(0, 3, 1, 2) + 0.1 * torch.randn(4, 6, 6, 8), right


def test_k_means_and_the_linear_probe_find_two_kinds_of_patches():
    maps, right = two_kinds()
    labels = clusters_of(maps, k_means(maps, 2, 0), (6, 8))
    assert scores(counts_of(labels, right.long(), 2, 2), ["a", "b"])["miou"] == 1.0
    odds = linear_probe(maps[:2], right[:2], maps[2:], 0)
    assert odds.shape == (2, 6, 8) and torch.equal(odds > 0, right[2:])
    with pytest.raises(UserError, match="with and without a defect"):
        linear_probe(maps[:2], torch.zeros_like(right[:2]), maps[2:], 0)


def test_patches_are_rows_with_their_own_masks():
    maps = torch.arange(24.0).view(2, 1, 3, 4).repeat(1, 2, 1, 1)
    rows, other = some_patches(maps, 3), some_patches(maps[:, :1] * 2, 3)
    assert (
        rows.shape == (24, 2) and torch.equal(rows[:, :1] * 2, other) and sorted(rows[:, 0].tolist()) == list(range(24))
    )


def test_halves_have_defects_or_are_refused_before_anything_is_trained(tmp_path):
    root = write_mvtec(tmp_path, normal=1, size=32)
    tested = build_dataset(
        DataConfig(name="mvtec", size=(32,), options={"root": str(root), "category": "part"}), "test"
    )
    indices = torch.arange(len(tested))
    masks, defective, halves = halves_with_masks(tested, indices, (8, 8), 0)
    assert sorted(torch.cat(halves).tolist()) == indices.tolist()
    for half in halves:  # of each kind of image two
        assert sorted(tested.kinds[i] for i in half.tolist()) == ["good"] * 2 + ["spot"] * 2
    for i in range(len(tested)):
        for y in range(8):
            for x in range(8):
                assert defective[i, y, x] == (masks[i, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].float().mean() > 0.5)
    with pytest.raises(UserError, match="both halves of the test images: set linear=false"):
        halves_with_masks(tested, indices, (1, 1), 0)  # patches of which no defect is half
