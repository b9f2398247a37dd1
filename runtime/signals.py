"""SIGTERM and Ctrl-C: a script ends in one line, a training loop only after its step, so that it can save.

`errors.run` listens, and the cell of a sweep; a program that imports ours, as a notebook does, keeps its own handlers.
The first signal raises `Stopped` wherever the main thread is; while `hold` is in force it is only kept in `received`.
A second one ends the process at once, and so does one that comes before `errors.run`, while a script imports torch.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
LOOK = 5.0  # seconds between two looks at whether the parent still runs
SAME = 2.0  # seconds in which a further signal is the same one: the terminal, torchrun and a sweep may each send theirs
BEFORE_EXIT: list[Callable[[], object]] = []  # what `exit_at_once` calls: it skips Python's atexit

received = 0  # number of the first signal
_last = 0.0  # when the last one came
_holding = False
_starting = False


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ends this process. As KeyboardInterrupt it is no Exception, so that nothing takes it for an
    error and goes on."""

    def __init__(self, number: int, where: str = "; if there is a checkpoint, the same command resumes from it"):
        super().__init__(f"stopped by {NAMES[signal.Signals(number)]}{where}")
        self.number = number


def listen() -> None:
    """From now on a signal raises `Stopped`, also one that came while this process was started `blocked`. One that is
    ignored, as Ctrl-C under nohup, stays so."""
    global _starting
    _starting = False
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _take)
    signal.signal(signal.SIGALRM, _raise)
    sys.unraisablehook = _raise_later
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NAMES)


def hold() -> None:
    """The first signal no longer raises: who calls this looks at `received` when a whole step is done, or is ending."""
    global _holding
    _holding = True


def release() -> None:
    """The end of `hold`; raises `Stopped` if a signal has come."""
    global _holding
    _holding = False
    if received:
        raise Stopped(received)


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started inside see these signals once they `listen` (but see `obey_parent`), this one at the
    end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NAMES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent() -> None:
    """In a process of `multiprocessing`: Ctrl-C does nothing, SIGTERM ends it if its parent sent it, and so does the
    end of its parent, which may be killed.

    Both go to all processes of a group, from a terminal, torchrun, `timeout` or a batch system; a process that decodes
    images has to go on until its parent's step is done.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    above = os.getppid()

    def wait() -> None:
        while parent.is_alive() and os.getppid() == above:  # it may have ended before this was called
            sent = signal.sigtimedwait({signal.SIGTERM}, LOOK)
            if sent and sent.si_pid == parent.pid:
                break
        os._exit(0)

    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=wait, daemon=True).start()
    else:  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def exit_at_once(status: int) -> NoReturn:
    """End this process from any of its threads, whatever the others do; no lock or unfinished file stays behind."""
    for call in BEFORE_EXIT:
        call()
    os._exit(status)


def state_of(process: int | None) -> str:
    """The system's letter for what a process does: R, S, D, T (stopped), Z (has ended); empty where it cannot be asked,
    or there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _take(number: int, _frame) -> None:
    """The handler."""
    global received, _last
    now, before = time.monotonic(), _last
    if received and now - before < SAME:
        return
    again, received, _last = received != 0, received or number, now
    if again or _starting:
        _end_at_once(number)
    if not _holding:
        raise Stopped(number)


def _end_at_once(number: int) -> NoReturn:
    for child in multiprocessing.active_children():
        child.kill()
    again = " for the second time" if received and not _starting else ""
    os.write(2, f"stopped at once by {NAMES[signal.Signals(number)]}{again}\n".encode())
    exit_at_once(128 + number)


def _raise(_number: int, _frame) -> None:
    if not _holding:
        raise Stopped(received)


def _raise_later(ignored) -> None:
    """sys.unraisablehook: Python drops what is raised in a destructor, so that the signal has to come once more."""
    if isinstance(ignored.exc_value, Stopped):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(ignored)


def _is_script() -> bool:
    """Whether this process was started with a script that `errors.run` runs."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        return path is not None and "errors.run(main)" in Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


if _is_script():  # it imports torch first, and an end of that leaves nothing behind
    listen()
    _starting = True
