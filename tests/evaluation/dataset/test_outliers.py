"""Outlier scores: against plain float64 loops over images and patches, ties and lonely images included."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from data.loading import Loader
from data.normalize import normalize
from evaluation.anomaly.thresholds import suspicious
from evaluation.dataset import outliers
from evaluation.dataset.outliers import excess, image_scores, leave_one_out, mutual_scoring, patch_scores, window_means
from tests.processes import run_processes


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_leave_one_out(features, groups, k):
    unit = (features.double() / features.double().norm(dim=1, keepdim=True)).numpy()
    out = []
    for i, group in enumerate(groups.tolist()):
        others = [np.linalg.norm(unit[i] - unit[j]) for j in range(len(unit)) if j != i and groups[j] == group]
        out.append(sorted(others)[min(k, len(others)) - 1] if others else math.nan)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_leave_one_out_is_that_of_a_loop(k):
    features, groups = random(40, 6), torch.arange(40) % 3
    groups[7], groups[8:10] = 9, 4  # one alone, and a pair, which has no third neighbor
    features[11] = features[14]
    found = leave_one_out(features, groups, k)
    torch.testing.assert_close(found, loop_leave_one_out(features, groups, k), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert found.isnan().nonzero().flatten().tolist() == [7]


def test_leave_one_out_of_copies_is_zero_and_of_scaled_features_the_same():
    features = random(12, 5)
    copies = features.repeat(2, 1)
    assert (leave_one_out(copies, torch.zeros(24, dtype=torch.int64), 1) == 0).all()
    one, other = (leave_one_out(f, torch.zeros(12, dtype=torch.int64), 2) for f in (features, 7 * features))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_a_few_outliers_of_one_kind_do_not_vouch_for_each_other():
    features = torch.cat([random(60, 4) * 0.1 + torch.tensor([1.0, 0, 0, 0]), torch.tensor([[0.0, 0, 1, 0]] * 5)])
    groups = torch.zeros(65, dtype=torch.int64)
    assert leave_one_out(features, groups, 10).topk(5).indices.sort().values.tolist() == list(range(60, 65))
    assert (leave_one_out(features, groups, 1)[60:] == 0).all()  # what one neighbor would say


def test_excess_agrees_with_suspicious_and_compares_groups():
    scores = torch.cat([random(50).abs(), 100 * random(50, seed=1).abs()]).double()
    scores[3], scores[77] = 9.0, 1200.0
    groups = torch.arange(100) // 50
    found = excess(scores, groups)
    for group in (0, 1):
        members = (groups == group).nonzero().flatten().tolist()
        named = suspicious(scores[members], [str(i) for i in members])
        assert {int(line["path"]) for line in named} == {i for i in members if found[i] > outliers.FENCE}
    assert found[3] > outliers.FENCE and found[77] > outliers.FENCE
    lower, upper = np.percentile(scores[:50].numpy(), (25, 75))
    assert float(found[3]) == pytest.approx((9.0 - upper) / (upper - lower))


def test_excess_of_ties_and_of_few():
    same = excess(torch.tensor([1.0, 1, 1, 1, 1, 1, 2]), torch.zeros(7))
    assert same.tolist() == [0.0] * 6 + [math.inf]
    few = excess(torch.tensor([1.0, 2, 9, math.nan]), torch.zeros(4))
    assert few.isnan().all()
    assert excess(torch.empty(0), torch.empty(0)).tolist() == []


def loop_window_means(maps, window):
    """MuSc's LNAMD by loops: standardize the map, average a window with zeros beyond the border, normalize."""
    maps = maps.double().numpy()
    out = np.zeros((len(maps), maps.shape[2] * maps.shape[3], maps.shape[1]))
    for b, one in enumerate(maps):
        one = (one - one.mean()) / np.sqrt(one.var() + 1e-5)
        for y in range(one.shape[1]):
            for x in range(one.shape[2]):
                total, r = np.zeros(len(one)), window // 2
                for v in range(max(0, y - r), min(one.shape[1], y + r + 1)):
                    for u in range(max(0, x - r), min(one.shape[2], x + r + 1)):
                        total += one[:, v, u]
                mean = total / window**2
                out[b, y * one.shape[2] + x] = mean / np.linalg.norm(mean)
    return torch.from_numpy(out)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_window_means_are_those_of_a_loop(window):
    maps = random(3, 4, 5, 6) * 3 + 2
    expected = loop_window_means(maps, window)
    torch.testing.assert_close(window_means(maps, window).double(), expected, rtol=1e-4, atol=1e-5)


def loop_patch_scores(queries, references, excluded, share):
    out = np.full(queries.shape[:2], np.nan)
    for b, query in enumerate(queries.double().numpy()):
        others = [r.double().numpy() for r, gone in zip(references, excluded[b].tolist()) if not gone]
        for p, patch in enumerate(query):
            distances = sorted(np.linalg.norm(other - patch, axis=1).min() for other in others)
            if distances:
                out[b, p] = np.mean(distances[: max(1, int(len(distances) * share))])
    return torch.from_numpy(out)


@pytest.mark.parametrize(("n_references", "share"), [(1, 0.3), (3, 0.3), (7, 0.3), (20, 0.3), (20, 1.0), (20, 0.05)])
def test_patch_scores_are_those_of_a_loop(n_references, share, monkeypatch):
    unit = torch.nn.functional.normalize
    queries, references = unit(random(4, 6, 5), dim=2), unit(random(n_references, 6, 5, seed=1), dim=2)
    references[0] = queries[2]
    excluded = torch.zeros(4, n_references, dtype=torch.bool)
    excluded[2, 0] = True
    expected = loop_patch_scores(queries, references, excluded, share)
    torch.testing.assert_close(
        patch_scores(queries, references, excluded, share).double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True
    )
    monkeypatch.setattr(outliers, "PAIRS_AT_ONCE", 50)  # several pieces
    torch.testing.assert_close(
        patch_scores(queries, references, excluded, share).double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True
    )


def test_a_patch_that_no_other_image_has_is_the_score_of_its_image(monkeypatch):
    """One stage of 4 x 4 and one of 2 x 2: the maximum of the mean, the coarse one interpolated."""
    fine, coarse = random(1, 3, 4, 4).repeat(6, 1, 1, 1), random(1, 3, 2, 2).repeat(6, 1, 1, 1)
    fine, coarse = fine + 0.01 * random(6, 3, 4, 4, seed=2), coarse + 0.01 * random(6, 3, 2, 2, seed=3)
    fine[4, :, 1, 2] = torch.tensor([9.0, -9.0, 9.0])
    monkeypatch.setattr(outliers, "WINDOWS", (1,))
    found = image_scores([fine, coarse], [fine, coarse], torch.eye(6, dtype=torch.bool))
    assert int(found.argmax()) == 4
    maps = [
        loop_patch_scores(loop_window_means(m, 1), loop_window_means(m, 1), torch.eye(6, dtype=torch.bool), 0.3)
        for m in (fine, coarse)
    ]
    weights = np.interp(np.arange(4), [0, 3], [0, 1])  # corners on corners
    weights = np.stack([1 - weights, weights], 1)  # (4, 2)
    large = np.einsum("yi,xj,bij->byx", weights, weights, maps[1].reshape(6, 2, 2).numpy())
    expected = (maps[0].reshape(6, 4, 4).numpy() + large).reshape(6, 16).max(1) / 2
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


class Images:
    """n seeded images of 16 x 16 in memory, one of them of another kind."""

    def __init__(self, n: int, odd: int | None = None):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 40, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
        if odd is not None:
            self.images[min(odd, n - 1), :, 4:9] += 200
        self.labels = torch.zeros(n, dtype=torch.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], 0, i


class Stages(nn.Module):
    """Four stages: 16, 8, 4 and 2 pixels a side, of 3, 4, 5 and 6 channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(2 + i, 3 + i, 3, stride=1 + (i > 1), padding=1) for i in range(1, 5)])

    def forward_stages(self, x, last=4):
        out = []
        for layer in self.layers[:last]:
            x = torch.relu(layer(x))
            out.append(x)
        return out


def scores_of(_rank: int, _world_size: int, references: int, n: int = 11, batch_size: int = 3) -> torch.Tensor:
    dataset = Images(n, odd=5)

    def load(indices: torch.Tensor) -> Loader:
        return Loader(dataset, batch_size, "cpu", indices=indices)

    return mutual_scoring(Stages().eval(), load, torch.arange(n), references=references)


def test_with_all_images_as_references_the_score_is_the_papers():
    found = scores_of(0, 1, references=100)
    with torch.no_grad():
        stages = Stages().forward_stages(normalize(Images(11, odd=5).images))
    maps = np.zeros((11, 8, 8))
    gone = torch.eye(11, dtype=torch.bool)
    for stage in (3, 4):
        one = stages[stage - 1]
        for window in (1, 3, 5):
            patches = loop_window_means(one, window)
            scores = loop_patch_scores(patches, patches, gone, 0.3).unflatten(1, one.shape[2:])[:, None]
            size = stages[2].shape[2:]
            large = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=True)
            maps = large[:, 0].numpy() + (maps if maps.shape[1:] == size else 0)
    torch.testing.assert_close(found, torch.from_numpy(maps / 6).flatten(1).amax(1), rtol=1e-3, atol=1e-3)
    assert int(found.argmax()) == 5


def test_few_references_are_seeded_and_still_find_the_odd_image():
    found = scores_of(0, 1, references=4)
    assert torch.equal(found, scores_of(0, 1, references=4)) and int(found.argmax()) == 5
    torch.testing.assert_close(found, scores_of(0, 1, references=4, batch_size=11), rtol=1e-4, atol=0)


def test_two_processes_score_as_one():
    alone = scores_of(0, 1, 4)
    for found in run_processes(scores_of, 2, 4):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    for found in run_processes(scores_of, 3, 1, 2):  # one reference; a rank without images
        torch.testing.assert_close(found, scores_of(0, 1, 1, 2), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_one_image_has_no_others():
    assert scores_of(0, 1, references=5, n=1).isnan().all()
