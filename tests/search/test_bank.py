"""The bank on several processes and in blocks against a full search; leaving images out, adding and forgetting."""

import numpy as np
import pytest
import torch
from torch import Tensor

import search.bank as bank_module
from models.anomaly.patchcore import PatchCore
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from search.bank import Bank, closest
from tests.images import batches
from tests.models.anomaly.test_patchcore import textures
from tests.processes import run_processes


def points(count: int, seed: int) -> Tensor:
    """On a coarse grid, so that many distances tie."""
    return torch.randint(0, 3, (count, 4), generator=torch.Generator().manual_seed(seed)).float()


def whole_bank(n_images: int = 5, each: int = 8) -> tuple[Tensor, Tensor]:
    """Entries (M, 4) and origins (M, 3) in a shuffled pick order."""
    count = n_images * each
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    return points(count, 1), torch.stack([order // each, order % each, 7 * torch.ones_like(order)], 1)


def search(queries: Tensor, k: int, away: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Plain loop: squared distances and positions, ties to the lowest position."""
    entries, origins = whole_bank()
    squared = ((queries.double()[:, None] - entries.double()[None]) ** 2).sum(2).numpy()
    if away is not None:
        squared[(away[:, None] == origins[None, :, 0]).numpy()] = np.inf
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(squared, order, 1)
    return found, np.where(np.isinf(found), len(entries), order)


def search_shares(rank: int, world_size: int, block: int) -> list:
    """Each process holds some entries, process 1 none of two; each asks for some queries, the last one for none."""
    entries, origins = whole_bank()
    owner = torch.arange(len(entries)) % 3 % world_size if world_size != 2 else torch.zeros(len(entries))
    mine = (owner == rank).nonzero().flatten()
    bank_module.BLOCK = block
    bank = Bank()
    bank.hold(entries[mine], mine, origins)
    queries, away = points(23, 2), torch.arange(23) % 5
    parts = torch.arange(23).tensor_split(max(world_size - 1, 1))
    part = parts[rank] if rank < len(parts) else torch.empty(0, dtype=torch.int64)
    results = [bank.nearest(queries[part], k, leave) for k in (1, 3, 40) for leave in (None, away[part])]
    rows = bank.rows(part % len(entries))
    return [*results, rows, bank.around(part, 4), bank.state_dict()]


@pytest.mark.parametrize(("world_size", "block"), [(1, 1000), (1, 7), (2, 1000), (3, 5)])
def test_search_equals_the_plain_loop(world_size, block, monkeypatch):
    monkeypatch.setattr(bank_module, "BLOCK", bank_module.BLOCK)  # put back afterwards
    results = [search_shares(0, 1, block)] if world_size == 1 else run_processes(search_shares, world_size, block)
    queries, away = points(23, 2), torch.arange(23) % 5
    cases = [(k, leave) for k in (1, 3, 40) for leave in (None, away)]
    for number, (k, leave) in enumerate(cases):
        squared, positions = search(queries, k, leave)
        np.testing.assert_array_equal(torch.cat([r[number][0] for r in results]).numpy(), squared)
        np.testing.assert_array_equal(torch.cat([r[number][1] for r in results]).numpy(), positions)
    entries, origins = whole_bank()
    assert torch.equal(torch.cat([r[6] for r in results]), entries[:23])
    np.testing.assert_array_equal(torch.cat([r[7] for r in results]).numpy(), search(entries[:23], 4, None)[1])
    for result in results:
        assert torch.equal(result[8]["entries"], entries) and torch.equal(result[8]["origins"], origins)


def test_closest_breaks_ties_by_position():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    squared, positions = closest(a, torch.tensor([[5, 1]]), b, torch.tensor([[7, 2]]), 3)
    assert squared.tolist() == [[1, 1, 1]] and positions.tolist() == [[2, 5, 7]]


def test_an_image_that_owns_the_whole_bank_cannot_be_left_out():
    bank = Bank()
    bank.hold(points(3, 0), torch.arange(3), torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(UserError, match="cannot be left out"):
        bank.nearest(points(2, 1), 1, torch.tensor([0, 1]))


def fitted(images: Tensor, **options) -> PatchCore:
    torch.manual_seed(1)
    model = PatchCore(ResNet18(), **options)
    model.fit(batches(images, 3), len(images))
    return model


def test_left_out_scores_are_those_of_a_bank_without_the_image():
    """With coreset=1 a bank without the image is exactly the bank that would have been fitted."""
    images = textures(5)
    model = fitted(images, coreset=1.0)
    left = model.examine(images, None, torch.arange(5))
    for i in range(5):
        rest = fitted(images[torch.arange(5) != i], coreset=1.0).examine(images[i : i + 1])
        torch.testing.assert_close(left.scores[i : i + 1], rest.scores)
        torch.testing.assert_close(left.maps[i : i + 1], rest.maps)
        assert int(left.nearest_image[i]) == int(rest.nearest_image[0]) + int(rest.nearest_image[0] >= i)


@pytest.mark.parametrize("coreset", [0.2, 1.0])
def test_forgetting_equals_a_bank_that_never_saw_the_image(coreset):
    images, test = textures(5), textures(2, seed=1)
    model = fitted(images, coreset=coreset)
    reach = model.facts()["covering_radius"]
    stays = model.bank.origins[:, 0] != 2
    expected = model.bank.entries[stays], model.bank.origins[stays]
    model.keep(torch.tensor([3, 2, -1, 1, 0]))
    assert torch.equal(model.bank.entries, expected[0])
    assert torch.equal(model.bank.origins[:, 0], torch.tensor([3, 2, -1, 1, 0])[expected[1][:, 0]])
    seen = images.new_tensor(model.bank.origins[:, 0].unique().tolist())
    assert 2 not in expected[1][:, 0] and len(seen) == 4
    facts = model.facts()
    assert facts["covering_radius"] == reach and facts["covering_radius_at_most"] > reach
    patches = model._narrow(model.patches(model.features(images[[0, 1, 3, 4]])).flatten(0, 2))
    covered = torch.cdist(patches, model._narrow(model.bank.entries)).amin(1).max()
    assert covered <= facts["covering_radius_at_most"] + 1e-4
    if coreset == 1.0:
        for a, b in zip(model.score(test), fitted(images[[0, 1, 3, 4]], coreset=1.0).score(test)):
            torch.testing.assert_close(a, b)


def test_added_images_are_covered_as_the_first_ones_are():
    images, more = textures(4), textures(3, seed=2) * 1.2
    model = fitted(images, coreset=0.2)
    before, radius = model.bank.entries.clone(), model.facts()["covering_radius"]
    model.add(batches(more, 2, first=4), 3)
    assert torch.equal(model.bank.entries[: len(before)], before) and len(model.bank) > len(before)
    assert set(model.bank.origins[len(before) :, 0].tolist()) <= {4, 5, 6}
    patches = model._narrow(model.patches(model.features(more)).flatten(0, 2)).double()
    bank = model._narrow(model.bank.entries).double()
    assert torch.cdist(patches, bank).amin(1).max() <= radius * (1 + 1e-6)
    worst = torch.cdist(patches, bank[: len(before)]).amin(1).argmax()  # the greedy choice comes first
    assert model.bank.origins[len(before)].tolist() == [4 + int(worst) // 64, int(worst) % 64 // 8, int(worst) % 8]
    model.add(batches(images[:1], 1, first=7), 1)  # covered already: nothing to add
    assert 7 not in model.bank.origins[:, 0]


def test_forgetting_everything_is_refused():
    with pytest.raises(UserError, match="fit anew"):
        fitted(textures(2)).keep(torch.tensor([-1, -1]))


def test_padding_enters_neither_bank_nor_maps_nor_scores():
    images, test = textures(3), textures(2, seed=1)
    valid = torch.zeros(3, 64, 64, dtype=torch.bool)
    valid[:, 16:56] = True
    torch.manual_seed(1)
    model = PatchCore(ResNet18(), coreset=1.0)
    model.fit(batches(images, 2, valid=valid), 3)
    assert set(model.bank.origins[:, 1].tolist()) == set(range(2, 7)) and len(model.bank) == 3 * 5 * 8
    test[:, :, :8] = 10 * torch.randn(2, 3, 8, 64)  # the strangest place lies in the padding
    assert (model.examine(test).peaks[:, 0] < 16).all()
    found = model.examine(test, valid[:2])
    assert (found.maps[:, :16] == 0).all() and (found.maps[:, 56:] == 0).all() and (found.maps[:, 16:56] > 0).all()
    assert ((found.peaks[:, 0] > 16) & (found.peaks[:, 0] < 56)).all()
    assert (model.examine(test).scores > found.scores).all()


def test_patches_beyond_the_memory_limit_make_the_same_bank():
    images = textures(6)
    small, big = (fitted(images, coreset=0.2, memory_limit=limit) for limit in (1e-5, 1.0))
    assert torch.equal(small.bank.entries, big.bank.entries) and torch.equal(small.bank.origins, big.bank.origins)
