"""Mistakes of the user: one line on stderr and exit status 2 instead of a traceback, also of many processes."""

import errno
import os
import re
import reprlib
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

from tqdm import tqdm

from runtime import signals
from runtime.text import printable

ADVICE = {  # what the user can do about what the system refuses
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EROFS: "choose another location",
    errno.EACCES: "choose another location, or change its permissions",
    errno.ENOTDIR: "choose another location",
    errno.ENAMETOOLONG: "choose a shorter name",
}
SHORT = reprlib.Repr()  # of any value: however deep or long it is, a message stays one line
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 90
SHORT.maxlevel = 3
LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|remote (worker|process)|gloo.*[Tt]imed out"
)
WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is )?((?:killed|exited)[^.]*)")
PATIENCE = 10.0  # seconds that a failed process has to report why


class UserError(Exception):
    """Something the user can fix. The message says in one line what is wrong, where, and what to do."""


class DiskFull(UserError):
    """There is no room, or no more for this user: whatever is written next cannot be written either."""


def shown(value) -> str:
    """A value of the user's in a message: as Python writes it, cut to 90 characters."""
    return cut(SHORT.repr(value))


def cut(text: str, width: int = 90) -> str:
    """At most `width` characters: of a longer text the beginning and the end."""
    return text if len(text) <= width else f"{text[: width - 33]}...{text[-30:]}"


@contextmanager
def keys_in(section: str, keys: Collection[str]) -> Iterator[None]:
    """Inside, a `UserError` that names keys `data.<key>` names those of `section`, which has the same keys."""
    try:
        yield
    except UserError as error:
        key = re.compile(rf"(?<![\w./-])data\.(?=(?:{'|'.join(map(re.escape, keys))})\b)")
        error.args = (key.sub(lambda _: f"{section}.", str(error)),)
        raise


def reason(error: OSError) -> str:
    """Why the system refused something, and what the user can do about it."""
    return f"{error.strerror or error}; {ADVICE.get(error.errno or 0, 'choose another location')}"


def run(main) -> None:
    """Call `main(argv)`; a `UserError` becomes `error: ...` and exit status 2, SIGTERM and Ctrl-C (`signals`) become
    one line and exit status 143 and 130.

    Under torchrun every cause has one line, however many processes it strikes; that a process has lost another one
    is not a cause, nor is the SIGTERM by which torchrun then ends the others.
    """
    signals.listen()
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        signals.hold()
        line, status = explain(error)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _leave_together(error, line, status)
        if line is None:
            raise
        with suppress(OSError):  # stderr may be a file on a full disk
            tqdm.write(line, file=sys.stderr)  # above a progress bar, not behind it
        sys.exit(status)
    finally:
        signals.hold()  # what is left is the interpreter's own end


def explain(error: BaseException) -> tuple[str | None, int]:
    """What to tell the user, and the exit status; (None, 1) of a bug, whose traceback is needed."""
    if isinstance(error, UserError):
        return f"error: {' '.join(printable(str(error)).split())}", 2
    if isinstance(error, signals.Stopped):
        return str(error), 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return "stopped; if there is a checkpoint, the same command resumes from it", 130
    if lacks_memory(error):
        why = cut(" ".join(printable(str(error)).split()), 280) if isinstance(error, MemoryError) else ""
        return f"error: {why or 'the memory is full: lower batch_size, data.size or data.workers'}", 2
    if one_value_per_channel(error):
        return "error: batch norm cannot train on one value per channel: raise batch_size or data.size", 2
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        how = "lower batch_size, data.size or predict.py's tile, or set precision=bf16"
        return f"error: the GPU's memory is full: {how}", 2
    if isinstance(error, RuntimeError) and (worker := WORKER.match(str(error))):
        how = "is the memory full? Lower data.workers; the same command resumes"
        if worker[1].endswith("Bus error"):
            how = "is the shared memory full? Make /dev/shm larger, or set data.workers=0"
        return f"error: a process that decodes images died ({worker[1].strip()}): {how}", 2
    if isinstance(error, OSError) and error.errno in ADVICE:
        what = f"cannot use {cut(str(error.filename or 'a file'))}: {error.strerror}"
        return f"error: {what}; {ADVICE[error.errno]}", 2
    return None, 1


def lacks_memory(error: BaseException) -> bool:
    """Whether the RAM is full, in the words of Python and NumPy, of the system, of torch, or of Pillow's decoders."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = str(error) if isinstance(error, OSError | RuntimeError) else ""
    return "can't allocate memory" in said or said.startswith("out of memory")


def one_value_per_channel(error: BaseException) -> bool:
    """Whether torch's batch norm raised it, which has no type of its own for what it cannot train on."""
    return isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel")


def _leave_together(error: BaseException, line: str | None, status: int) -> NoReturn:
    """End this process of several at once, without waiting for the others in a destructor; the first to meet a cause
    prints it, and torchrun ends those that wait for this one."""
    try:
        store = _torchrun_store()
        if line is None and isinstance(error, RuntimeError) and LOST.search(str(error)):
            deadline = time.monotonic() + PATIENCE
            while not store.add("scavenge/causes", 0) and time.monotonic() < deadline:
                time.sleep(0.05)
            if store.add("scavenge/causes", 0):
                signals.exit_at_once(2)
            line, status = (
                "error: another process of this run died without an error message; did it run out of memory?",
                2,
            )
        if isinstance(error, signals.Stopped) and store.add("scavenge/causes", 0):
            signals.exit_at_once(status)  # by torchrun's SIGTERM, when another process has reported why
        store.add("scavenge/causes", 1)
        new = store.add(f"scavenge/{line or os.environ.get('RANK')}", 1) == 1
    except Exception:  # another launcher than torchrun, or torchrun is gone: printing it twice is better than never
        new = True
    with suppress(OSError):  # of these, too, each may be a file on a full disk
        if new and line:
            bar_elsewhere = "\n" if os.environ.get("RANK") != "0" else ""
            tqdm.write(bar_elsewhere + line, file=sys.stderr)
        elif line is None:
            traceback.print_exception(error)
        sys.stderr.flush()
        sys.stdout.flush()
    signals.exit_at_once(status)


def _torchrun_store():
    """A connection of this process's own to the key-value store of torchrun, which outlives the processes."""
    from torch.distributed import TCPStore  # not at the top: importing torch has to wait for the scripts

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise RuntimeError("torchrun shares no store")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))


def leave(problem: UserError) -> NoReturn:
    """End this process of several from any of its threads, whatever the others do, with one line for the cause."""
    _leave_together(problem, *explain(problem))
