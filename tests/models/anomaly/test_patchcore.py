"""PatchCore against every step written out in float64 loops."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from models.anomaly.detector import Batch
from models.anomaly.patchcore import PatchCore
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.images import batches
from tests.processes import run_processes


def detector(**options) -> PatchCore:
    torch.manual_seed(1)
    return PatchCore(ResNet18(), **options)


def textures(count: int, seed: int = 0, size: int = 64) -> Tensor:
    """A fine pattern that is the same everywhere, with noise."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.sin(torch.arange(size) / 2)[:, None] * torch.cos(torch.arange(size) / 3)
    return pattern.expand(count, 3, size, size) + 0.1 * torch.randn(count, 3, size, size, generator=generator)


def stages(model: PatchCore, images: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        outputs = model.backbone.forward_stages(images)
    return [outputs[stage - 1].double().numpy() for stage in model.stages]


def local_mean(feature: np.ndarray, side: int) -> np.ndarray:
    """(C, H, W): each pixel the sum of its side x side neighborhood, zeros outside, over side squared."""
    out, r = np.zeros_like(feature), side // 2
    for y, x in np.ndindex(*feature.shape[1:]):
        window = feature[:, max(y - r, 0) : y + r + 1, max(x - r, 0) : x + r + 1]
        out[:, y, x] = window.sum((1, 2)) / side**2
    return out


def enlarge(feature: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, h, w) -> (C, *size), bilinear with pixel centres at half integers and the border repeated."""
    for axis, n_out in ((1, size[0]), (2, size[1])):
        n_in = feature.shape[axis]
        at = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
        feature = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, feature)
    return feature


def plain_patches(features: list[np.ndarray], side: int, embed_dim: int) -> np.ndarray:
    """[(B, C_i, H_i, W_i)] -> (B, H, W, D)."""
    out, size = [], features[0].shape[2:]
    for image in range(len(features[0])):
        each = [enlarge(local_mean(f[image], side), size) for f in features]
        channels = np.concatenate(each).transpose(1, 2, 0)  # (H, W, C)
        n = channels.shape[2]
        if n > embed_dim:
            edges = [(d * n // embed_dim, -(-(d + 1) * n // embed_dim)) for d in range(embed_dim)]
            channels = np.stack([channels[..., low:high].mean(-1) for low, high in edges], axis=-1)
        out.append(channels)
    return np.stack(out)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)),
        ({"neighborhood": 5, "stages": (1, 2, 4), "embed_dim": 100}, (64, 96)),
        ({"neighborhood": 1}, (72, 56)),
    ],
)
def test_patches_equal_the_plain_loop(options, size):
    model, images = detector(**options), torch.randn(2, 3, *size)
    expected = plain_patches(stages(model, images), model.neighborhood, options.get("embed_dim", 1024))
    patches = model.patches(model.features(images))
    assert patches.dtype == torch.float32 and patches.shape == expected.shape
    np.testing.assert_allclose(patches.numpy(), expected, atol=1e-5)


def test_stages_may_come_in_any_order():
    images = torch.randn(1, 3, 64, 64)
    ours = [model.patches(model.features(images)) for model in (detector(stages=(2, 3)), detector(stages=(3, 2)))]
    assert torch.equal(ours[0][..., :128], ours[1][..., 256:]) and torch.equal(ours[0][..., 128:], ours[1][..., :256])


@pytest.mark.parametrize("neighbors", [1, 2, 9, 10_000])
def test_score_equals_equations_6_and_7(neighbors):
    model, train, test = detector(coreset=1.0, neighbors=neighbors), textures(3), textures(4, seed=1)
    test[:, :, 10:20, 30:40] += 1
    model.fit(batches(train, 2), 3)
    maps, scores = model.score(test)
    bank = plain_patches(stages(model, train), 3, 1024).reshape(-1, 384)
    np.testing.assert_allclose(model.bank.entries.numpy(), bank, atol=1e-5)  # coreset=1 keeps everything in order
    for image, patches in enumerate(plain_patches(stages(model, test), 3, 1024)):
        grid = distances(patches.reshape(-1, 384), bank)  # (64 patches, M)
        worst = grid.min(1).argmax()
        owner = grid[worst].argmin()
        score = grid[worst, owner]
        around = distances(bank[owner][None], bank)[0].argsort()[: min(neighbors, len(bank))]
        weight = 1 - np.exp(score) / np.exp(grid[worst, around]).sum() if neighbors > 1 else 1
        np.testing.assert_allclose(scores[image], weight * score, rtol=1e-4)
        expected = gaussian_filter(enlarge(grid.min(1).reshape(1, 8, 8), (64, 64))[0], 4)
        np.testing.assert_allclose(maps[image].numpy(), expected, atol=1e-4)


def test_reweighting_survives_distances_whose_exponential_overflows():
    model = detector()
    entries = 1000 * torch.randn(20, 5)
    model.bank.hold(entries, torch.arange(20), torch.zeros(20, 3, dtype=torch.int64))
    weights = model.reweight(1000 * torch.randn(3, 5), torch.tensor([4, 0, 4]))
    assert weights.isfinite().all() and ((weights >= 0) & (weights <= 1)).all()


def farthest_points(points: np.ndarray, count: int, start: int) -> list[int]:
    picks, least = [start], np.full(len(points), np.inf)
    while len(picks) < count:
        least = np.minimum(least, ((points - points[picks[-1]]) ** 2).sum(1))
        picks.append(int(least.argmax()))
    return picks


@pytest.mark.parametrize("projection", [0, 16, 384])
def test_bank_is_the_greedy_coreset_of_the_unprojected_patches(projection):
    model = detector(coreset=0.2, projection=projection, seed=5)
    model.fit(batches(textures(4), 3), 4)
    patches = plain_patches(stages(model, textures(4)), 3, 1024).reshape(-1, 384)
    start = int(torch.randperm(len(patches), generator=torch.Generator().manual_seed(6))[0])
    seen = patches
    if projection == 16:  # 384 is no narrower than the patches
        seen = patches @ torch.randn(384, 16, generator=torch.Generator().manual_seed(5)).double().numpy() / 4
    picks = farthest_points(seen, int(0.2 * len(patches)), start)
    assert len(picks) == 51
    np.testing.assert_allclose(model.bank.entries.numpy(), patches[picks], atol=1e-5)
    origins = [(pick // 64, pick % 64 // 8, pick % 8) for pick in picks]
    assert model.bank.origins.tolist() == [list(origin) for origin in origins]
    left = distances(seen, seen[picks]).min(1).max()
    assert model.facts() == {
        "bank": 51,
        "covering_radius": pytest.approx(left, rel=1e-5),
        "covering_radius_at_most": pytest.approx(left, rel=1e-5),
    }


def test_the_seed_decides_the_bank():
    banks = []
    for seed in (0, 0, 1):
        model = detector(coreset=0.1, seed=seed)
        model.fit(batches(textures(2), 2), 2)
        banks.append(model.bank.entries)
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


def test_scores_do_not_depend_on_the_batch():
    model, test = detector(coreset=0.2), textures(5, seed=1)
    model.fit(batches(textures(4), 3), 4)
    maps, scores = model.score(test)
    alone = [model.score(image[None]) for image in test]
    assert torch.allclose(maps, torch.cat([part[0] for part in alone]), atol=1e-5)
    assert torch.allclose(scores, torch.cat([part[1] for part in alone]), atol=1e-5)


def test_bank_loads_into_a_fresh_detector():
    fitted, test = detector(coreset=0.3), textures(2, seed=1)
    fitted.fit(batches(textures(3), 3), 3)
    fresh = PatchCore(ResNet18(), coreset=0.3)  # other random weights, another size of bank
    fresh.fit(batches(textures(1), 1), 1)
    fresh.load_state_dict(fitted.state_dict())
    for a, b in zip(fresh.score(test), fitted.score(test)):
        assert torch.equal(a, b)


def test_an_unfitted_detector_says_so():
    with pytest.raises(UserError, match="PatchCore is not fitted"):
        detector().score(textures(1))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("coreset", [1e-6, 0.5, 1.0])
def test_one_image_or_identical_ones(count, coreset):
    model = detector(coreset=coreset)
    model.fit(batches(textures(1).expand(count, -1, -1, -1), 2), count)
    assert len(model.bank) == max(1, int(coreset * 64 * count))
    spoilt = textures(1)
    spoilt[:, :, 30:44, 30:44] += 2
    (maps, scores), (spoilt_maps, spoilt_scores) = model.score(textures(1)), model.score(spoilt)
    assert all(x.isfinite().all() for x in (maps, scores, spoilt_maps, spoilt_scores))
    if len(model.bank) > 1:  # one patch says next to nothing about an image
        assert scores < spoilt_scores
    if coreset == 1.0:
        assert scores < 1e-3


def test_a_defect_raises_the_score_and_the_map_peaks_in_it():
    model = detector(coreset=0.1)
    model.fit(batches(textures(6, size=128), 4), 6)
    normal = textures(3, seed=1, size=128)
    spoilt = normal.clone()
    spoilt[:, :, 32:64, 72:104] = spoilt[:, :, 32:64, 72:104].flip(2) + 0.5 * torch.randn(3, 3, 32, 32)
    maps, scores = model.score(spoilt)
    assert maps.shape == (3, 128, 128) and scores.min() > model.score(normal)[1].max()
    rows, columns = np.divmod(maps.flatten(1).argmax(1).numpy(), 128)
    assert ((rows >= 32) & (rows < 64) & (columns >= 72) & (columns < 104)).all()


def test_distances_keep_their_precision_under_autocast():
    model, test = detector(coreset=0.2), textures(2, seed=1)
    model.fit(batches(textures(2), 2), 2)
    features = model.features(test)
    expected = model.measure(features, (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        model.features = lambda _: features
        for a, b in zip(model.examine(test), expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "papers"), ("neighborhood", 2), ("stages", (2, 2))],
)
def test_bad_options_are_user_errors(name, value):
    with pytest.raises(UserError, match=name):
        PatchCore(nn.Identity(), **{name: value})


def share(images: Tensor, rank: int, world_size: int, first: int = 0) -> list[Batch]:
    """This process's part of every global batch of 4, in the order of data/loading.py."""
    parts = [part.tensor_split(world_size)[rank] for part in torch.arange(len(images)).split(4)]
    return [Batch(images[part], None, first + part) for part in parts if len(part)]


def fit_shares(rank: int, world_size: int, mode: str) -> dict:
    """Fit, test on unevenly many images, save, forget an image, learn two others."""
    model = detector(coreset=0.2, mode=mode)
    model.fit(share(textures(7), rank, world_size), 7)
    held = len(model.bank.entries)
    test = textures(3, seed=1).tensor_split(world_size)[rank] if world_size > 1 else textures(3, seed=1)
    found = model.examine(test)
    left = model.examine(textures(7)[rank::world_size], None, torch.arange(7)[rank::world_size])
    state = {name: x.clone() for name, x in model.state_dict().items() if "backbone" not in name}
    model.keep(torch.tensor([0, -1, 1, 2, 3, 4, 5]))
    model.add(share(textures(2, seed=2), rank, world_size, first=6), 2)
    return {"state": state, "held": held, "found": found, "left": left.scores, "facts": model.facts()}


@pytest.mark.parametrize("mode", ["paper", "amazon", "anomalib"])
def test_two_processes_share_the_bank_of_one(mode):
    one, two = fit_shares(0, 1, mode), run_processes(fit_shares, 2, mode)
    assert sum(result["held"] for result in two) == one["held"] and all(result["held"] for result in two)
    for result in two:  # convolutions differ in the last bits between batch sizes
        for name, value in one["state"].items():
            torch.testing.assert_close(result["state"][name], value, atol=1e-5, rtol=1e-5)
        assert result["facts"] == pytest.approx(one["facts"], rel=1e-5)
    for field, value in one["found"]._asdict().items():
        torch.testing.assert_close(torch.cat([getattr(result["found"], field) for result in two]), value)
    torch.testing.assert_close(torch.stack([two[i % 2]["left"][i // 2] for i in range(7)]), one["left"])


@pytest.mark.parametrize("order", [[1, 0], [0, 0]])
def test_images_out_of_order_are_refused(order):
    """Patches are found by their ascending ids, so a bank of unsorted ones would lack some without a word."""
    images, numbers = textures(2), torch.tensor(order)
    with pytest.raises(ValueError, match="must come in ascending order, each once"):
        detector(coreset=1.0).fit([Batch(images, None, numbers)], 2)
