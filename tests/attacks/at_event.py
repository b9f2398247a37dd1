"""A script that is killed, stopped or counted at its k-th change of a folder, by Python's audit events.

    python tests/attacks/at_event.py <kill | stop | count> <k> <folder> <script.py> <its words>

A change is a file opened for writing, a file or folder renamed, removed or made, in the folder or below; it is met just
before it is made, in this process. TensorBoard's events, which a thread writes when it likes, do not count. The last
line on stderr is their number. The cells of a sweep are forked from it: a forkserver would import everything again.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from multiprocessing import get_context

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ACTIONS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "count": 0}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


def meet(which: int, folder: str, act) -> list[int]:
    """Call `act()` just before the `which`-th change; the list's one item counts them."""
    met, lock, inside, process = [0], threading.Lock(), folder.rstrip("/") + "/", os.getpid()

    def hook(event: str, args: tuple) -> None:
        if event not in CHANGES and not (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if os.getpid() != process:  # forked from it
            return
        relative = event in ("os.remove", "os.rmdir") and args[1] >= 0  # shutil.rmtree, by a folder's descriptor
        if not (relative or (path + "/").startswith(inside)) or "tfevents" in path:
            return
        with lock:
            met[0] += 1
            now = met[0] == which
        if now:
            act()

    sys.addaudithook(hook)
    return met


def main(argv: list[str]) -> None:
    action, which, folder, *words = argv
    met = meet(int(which), folder, lambda: os.kill(os.getpid(), ACTIONS[action]))
    sys.argv, forked = words, multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked if words[0] == "sweep.py" else get_context(method)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        print(f"\nchanges: {met[0]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
