"""The published forms of PatchCore, each written out from its description in float64."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim
from torch import Tensor, nn

from models.anomaly.patchcore import PatchCore, anomalib_width, average_twice, linear_layer, sparse
from models.backbones.resnet import ResNet18
from tests.images import batches
from tests.models.anomaly.test_patchcore import distances, enlarge, farthest_points, plain_patches, stages, textures


def pool_1d(x: np.ndarray, width: int) -> np.ndarray:
    """(..., n) -> (..., width), adaptive average pooling as torch defines it."""
    n = x.shape[-1]
    edges = [(d * n // width, -(-(d + 1) * n // width)) for d in range(width)]
    return np.stack([x[..., low:high].mean(-1) for low, high in edges], axis=-1)


def amazon_patches(features: list[np.ndarray], side: int, width: int) -> np.ndarray:
    """[(B, C_i, H_i, W_i)] -> (B, H, W, width): unfold, enlarge per channel and offset, average, stack, average."""
    size, r, out = features[0].shape[2:], side // 2, []
    for image in range(len(features[0])):
        stacked = []
        for feature in features:
            padded = np.pad(feature[image], ((0, 0), (r, r), (r, r)))
            rows, columns = feature.shape[2:]
            offsets = [padded[:, y : y + rows, x : x + columns] for y in range(side) for x in range(side)]
            patches = np.stack(offsets, axis=1)  # (C, side^2, H_i, W_i)
            patches = enlarge(patches.reshape(-1, rows, columns), size)  # (C side^2, H, W)
            stacked.append(pool_1d(patches.transpose(1, 2, 0), width))
        out.append(pool_1d(np.concatenate(stacked, -1), width))
    return np.stack(out)


@pytest.mark.parametrize(
    ("channels", "width"), [((512, 1024), 1024), ((512, 1024), 100), ((32, 96), 1024), ((7, 5), 9)]
)
def test_amazons_aggregation_and_its_closed_form(channels, width):
    features = [torch.randn(2, channels[0], 6, 8), torch.randn(2, channels[1], 3, 4)]
    expected = amazon_patches([f.double().numpy() for f in features], 3, width)
    np.testing.assert_allclose(average_twice(features, 3, width).numpy(), expected, atol=2e-6)


def test_amazons_aggregation_of_three_stages_and_five_by_five_patches():
    features = [torch.randn(1, c, n, n) for c, n in ((4, 8), (8, 4), (16, 2))]
    expected = amazon_patches([f.double().numpy() for f in features], 5, 12)
    np.testing.assert_allclose(average_twice(features, 5, 12).numpy(), expected, atol=2e-6)


def test_projections_have_the_published_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform = linear_layer(1024, 128, generator)
    reference = nn.Linear(1024, 128, bias=False).weight
    assert uniform.shape == (1024, 128) and uniform.abs().max() <= 1 / 32
    assert uniform.std().item() == pytest.approx(reference.std().item(), rel=0.01)
    ours = sparse(1536, 295, generator)
    theirs = SparseRandomProjection(295, random_state=0).fit(np.zeros((2, 1536))).components_.toarray()
    assert set(np.unique(ours.numpy().round(6))) == set(np.unique(theirs.astype(np.float32).round(6)))
    assert (ours != 0).float().mean().item() == pytest.approx((theirs != 0).mean(), rel=0.05)
    for n in (10, 50_000, 160_000, 1_000_000):
        assert anomalib_width(n) == johnson_lindenstrauss_min_dim(n, eps=0.9)


def mean_of_starts_picks(points: np.ndarray, count: int, starts: list[int]) -> list[int]:
    """amazon's ApproximateGreedyCoresetSampler."""
    anchor, picks = distances(points, points[starts]).mean(1), []
    for _ in range(count):
        picks.append(int(anchor.argmax()))
        anchor = np.minimum(anchor, distances(points, points[picks[-1:]])[:, 0])
    return picks


def mirrored_blur(maps: np.ndarray, sigma: float = 4.0) -> np.ndarray:
    """anomalib's 33 x 33 Gaussian with torch's reflect padding, which scipy calls mirror."""
    offsets = np.arange(-16, 17)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    for axis in (0, 1):
        maps = convolve1d(maps, kernel / kernel.sum(), axis=axis, mode="mirror")
    return maps


def expected_findings(mode: str, model: PatchCore, train: Tensor, test: Tensor) -> tuple[list, list]:
    """Scores and maps of `mode` from the description alone, but for the projection's random numbers."""
    raw_train, raw_test = stages(model, train), stages(model, test)
    embed = amazon_patches if mode == "amazon" else plain_patches
    width = {"amazon": 1024, "anomalib": 10**9, "paper": 1024}[mode]
    patches = embed(raw_train, 3, width)
    flat = patches.reshape(-1, patches.shape[-1])
    seen = flat @ model.directions.double().numpy() if model.directions.numel() else flat
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(1)).tolist()
    count = int(0.1 * len(flat))
    picks = (
        mean_of_starts_picks(seen, count, order[:10]) if mode == "amazon" else farthest_points(seen, count, order[0])
    )
    bank = flat[picks]
    np.testing.assert_allclose(model.bank.entries.numpy(), bank, atol=1e-5)
    scores, maps = [], []
    for grid in embed(raw_test, 3, width):
        table = distances(grid.reshape(-1, bank.shape[1]), bank)
        worst, least = table.min(1).argmax(), table.min(1).reshape(grid.shape[:2])
        if mode == "amazon":
            scores.append(table.min(1).max() ** 2)
            enlarged = enlarge(least[None] ** 2, test.shape[2:])[0]
            maps.append(convolve(enlarged))
            continue
        around = distances(bank[table[worst].argmin()][None], bank)[0].argsort()[:9]
        weight = 1 - np.exp(table[worst].min()) / np.exp(table[worst, around]).sum()
        scores.append(weight * table.min(1).max())
        if mode == "anomalib":
            maps.append(mirrored_blur(np.kron(least, np.ones((8, 8)))))
        else:
            maps.append(convolve(enlarge(least[None], test.shape[2:])[0]))
    return scores, maps


def convolve(maps: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(maps, 4)


@pytest.mark.parametrize("mode", ["paper", "amazon", "anomalib"])
def test_each_mode_equals_its_description(mode):
    torch.manual_seed(1)
    model = PatchCore(ResNet18(), mode=mode)
    train, test = textures(4), textures(3, seed=1)
    test[0, :, 10:20, 30:40] += 1
    model.fit(batches(train, 3), 4)
    width = {"paper": 128, "amazon": 128, "anomalib": johnson_lindenstrauss_min_dim(256, eps=0.9)}[mode]
    assert model.directions.shape[1] == width
    maps, scores = model.score(test)
    expected_scores, expected_maps = expected_findings(mode, model, train, test)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=1e-4)
    np.testing.assert_allclose(maps.numpy(), np.stack(expected_maps), rtol=1e-4, atol=1e-4)
