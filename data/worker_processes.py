"""The processes that decode or draw images: how they start, what signals do to them, and when one fails."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.connection import wait

from torch.utils.data import DataLoader

from runtime import signals
from runtime.errors import UserError

WATCH = 5.0  # seconds between two looks at what the processes do
# Python's other ways to start one import torch anew, and print a traceback in it when its parent is killed meanwhile.
START = "fork" if sys.platform == "linux" else None


def obey(_: int) -> None:
    """DataLoader's worker_init_fn."""
    signals.obey_parent()
    before = sys.excepthook

    def say(kind, error, where) -> None:
        if not isinstance(error, ConnectionError | EOFError):  # the parent was killed while it fetched a batch
            before(kind, error, where)

    sys.excepthook = say


def watched(loader: DataLoader) -> Iterator:
    """The loader's batches.

    Raises:
        UserError: the system says of one of its processes that it is stopped (SIGSTOP), at two looks in a row. One that
            only waits, as for a slow disk, has all the time it takes.
        RuntimeError: one of them has died, in the words of torch, which `errors.explain` knows.
    """
    others = active_children()
    with signals.blocked():  # its processes go on until this one, which first finishes its step, tells them to end
        batches = iter(loader)
        processes = [child for child in active_children() if child not in others]
        watch = Watch([process.pid for process in processes])
        if processes:  # without memory for it, Python waits for ever for a thread's start
            watch.start()
    try:
        for batch in batches:
            if watch.stopped:
                names = ", ".join(map(str, watch.stopped))
                raise UserError(
                    f"process {names}, which decodes images, was stopped (SIGSTOP); "
                    "the same command resumes, with data.workers=0 without such processes"
                )
            yield batch
    except (OSError, EOFError) as error:  # a batch was announced and cannot be fetched any more
        closed = wait([process.sentinel for process in processes], 1.0)
        for process in processes:
            if process.sentinel in closed:  # its files are closed, and in a moment it has ended
                process.join(1.0)
        dead = [process.pid for process in processes if not process.is_alive()]
        if dead:
            raise RuntimeError(f"DataLoader worker (pid {dead[0]}) exited unexpectedly") from error
        raise
    finally:
        watch.done.set()
        del batches  # ends its processes


class Watch(threading.Thread):
    """Lets stopped processes go on, and keeps their numbers in `stopped`.

    Who waits for a batch of a stopped process does so without a limit when it is already announced, in a call of the
    system, so this needs a thread.
    """

    def __init__(self, processes: list[int | None]):
        super().__init__(daemon=True)
        self.processes, self.stopped, self.done = processes, [], threading.Event()

    def run(self) -> None:
        before = set()
        while not self.done.wait(WATCH):
            now = {process for process in self.processes if signals.state_of(process) == "T"}
            for process in now & before:  # twice: after Ctrl-Z, this process may go on a moment before the others
                self.stopped.append(process)
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
            before = now
