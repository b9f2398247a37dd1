"""The queue against a list that forgets its oldest entry: wrapping, holding, narrow types, resuming, processes."""

from collections import deque

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from losses.info_nce import queue_nce
from models.ssl.queue import Queue, suitable_length
from runtime.errors import UserError
from tests.processes import run_processes


def contents(queue):
    """[(row, label)] from the oldest to the newest."""
    shift = -int(queue.oldest)
    return list(zip(queue.rows.roll(shift, 0).tolist(), queue.labels.roll(shift, 0).tolist()))


def unit(x):
    """Rows of unit length in float64, one by one."""
    return torch.stack([row.double() / row.double().norm() for row in x])


def test_starts_with_random_rows_of_unit_length_and_no_labels():
    queue = Queue(1000, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(1000))
    assert queue.rows.dtype == torch.float32 and len(queue.rows.unique(dim=0)) == 1000
    # The mean of 1000 random directions is short: its square is 1 / 1000 on average
    assert queue.rows.mean(0).norm() < 0.1
    assert torch.equal(queue.labels, torch.full((1000,), -1)) and queue.labels.dtype == torch.int64


@pytest.mark.parametrize("length, batches", [(7, [3] * 8), (7, [7] * 3), (7, [1] * 9), (6, [3] * 5), (1, [1, 1])])
@pytest.mark.parametrize("labelled", [False, True])
def test_keeps_the_last_ones_of_equal_batches(length, batches, labelled):
    assert_forgets_the_oldest(length, batches, [labelled] * len(batches))


def test_keeps_the_last_ones_of_batches_of_any_length():
    assert_forgets_the_oldest(7, [3, 7, 1, 5, 0, 6, 2, 7, 4], [True, False, False, True, True, False, True, True, True])


def assert_forgets_the_oldest(length, batches, labelled):
    queue = Queue(length, 4).double()
    expected = deque(contents(queue), maxlen=length)
    for number, with_labels in zip(batches, labelled):
        embeddings, labels = torch.randn(number, 4, dtype=torch.float64), torch.randint(9, (number,))
        queue.hold(embeddings, labels if with_labels else None)
        queue.push()
        for row, label in zip(embeddings, labels.tolist()):
            expected.append(((row / row.norm()).tolist(), label if with_labels else -1))
        rows, numbers = zip(*contents(queue))
        torch.testing.assert_close(torch.tensor(rows), torch.tensor([row for row, _ in expected]))
        assert list(numbers) == [label for _, label in expected]


def test_holding_changes_nothing_and_only_the_first_hold_is_pushed_once():
    queue = Queue(5, 3)
    queue.push()  # nothing held
    start = {name: buffer.clone() for name, buffer in queue.state_dict().items()}
    first, second = torch.randn(2, 2, 3)
    queue.hold(first, torch.tensor([1, 2]))
    queue.hold(second, torch.tensor([3, 4]))
    assert all(torch.equal(buffer, start[name]) for name, buffer in queue.state_dict().items())
    queue.push()
    pushed = {name: buffer.clone() for name, buffer in queue.state_dict().items()}
    torch.testing.assert_close(queue.rows[:2].double(), unit(first))  # SAM's second pass comes after
    assert torch.equal(queue.rows[2:], start["rows"][2:])
    assert queue.labels.tolist() == [1, 2, -1, -1, -1] and queue.oldest == 2
    queue.push()  # held no longer
    assert all(torch.equal(buffer, pushed[name]) for name, buffer in queue.state_dict().items())


def test_what_is_held_is_a_copy_without_gradient():
    queue = Queue(5, 3)
    embeddings = torch.randn(2, 3, requires_grad=True)
    loss = queue_nce(embeddings, embeddings.detach(), queue.rows, 0.2)
    expected = unit(embeddings.detach())
    queue.hold(embeddings)
    loss.backward()  # the queue that the loss met is still there
    with torch.no_grad():
        embeddings.zero_()
    queue.push()
    assert not queue.rows.requires_grad
    torch.testing.assert_close(queue.rows[:2].double(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3000])  # float16's squares end at 65504
def test_low_precision_is_normalized_in_float32(dtype, size):
    queue, embeddings = Queue(5, 16), (size * torch.randn(3, 16)).to(dtype)
    with torch.autocast("cpu", dtype):
        queue.hold(embeddings)
        queue.push()
    assert queue.rows.dtype == torch.float32
    torch.testing.assert_close(queue.rows[:3].double(), unit(embeddings), rtol=1e-6, atol=1e-7)


def test_too_short_a_queue():
    queue = Queue(5, 3)
    with pytest.raises(UserError, match="makes 6 embeddings and the queue holds 5: make it longer, or batch_size smal"):
        queue.hold(torch.randn(6, 3))
    queue.hold(torch.randn(5, 3))  # exactly as long


@pytest.mark.parametrize("pushes", [2, 3])
def test_goes_on_from_its_state(pushes):
    one, other = Queue(5, 3), Queue(5, 3)
    steps = [torch.randn(2, 3) for _ in range(6)]
    for embeddings in steps[:pushes]:
        one.hold(embeddings, torch.arange(2))
        one.push()
    state = one.state_dict()
    assert set(state) == {"rows", "labels", "oldest"} and not list(one.parameters())
    other.load_state_dict(state)
    for queue in (one, other):
        for embeddings in steps[pushes:]:
            queue.hold(embeddings, torch.arange(2, 4))
            queue.push()
    assert all(torch.equal(buffer, other.state_dict()[name]) for name, buffer in one.state_dict().items())


def test_reads_no_value_on_the_host_and_stays_on_the_device():
    with FakeTensorMode(), torch.device("cuda"):  # a fake tensor has no values: whatever asks for one raises
        queue = Queue(8, 3)
        for labels in (None, torch.arange(5)):
            queue.hold(torch.randn(5, 3), labels)
            queue.push()
        assert queue.rows.is_cuda and queue.labels.is_cuda and queue.oldest.is_cuda
        with pytest.raises(Exception, match="local_scalar_dense"):
            queue.oldest.item()


def on_a_shard(rank, world_size):
    """The buffers after each of five steps of eight embeddings, and what too many say."""
    torch.manual_seed(3)
    queue, results = Queue(13, 4).double(), []
    mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for step in range(5):
        embeddings, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(9, (8,))
        queue.hold(embeddings[mine], labels[mine] if step % 2 else None)
        queue.push()
        results.append({name: buffer.clone() for name, buffer in queue.state_dict().items()})
    try:
        queue.hold(torch.randn(16, 4, dtype=torch.float64)[: 16 // world_size])
    except UserError as error:
        return results, str(error)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_process_holds_what_one_would_in_the_order_of_ranks(world_size):
    expected, message = on_a_shard(0, 1)
    assert "makes 16 embeddings and the queue holds 13" in message
    for results, error in run_processes(on_a_shard, world_size):
        assert error == message
        for ours, theirs in zip(results, expected):
            assert all(torch.equal(ours[name], theirs[name]) for name in ("rows", "labels", "oldest"))


def test_a_suitable_length_is_below_the_number_of_images():
    """lightly-train's table, ends included."""
    expected = {1: 16, 50: 16, 51: 32, 100: 32, 101: 64, 918: 256, 1000: 256, 1001: 512, 40_000: 8192, 40_001: 16384}
    expected |= {200_000: 32768, 200_001: 65536, 10**7: 65536}
    assert {n: suitable_length(n) for n in expected} == expected
    assert all(suitable_length(n) < n for n in range(17, 300))
