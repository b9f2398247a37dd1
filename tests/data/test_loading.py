"""Batches: order, cache, several processes, hold-out."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

import data.loading
from data.datasets.folder import ClassFolder
from data.geometry import Geometry
from data.loading import Loader
from data.splits import grouped_split, holdout, stratified_split
from runtime.distributed import gather_rows
from runtime.errors import UserError
from tests.processes import run_processes


class Numbers:
    """Image i is filled with i, its label is i % 3; counts how often it is asked for each."""

    whole_groups = None

    def __init__(self, n, masks=False):
        self.groups = {}
        self.labels = torch.arange(n) % 3
        self.masks = masks
        self.asked = [0] * n

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.asked[i] += 1
        image, rest = torch.full((3, 4, 4), i, dtype=torch.uint8), (int(self.labels[i]), i)
        return (image, torch.full((4, 4), i % 2 == 1), *rest) if self.masks else (image, *rest)


def order(loader, epoch=0, first_batch=0):
    return [batch[-1].tolist() for batch in loader.epoch(epoch, first_batch)]


def flat(lists):
    return [x for one in lists for x in one]


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others):
        assert len(batch) == len(other)
        for x, y in zip(batch, other):
            assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("cache", ["ram", "device", "none", "auto"])
@pytest.mark.parametrize("masks", [False, True])
def test_batches_are_the_items_collated(cache, masks):
    batches = list(Loader(Numbers(7, masks), 3, "cpu", cache=cache).epoch(0))
    assert [batch[-1].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    for images, *marks, labels, indices in batches:
        assert images.dtype == torch.uint8 and torch.equal(images[:, 0, 0, 0].long(), indices)
        assert images.shape == (len(indices), 3, 4, 4) and indices.dtype == torch.int64
        assert labels.dtype == torch.int64 and torch.equal(labels, indices % 3)
        assert len(marks) == masks
        for mask in marks:
            assert mask.dtype == torch.bool and torch.equal(mask[:, 0, 0], indices % 2 == 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(23):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        size = (*generator.integers(5, 40, 2), 3)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(root / f"class{i % 2}/{i:02}.jpg")
    return str(root)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_images_need_not_be_square(folder, cache):
    dataset = ClassFolder("train", Geometry(10, 17, "pad"), root=folder)
    for images, _, indices in Loader(dataset, 4, "cpu", cache=cache).epoch(0):
        assert images.shape == (len(indices), 3, 10, 17)
        assert all(torch.equal(image, dataset[i][0]) for image, i in zip(images, indices.tolist()))


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_and_workers_do_not_change_the_batches(folder, workers):
    dataset, options = ClassFolder("train", 16, root=folder), {"shuffle": True, "seed": 3, "drop_last": True}
    cached = Loader(dataset, 4, "cpu", cache="ram", **options)
    decoded = Loader(dataset, 4, "cpu", cache="none", workers=workers, **options)
    for epoch in (0, 1):
        assert_same(cached.epoch(epoch), decoded.epoch(epoch))
    assert_same(cached.epoch(1, 2), decoded.epoch(1, 2))


def test_shuffling_is_a_permutation_of_seed_and_epoch():
    orders = {}
    for seed in (0, 1, 2**32):
        loader = Loader(Numbers(50), 8, "cpu", shuffle=True, seed=seed)
        for epoch in (0, 1, 2):
            orders[seed, epoch] = flat(order(loader, epoch))
            assert sorted(orders[seed, epoch]) == list(range(50))
    assert len({tuple(o) for o in orders.values()}) == 9
    assert flat(order(Loader(Numbers(50), 5, "cpu", shuffle=True), 1)) == orders[0, 1]  # whatever the batch size


def test_an_epoch_can_start_in_the_middle():
    loader = Loader(Numbers(50), 8, "cpu", shuffle=True)
    whole = order(loader, 5)
    for first in range(8):
        assert order(loader, 5, first) == whole[first:]
    assert len(whole) == len(loader) == 7 and order(loader, 5, 7) == []


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_neither_order_nor_cache_touch_the_global_random_numbers(cache):
    state = torch.get_rng_state()
    order(Loader(Numbers(9), 4, "cpu", shuffle=True, cache=cache))
    assert torch.equal(torch.get_rng_state(), state)


def test_restricted_to_indices():
    loader = Loader(Numbers(9), 2, "cpu", indices=torch.tensor([7, 1, 4]))
    assert order(loader) == [[7, 1], [4]] and len(loader) == 2
    shuffled = Loader(Numbers(9), 2, "cpu", indices=[7, 1, 4], shuffle=True)
    assert all(sorted(flat(order(shuffled, epoch))) == [1, 4, 7] for epoch in range(3))
    assert order(Loader(Numbers(9), 2, "cpu", indices=[])) == []


def test_drop_last():
    loader = Loader(Numbers(11), 4, "cpu", drop_last=True)
    assert order(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]] and len(loader) == 2
    short = Loader(Numbers(3), 4, "cpu", drop_last=True)
    for use in (lambda: len(short), lambda: next(short.epoch(0))):
        with pytest.raises(UserError, match=r"3 images make no full batch of batch_size 4 x 1 .* at most 3"):
            use()


def test_wrong_options():
    with pytest.raises(UserError, match="batch_size=0"):
        Loader(Numbers(3), 0, "cpu")


def test_loaders_of_one_dataset_share_what_is_decoded():
    dataset = Numbers(40)
    train, held_out = holdout(dataset, 0.25, seed=0)
    first = Loader(dataset, 4, "cpu", indices=train, shuffle=True, cache="ram")
    for epoch in range(3):
        order(first, epoch)
    example = [1] + [0] * 39  # one look at item 0, to know the shape
    assert [n - e for n, e in zip(dataset.asked, example)] == [int(i in train) for i in range(40)]  # only what is used
    order(Loader(dataset, 8, "cpu", indices=held_out, cache="auto"))
    order(Loader(dataset, 8, "cpu", cache="device"))
    assert [n - e for n, e in zip(dataset.asked, example)] == [1] * 40
    order(Loader(Numbers(40), 8, "cpu"))  # an equal one is another one


def test_decoded_images_go_with_the_dataset():
    gc.collect()
    before = len(data.loading._STORES)
    dataset = Numbers(5)
    loader = Loader(dataset, 2, "cpu")
    order(loader)
    assert len(data.loading._STORES) == before + 1
    del dataset, loader
    gc.collect()
    assert len(data.loading._STORES) == before


def test_auto_takes_ram_only_under_half_of_what_is_free(monkeypatch):
    needed = 10 * 3 * 4 * 4
    for free, decoded in ((2 * needed + 1, 1), (2 * needed, 2)):
        monkeypatch.setattr(data.loading, "free_memory", lambda place, free=free: free)  # noqa: ARG005
        dataset = Numbers(10)
        loader = Loader(dataset, 2, "cpu")
        assert order(loader, 0) == order(loader, 1)
        assert dataset.asked[1:] == [decoded] * 9
    with pytest.raises(UserError, match=r"data\.cache=ram needs .* for 10 images.*data\.cache=none"):
        monkeypatch.setattr(data.loading, "free_memory", lambda place: needed)  # noqa: ARG005
        order(Loader(Numbers(10), 2, "cpu", cache="ram"))


@pytest.mark.parametrize(("cache", "workers"), [("ram", 0), ("none", 0), ("none", 1)])
def test_a_broken_image_is_named(tmp_path, cache, workers):
    for i in range(5):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"")
    dataset = ClassFolder("train", 4, root=str(tmp_path), test_fraction=0)
    with pytest.raises(UserError, match=r"^cannot read image .*3\.png: the file is empty; [^\n]*$"):
        list(Loader(dataset, 2, "cpu", cache=cache, workers=workers).epoch(0))


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_batches_from_ram_are_copied_ahead(monkeypatch, cache):
    passed = []
    monkeypatch.setattr(data.loading, "prefetch", lambda batches, device: passed.append(device) or batches)
    assert flat(order(Loader(Numbers(7), 3, "cpu", cache=cache))) == list(range(7))
    assert passed == [torch.device("cpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cache", ["auto", "device", "ram", "none"])
def test_batches_on_a_gpu_are_those_on_the_cpu(folder, cache):
    dataset = ClassFolder("train", 16, root=folder)
    here = Loader(dataset, 4, "cpu", cache="none", shuffle=True).epoch(2)
    for batch, expected in zip(Loader(dataset, 4, "cuda:0", cache=cache, shuffle=True).epoch(2), here):
        assert [x.device.type for x in batch] == ["cuda", "cuda", "cpu"]
        assert all(torch.equal(x.cpu(), y) for x, y in zip(batch, expected))


# Several processes ----------------------------------------------------------------------------------------------------

SETTINGS = [  # items, batch of all processes together, shuffle, drop_last
    (24, 6, True, True),
    (23, 6, True, True),
    (23, 6, True, False),
    (13, 6, False, False),  # one item in the last global batch: one rank has a batch less
    (1, 6, False, False),
]


def batches_of_rank(rank, world_size):  # noqa: ARG001 (both are in the process group)
    found = []
    for n, together, shuffle, drop_last in SETTINGS:
        loader = Loader(Numbers(n), together // world_size, "cpu", shuffle=shuffle, seed=5, drop_last=drop_last)
        batches = list(loader.epoch(1))
        rows = torch.cat([torch.empty(0, dtype=torch.uint8), *(batch[0][:, 0, 0, 0] for batch in batches)])
        indices = torch.cat([torch.empty(0, dtype=torch.int64), *(batch[-1] for batch in batches)])
        rows, indices = gather_rows(rows), gather_rows(indices)
        restored = rows[indices.argsort()].tolist()
        found.append(([batch[-1].tolist() for batch in batches], len(loader), order(loader, 1, 1), restored))
    return found


def test_two_processes_see_one_process_batches():
    ranks = run_processes(batches_of_rank, 2)
    for setting, first, second in zip(SETTINGS, *ranks):
        n, together, shuffle, drop_last = setting
        one = order(Loader(Numbers(n), together, "cpu", shuffle=shuffle, seed=5, drop_last=drop_last), 1)
        for k, expected in enumerate(one):
            parts = [rank[0][k] if k < len(rank[0]) else [] for rank in (first, second)]
            assert parts[0] + parts[1] == expected, setting  # contiguous, in rank order
            assert 0 <= len(parts[0]) - len(parts[1]) <= 1
        for batches, length, rest, restored in (first, second):
            assert length == len(batches) and rest == batches[1:] and all(batches)
            if not drop_last:
                assert restored == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 7, 12, 13, 17])
def test_three_ranks_share_the_rest_evenly(monkeypatch, n):
    monkeypatch.setattr(data.loading, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(data.loading, "rank", lambda rank=rank: rank)
        shares.append(flat(order(Loader(Numbers(n), 2, "cpu"))))
    assert sorted(flat(shares)) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(UserError, match=r"2 x 3 processes = 6: set batch_size to at most 1"):
        len(Loader(Numbers(5), 2, "cpu", drop_last=True))


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.99])
def test_split_by_class(fraction):
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 2 + [3] + [5] * 4)[torch.randperm(34)]
    rest, picked = stratified_split(labels, fraction, seed=1)
    assert torch.equal(torch.cat([rest, picked]).sort().values, torch.arange(34))
    assert rest.dtype == picked.dtype == torch.int64
    assert torch.equal(rest, rest.sort().values) and torch.equal(picked, picked.sort().values)
    for label in labels.unique().tolist():
        n, count = int((labels == label).sum()), int((labels[picked] == label).sum())
        if fraction == 0 or n == 1:
            assert count == 0
        else:
            assert 1 <= count <= n - 1 and (abs(count - n * fraction) <= 0.5 or count in (1, n - 1))


def test_split_is_a_function_of_the_seed():
    labels = torch.arange(60) % 3
    again = [stratified_split(labels, 0.2, seed=seed)[1].tolist() for seed in (0, 0, 1, 2)]
    assert again[0] == again[1] and len({tuple(x) for x in again}) == 3
    assert stratified_split(torch.zeros(10), 0.2, seed=0)[1].tolist() == [2, 8]  # must never move


def test_holdout_is_stratified_by_label_and_group():
    grouped = Numbers(40)
    grouped.labels = torch.zeros(40, dtype=torch.int64)
    grouped.groups = {"category": ["b"] * 10 + ["a"] * 30}
    _, held_out = holdout(grouped, 0.1, seed=4)
    assert held_out.tolist() == [  # each as a set of its own
        *stratified_split(torch.zeros(10), 0.1, seed=4)[1].tolist(),
        *(10 + stratified_split(torch.zeros(30), 0.1, seed=4)[1]).tolist(),
    ]
    train, held_out = holdout(Numbers(30), 0.1, seed=4)
    assert (held_out % 3).bincount().tolist() == [1, 1, 1] and len(train) == 27
    nothing = stratified_split(torch.empty(0, dtype=torch.int64), 0.5, seed=0)
    assert [len(x) for x in nothing] == [0, 0]


def test_groups_stay_whole_and_their_classes_keep_their_shares():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    labels = torch.from_numpy(groups % 3)  # 14, 13 and 13 groups
    names = [f"g{group:02}" for group in groups]
    rest, picked = grouped_split(labels, names, 0.2, seed=1)
    assert sorted(rest.tolist() + picked.tolist()) == list(range(400))
    out = {int(groups[i]) for i in picked}
    assert out.isdisjoint(int(groups[i]) for i in rest)
    assert [sum(group % 3 == c for group in out) for c in range(3)] == [3, 3, 3]
    expected = stratified_split(torch.arange(40) % 3, 0.2, seed=1)[1]
    assert out == {*expected.tolist()}
    alone = [f"{i:03}" for i in range(400)]
    assert all(a.equal(b) for a, b in zip(grouped_split(labels, alone, 0.3, 5), stratified_split(labels, 0.3, 5)))
    assert len(grouped_split(labels, ["one"] * 400, 0.5, 0)[1]) == 0
    assert len(grouped_split(torch.zeros(400, dtype=torch.int64), ["one"] * 400, 0.5, 0)[1]) == 0


@pytest.mark.parametrize("vessels", [5, 12, 40])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.5])
def test_groups_of_many_classes_keep_every_class_on_both_sides(vessels, fraction):
    """As vessels that all have all parts, one class being rare and one of a single vessel."""
    rng, worst = np.random.default_rng(vessels), 0.0
    for seed in range(10):
        group = rng.integers(0, vessels, 800)
        labels = rng.choice(6, 800, p=[0.4, 0.3, 0.15, 0.1, 0.03, 0.02])
        labels[labels == 5] = 0
        labels[np.flatnonzero(group == 0)[:3]] = 5
        names = [f"vessel{g}" for g in group]
        rest, picked = (part.numpy() for part in grouped_split(torch.from_numpy(labels), names, fraction, seed))
        again = grouped_split(torch.from_numpy(labels), names, fraction, seed)[1]
        assert again.tolist() == picked.tolist() and sorted([*rest, *picked]) == list(range(800))
        assert {*group[rest]}.isdisjoint(group[picked]) and (len(picked) == 0) == (fraction == 0)
        if fraction:
            assert {*labels[rest]} == {*range(6)} and {*labels[picked]} == {*range(5)}
        shares = [(labels[picked] == c).sum() / (labels == c).sum() for c in range(4)]
        worst = max(worst, *(abs(share - fraction) for share in shares))
    assert worst < {5: 0.21, 12: 0.12, 40: 0.12}[vessels], worst  # one of 5 vessels is 0.2
