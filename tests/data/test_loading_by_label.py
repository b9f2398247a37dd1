"""Batches of one label each: what they hold, their order, what is left out, several processes."""

import pytest
import torch

import data.loading
from data.loading import Loader
from runtime.errors import UserError
from tests.data.test_loading import Numbers, flat, order
from tests.processes import run_processes

TRAINING = {"shuffle": True, "seed": 5, "drop_last": True, "by_label": True}


class Labelled(Numbers):
    """Labels in no order, as often as `counts` says."""

    def __init__(self, counts):
        super().__init__(sum(counts))
        labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)])
        self.labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def test_batches_of_one_label():
    """All of a label's items in chunks, the last one smaller, shuffled within labels and among chunks."""
    dataset = Labelled([10, 3, 1, 8])
    loader = Loader(dataset, 4, "cpu", shuffle=True, by_label=True)
    seen, epochs = set(), []
    for epoch in range(30):
        batches = order(loader, epoch)
        labels = [{int(dataset.labels[i]) for i in batch} for batch in batches]
        assert all(len(label) == 1 for label in labels) and sorted(flat(batches)) == list(range(22))
        sizes = sorted((label.pop(), len(batch)) for label, batch in zip(labels, batches))
        assert sizes == [(0, 2), (0, 4), (0, 4), (1, 3), (2, 1), (3, 4), (3, 4)] and len(batches) == len(loader) == 7
        seen.add(tuple(int(dataset.labels[batch[0]]) for batch in batches))
        epochs.append({tuple(sorted(batch)) for batch in batches})
    assert len(seen) > 20 and len({frozenset(e) for e in epochs}) == 30  # other orders and other company
    assert order(loader, 5) == order(Loader(dataset, 4, "cpu", shuffle=True, by_label=True), 5)
    assert order(loader, 5, 3) == order(loader, 5)[3:]
    still = order(Loader(dataset, 4, "cpu", by_label=True))
    assert [int(dataset.labels[batch[0]]) for batch in still] == [0, 0, 0, 1, 2, 3, 3]
    assert all(batch == sorted(batch) for batch in still)


def test_drop_last_by_label_leaves_out_what_has_no_company():
    dataset, options = Labelled([9, 3, 1, 8]), {"shuffle": True, "drop_last": True, "by_label": True}
    loader = Loader(dataset, 4, "cpu", **options)
    assert len(loader) == 5 and all(sorted(map(len, order(loader, e))) == [3, 4, 4, 4, 4] for e in range(5))
    some = Loader(dataset, 4, "cpu", indices=(dataset.labels == 1).nonzero()[:, 0], **options)
    assert [len(batch) for batch in order(some, 2)] == [3]
    for lonely in (Loader(Labelled([1, 1]), 4, "cpu", **options), Loader(Labelled([3]), 1, "cpu", **options)):
        with pytest.raises(UserError, match="no batch of one class has 2 images: raise batch_size"):
            len(lonely)


def batches_of_rank(rank, world_size):  # noqa: ARG001
    return order(Loader(Labelled([10, 3, 1, 7]), 6 // world_size, "cpu", **TRAINING), 1)


def test_two_processes_see_one_process_batches():
    """Every process has an image at every step."""
    one, halves = order(Loader(Labelled([10, 3, 1, 7]), 6, "cpu", **TRAINING), 1), run_processes(batches_of_rank, 2)
    assert sorted(map(len, one)) == [3, 4, 6, 6] and [a + b for a, b in zip(*halves, strict=True)] == one
    assert all(0 <= len(a) - len(b) <= 1 and b for a, b in zip(*halves))


def test_a_rest_that_cannot_be_shared_is_left_out(monkeypatch):
    monkeypatch.setattr(data.loading, "world_size", lambda: 3)
    monkeypatch.setattr(data.loading, "rank", lambda: 0)
    assert len(Loader(Labelled([5, 2]), 1, "cpu", **TRAINING)) == 1  # 3 of the 5; rests of 2 are too few for 3 ranks
    with pytest.raises(UserError, match="no batch of one class has 3 images"):
        len(Loader(Labelled([2, 2]), 1, "cpu", **TRAINING))
