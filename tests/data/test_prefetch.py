"""Batches copied one ahead: order, errors, and what waits for what, with stand-ins for streams of a GPU."""

from contextlib import contextmanager

import pytest
import torch

from data.loading import prefetch

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_on_the_cpu_batches_are_handed_on_when_asked_for():
    batches, asked = [(torch.full((3,), k), torch.tensor([k])) for k in range(4)], []
    for k, batch in enumerate(prefetch((asked.append(k) or batch for k, batch in enumerate(batches)), CPU)):
        assert batch is batches[k] and asked == list(range(k + 1))
    assert len(asked) == 4 and list(prefetch([], CPU)) == []


class Column:
    """A tensor's stand-in: notes where it is copied and whose stream must be done before its memory is used again."""

    def __init__(self, name, notes, device="cpu"):
        self.name, self.notes, self.device = name, notes, device

    def to(self, device, non_blocking):
        assert non_blocking
        self.notes.append(f"copy {self.name} on {self.notes.current}")
        return Column(self.name, self.notes, device)

    def record_stream(self, stream):
        assert self.device == CUDA
        self.notes.append(f"{self.name} kept for {stream.name}")


class Stream:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")


class Notes(list):
    current = "main"  # name of the current stream


@pytest.fixture
def notes(monkeypatch):
    notes = Notes()

    @contextmanager
    def within(stream):
        before, notes.current = notes.current, stream.name
        yield
        notes.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", notes))  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(notes.current, notes))  # noqa: ARG005
    return notes


def asked_for(n, notes, error_at=None):
    for k in range(n):
        notes.append(f"ask for {k}")
        if k == error_at:
            raise RuntimeError(f"batch {k} is broken")
        yield (Column(f"images {k}", notes), Column(f"labels {k}", notes), k)


def arrival(k):
    return ["main waits for side", f"images {k} kept for main", f"labels {k} kept for main"]


def copies(k):
    return [f"ask for {k}", f"copy images {k} on side", f"copy labels {k} on side"]


def test_the_next_copy_starts_before_a_batch_is_used_but_after_the_wait(notes):
    for images, labels, k in prefetch(asked_for(3, notes), CUDA):
        assert images.device == labels.device == CUDA and notes.current == "main"
        notes.append(f"use {k}")
    ask, *copy = copies(1)
    first = [*copies(0), ask, *arrival(0), *copy, "use 0"]
    ask, *copy = copies(2)
    assert notes == [*first, ask, *arrival(1), *copy, "use 1", *arrival(2), "use 2"]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_all_batches_come_in_order(notes, n):
    assert [(images.name, k) for images, _, k in prefetch(asked_for(n, notes), CUDA)] == [
        (f"images {k}", k) for k in range(n)
    ]


@pytest.mark.parametrize(("device", "seen"), [(CPU, [0, 1]), (CUDA, [0])])
def test_errors_pass_through(notes, device, seen):
    """On a GPU one batch early, as the broken one is asked for ahead."""
    found = []
    with pytest.raises(RuntimeError, match="batch 2 is broken"):
        found.extend(k for *_, k in prefetch(asked_for(4, notes, error_at=2), device))
    assert found == seen and notes.current == "main"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("busy", [0, 3_000_000])  # clock ticks: the caller's stream reads at once, or long afterwards
def test_copies_on_a_gpu_are_whole_and_not_overwritten(busy):
    batches = [(torch.full((2**22,), k, dtype=torch.int32).pin_memory(), torch.tensor([k])) for k in range(30)]
    lowest, highest, indices = [], [], []
    for values, index in prefetch(batches, CUDA):
        assert values.device == CUDA and index.device == CPU
        torch.cuda._sleep(busy)
        lowest.append(values.min())
        highest.append(values.max())
        indices.append(int(index))
        del values
    assert [int(x) for x in lowest] == [int(x) for x in highest] == indices == list(range(30))
