"""Worker processes of a loader that are killed, stopped or slow."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import reduction

import pytest
import torch

from data import loading, worker_processes
from runtime import errors
from runtime.errors import UserError


class Numbers:
    """Item i is an image of the number i; worker processes are asked to wait in item `slow`."""

    def __init__(self, slow: int = -1, seconds: float = 0):
        self.slow, self.seconds, self.labels = slow, seconds, torch.arange(40)

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == self.slow:
            time.sleep(self.seconds)
        return torch.full((3, 2, 2), i, dtype=torch.uint8), int(self.labels[i]), i


def epoch(dataset, workers: int = 2):
    return loading.Loader(dataset, 2, "cpu", cache="none", workers=workers).epoch(0)


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_a_stopped_worker_ends_the_run_in_one_line_and_leaves_no_process(monkeypatch):
    monkeypatch.setattr(worker_processes, "WATCH", 0.2)
    batches = epoch(Numbers(slow=20, seconds=0.1))
    next(batches)
    stopped = workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(UserError, match=rf"^process {stopped}, which decodes .* was stopped \(SIGSTOP\)"):
        list(batches)
    deadline = time.monotonic() + 30
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() == []


def test_a_worker_that_is_slow_or_was_stopped_for_a_moment_is_waited_for(monkeypatch):
    monkeypatch.setattr(worker_processes, "WATCH", 0.1)
    batches = epoch(Numbers(slow=20, seconds=1.0))
    first = next(batches)[2]
    for worker in workers():
        os.kill(worker, signal.SIGSTOP)
        os.kill(worker, signal.SIGCONT)
    rest = [batch[2] for batch in batches]
    assert torch.cat([first, *rest]).tolist() == list(range(40))


def test_a_killed_worker_is_one_line():
    batches = epoch(Numbers(slow=20, seconds=0.5))
    with pytest.raises(RuntimeError) as raised:
        next(batches)
        os.kill(workers()[0], signal.SIGKILL)
        list(batches)
    line, status = errors.explain(raised.value)
    assert status == 2 and line.startswith("error: a process that decodes images died (") and "data.workers" in line


def test_workers_outlive_the_signals_of_a_group_and_end_with_their_parent():
    """Ctrl-C and the SIGTERM of torchrun, `timeout` and batch systems go to workers too, while the step is finished."""
    batches = epoch(Numbers(slow=30, seconds=0.3))
    first, children = next(batches)[2], workers()
    for worker in children:
        os.kill(worker, signal.SIGINT)
    assert torch.cat([first, *(batch[2] for batch in batches)]).tolist() == list(range(40))
    batches = epoch(Numbers())
    next(batches)
    sender = multiprocessing.get_context("fork").Process(target=_terminate, args=(workers(),))
    sender.start()
    sender.join()
    assert sum(len(batch[2]) for batch in batches) == 38
    batches = epoch(Numbers())
    next(batches)
    for worker in (children := multiprocessing.active_children()):
        worker.terminate()  # of the parent
    for worker in children:
        worker.join(30)
        assert worker.exitcode == 0
    with pytest.raises(RuntimeError):
        list(batches)


def _terminate(processes: list[int]) -> None:
    for process in processes:
        os.kill(process, signal.SIGTERM)


def lose_a_parent(obeys: bool) -> None:
    """As in a worker whose parent is killed while it asks for a batch's file: the connection ends in the middle."""
    if obeys:
        worker_processes.obey(0)
    (read, write), hook = os.pipe(), sys.excepthook
    seen, taken = threading.Event(), reduction.DupFd(read)

    def watched(*about) -> None:
        hook(*about)
        seen.set()

    sys.excepthook = watched
    with socket.socket(socket.AF_UNIX) as parent:
        parent.connect(taken._id[0])
    assert seen.wait(30)
    os.close(write)


@pytest.mark.skipif(sys.platform != "linux", reason="how a worker hands over a batch there")
def test_a_worker_whose_parent_is_killed_says_nothing(capfd):
    for obeys in (False, True):
        process = multiprocessing.get_context("fork").Process(target=lose_a_parent, args=(obeys,))
        process.start()
        process.join(60)
        assert process.exitcode == 0 and ("Traceback" in capfd.readouterr().err) != obeys
