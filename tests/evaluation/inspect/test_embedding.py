"""Points of a plane against scikit-learn and loops, and the projector's files."""

import csv

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from data.datasets.folder import ClassFolder
from evaluation.inspect.embedding import (
    draw,
    leave_one_out,
    principal_components,
    project,
    thumbnail,
    trust,
    tsne,
    unit,
)
from runtime.errors import UserError
from runtime.log import Log
from tests.images import write_classes


@pytest.mark.parametrize(("n", "d"), [(30, 6), (5, 12), (2, 3)])
def test_principal_components_are_scikit_learns(n, d):
    features = torch.randn(n, d, dtype=torch.float64)
    count = min(n, d, 4)
    points, shares = principal_components(features, 4)
    theirs = PCA(count, svd_solver="full").fit(features.numpy())
    rank = min(n - 1, d, count)  # centered, so the last of as many components as images is rounding
    np.testing.assert_allclose(
        points[:, :rank].numpy(), theirs.transform(features.numpy())[:, :rank], rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(shares.numpy(), theirs.explained_variance_ratio_, rtol=1e-9, atol=1e-12)


def test_equal_features_have_no_components():
    points, shares = principal_components(torch.ones(5, 3), 2)
    assert not points.any() and not shares.any()


@pytest.mark.parametrize("noise", [0.0, 1e-15])
def test_equal_features_have_points_nevertheless(noise):
    """Those of a collapsed network, of which scikit-learn's t-SNE alone died by a segmentation fault."""
    space = unit(torch.ones(12, 8) + noise * torch.randn(12, 8, dtype=torch.float64))
    points = tsne(space, perplexity=3, learning_rate=None, seed=0)
    assert points.shape == (12, 2) and points.isfinite().all() and len(points.unique(dim=0)) == 12
    numbers = trust(space, points, torch.arange(12) % 2)
    assert all(0 <= value <= 1 for value in numbers.values())


def test_unit_rows_keep_zeros():
    rows = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64))


def blobs():
    centers = 5 * torch.randn(3, 8, dtype=torch.float64)
    labels = torch.arange(60) % 3
    return centers[labels] + 0.3 * torch.randn(60, 8, dtype=torch.float64), labels


def test_tsne_is_scikit_learns_and_keeps_blobs_apart():
    features, labels = blobs()
    points = tsne(features, perplexity=7, learning_rate=80, seed=3)
    theirs = TSNE(perplexity=7, learning_rate=80, init="pca", random_state=3).fit_transform(features.numpy())
    np.testing.assert_array_equal(points.numpy(), theirs.astype(np.float64))
    assert leave_one_out(points, labels, 5) == 1.0
    with pytest.raises(UserError, match=r"perplexity=60 must be below the number of images, 60: 20, a third"):
        tsne(features, perplexity=60, learning_rate=None, seed=0)
    with pytest.raises(UserError, match="four images or more, and there are 3"):
        tsne(features[:3], perplexity=1, learning_rate=None, seed=0)


def vote_by_loop(points, labels, k):
    right = 0
    for i in range(len(points)):
        order = sorted(
            (j for j in range(len(points)) if j != i), key=lambda j: (float((points[i] - points[j]).norm()), j)
        )
        near = [int(labels[j]) for j in order[:k]]
        best = max(near.count(label) for label in near)
        right += next(label for label in near if near.count(label) == best) == int(labels[i])
    return right / len(points)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_leave_one_out_is_a_loop_with_ties(k):
    points = torch.randint(0, 4, (25, 2)).double()  # many at the same place, and many at equal distances
    labels = torch.randint(0, 3, (25,))
    assert leave_one_out(points, labels, k) == pytest.approx(vote_by_loop(points, labels, k))


def test_trust_is_high_where_the_plane_keeps_neighbors_and_low_at_random():
    features, labels = blobs()
    kept = trust(features, features[:, :2].clone(), labels)
    assert kept["trustworthiness"] == pytest.approx(
        trustworthiness(features.numpy(), features[:, :2].numpy(), n_neighbors=10)
    )
    random = trust(features, torch.randn(60, 2, dtype=torch.float64), labels)
    assert kept["knn_space"] == random["knn_space"] == 1.0 and random["knn"] < 0.6
    assert random["trustworthiness"] < 0.65 < kept["trustworthiness"]
    assert trust(features, features, labels)["trustworthiness"] == 1.0
    few = trust(features[:4], features[:4, :2], torch.zeros(4, dtype=torch.int64))  # one class, k = 1
    assert set(few) == {"trustworthiness"} and 0 <= few["trustworthiness"] <= 1


def test_images_are_drawn_over_all_sets(tmp_path):
    root = str(write_classes(tmp_path / "images", classes=2, each=12, size=16))
    sets = {name: ClassFolder(name, 16, root=root) for name in ("train", "test")}
    everything = draw(sets, 1000, 0)
    assert {name: its.tolist() for name, its in everything.items()} == {
        "train": list(range(24)),
        "test": list(range(8)),
    }
    some = draw(sets, 10, 1)
    assert sum(map(len, some.values())) == 10 and all((its.diff() > 0).all() for its in some.values())
    assert all(torch.equal(its, draw(sets, 10, 1)[name]) for name, its in some.items())
    assert len(draw(sets, 1, 0)) == 1  # a set without any drawn is left out


def test_the_sprite_has_each_image_at_the_place_of_its_row(tmp_path):
    root = write_classes(tmp_path / "images", classes=2, each=2, size=24)
    for number, path in enumerate(sorted((root / "train").rglob("*.png"))):
        Image.new("RGB", (24, 12), (40 * number, 7, 9)).save(path)
    dataset = ClassFolder("train", 16, root=str(root))
    images = torch.stack([thumbnail(dataset, i) for i in range(4)])
    assert images.shape == (4, 3, 48, 48)
    features, log = torch.randn(4, 5, dtype=torch.float64), Log(tmp_path / "run", {})
    columns = {"class": dataset.kinds, "path": dataset.names}
    project(log, "images", features, columns, images)
    log.flush()
    folder = tmp_path / "run/00000/images"
    config = text_format.Parse((tmp_path / "run/projector_config.pbtxt").read_text(), ProjectorConfig())
    assert list(config.embeddings[0].sprite.single_image_dim) == [48, 48]
    sprite = np.asarray(Image.open(folder / "sprite.png").convert("RGB"))
    for number in range(4):  # row by row in a square of 2 x 2
        cell = sprite[number // 2 * 48 :, number % 2 * 48 :][:48, :48]
        assert (cell[12:36] == (40 * number, 7, 9)).all()  # twice the size of 24 x 12
        assert (cell[:12] == 128).all() and (cell[36:] == 128).all()
    with open(folder / "metadata.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["class"] for row in rows] == dataset.kinds and [row["path"] for row in rows] == dataset.names
    points = np.loadtxt(folder / "tensors.tsv")
    np.testing.assert_allclose(np.linalg.norm(points[0] - points[3]), (features[0] - features[3]).norm(), rtol=1e-5)
