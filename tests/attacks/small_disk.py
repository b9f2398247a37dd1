"""A disk of any size, really full when it is full: a tmpfs in a mount namespace of its own.

Root is not needed where users may make namespaces, and nothing is left on the machine: the kernel removes the disk with
the last process that sees it. Where nobody may mount anything, a limit on the size of a file takes its place.
"""

import ctypes
import multiprocessing
import os
import resource
import shutil
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

from tests import processes

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)
READ_ONLY, REMOUNT, RECURSIVE, PRIVATE = 1, 32, 0x4000, 0x40000  # of mount(2)
BLOCK = 4096  # bytes; of tmpfs
PATIENCE = 120  # seconds that a script may take


class SmallDisk:
    """Scripts that `run` starts have a file system of their own at `path`, an empty folder for everyone else.

    `is_real` is False where that is not allowed: then a file, and not all of them together, is at most `size` large.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True)
        processes._start_server()
        self.pipe, theirs = multiprocessing.Pipe()
        args = path, theirs, dict(os.environ)
        self.server = multiprocessing.get_context("forkserver").Process(target=_serve, args=args)
        self.server.start()
        theirs.close()
        self.is_real = self.pipe.recv()

    def _ask(self, name: str, *args, **options):
        self.pipe.send((name, args, options))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def empty(self, **options) -> None:
        """A new disk; options of tmpfs: `size` in bytes, `nr_inodes`."""
        self._ask("empty", **options)

    def change(self, *, read_only: bool = False, **options) -> None:
        """Other options for the disk with its files; without any, there is room."""
        self._ask("change", read_only=read_only, **options)

    def run(self, words: list[str], out: Path) -> int:
        """Exit status of a script that prints into the files `out` and `out`.err."""
        return self._ask("run", words, [out], [{}])[0]

    def run_ranks(self, words: list[str], out: Path, environments: list[dict]) -> list[int]:
        """Exit statuses of a script's processes, of which rank 0 prints into the files `out`0 and `out`0.err."""
        outs = [out.with_name(f"{out.name}{rank}") for rank in range(len(environments))]
        return self._ask("run", words, outs, environments)

    def needed(self) -> int:
        """The smallest size with which its files could be there, in bytes; a multiple of `BLOCK`."""
        return self._ask("needed")

    def copy(self, to: Path) -> Path:
        """All files, copied to where others see them."""
        return self._ask("copy", to)

    def close(self) -> None:
        self.pipe.close()
        self.server.join()


class _Tmpfs:
    """What the server does of what a `SmallDisk` is asked, in a mount namespace of its own."""

    is_real = True

    def __init__(self, path: Path):
        self.path, self.limit = path, None
        user, group = os.getuid(), os.getgid()
        libc = self.libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_MOUNTS):  # not root: become it, in a namespace of users
            _call(libc.unshare(NEW_USER | NEW_MOUNTS))
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _call(libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None))
        self._mount(0, {})

    def _mount(self, flags: int, options: dict) -> None:
        words = ",".join(f"{key}={value}" for key, value in options.items()).encode()
        _call(self.libc.mount(b"tmpfs", os.fsencode(self.path), b"tmpfs", flags, words))

    def empty(self, **options) -> None:
        _call(self.libc.umount2(os.fsencode(self.path), 0))
        self._mount(0, options)

    def change(self, *, read_only: bool, **options) -> None:
        self._mount(REMOUNT | (READ_ONLY if read_only else 0), {"size": 2**30, "nr_inodes": 10_000} | options)

    def needed(self) -> int:
        disk = os.statvfs(self.path)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize

    def copy(self, to: Path) -> Path:
        return shutil.copytree(self.path, to, symlinks=True)

    def run(self, words: list[str], outs: list[Path], environments: list[dict]) -> list[int]:
        if words[0] == "sweep.py" and self.is_real:
            processes._start_server()
        started = []
        for out, more in zip(outs, environments):
            args = self.limit, words, os.environ | more, str(out), processes.TOP
            started.append(multiprocessing.get_context("fork").Process(target=_limited, args=args))
            started[-1].start()
        deadline = time.monotonic() + PATIENCE
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()  # one that takes too long
            process.join()
        return [process.exitcode for process in started]


class _LimitOnFiles(_Tmpfs):
    """The same where nothing can be mounted."""

    is_real = False

    def __init__(self, path: Path):
        self.path, self.limit = path, None

    def empty(self, *, size: int | None = None) -> None:
        for path in self.path.iterdir():
            shutil.rmtree(path)
        self.limit = size

    def change(self, *, read_only: bool, size: int | None = None) -> None:
        assert not read_only
        self.limit = size

    def needed(self) -> int:
        sizes = [path.stat().st_size for path in self.path.rglob("*") if path.is_file()]
        return -(-max(sizes) // BLOCK) * BLOCK


def _serve(path: Path, pipe, environment: dict) -> None:
    """In a process of its own: do what is asked until nobody asks any more."""
    processes._take(environment)
    try:
        disk = _Tmpfs(path)
    except OSError:
        disk = _LimitOnFiles(path)
    # A sweep's cells are forked from a server in this namespace, not from the one that this process is from.
    server = forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._inherited_fds = None
    pipe.send(disk.is_real)
    with suppress(EOFError):
        while True:
            name, args, options = pipe.recv()
            try:
                pipe.send(getattr(disk, name)(*args, **options))
            except Exception as error:
                pipe.send(error)


def _call(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _limited(limit: int | None, *script) -> None:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        forkserver._forkserver._forkserver_pid = None  # a sweep's cells come from a server that has the limit, too
    forkserver._forkserver.ensure_running = lambda: None  # it does, but for this process's parent
    processes._script(*script)
