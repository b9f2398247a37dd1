"""Files that have their name only once they are complete, folders in which one process writes at a time, what killed
processes left behind; reading of files, and of nothing else that has a name."""

import atexit
import errno
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from runtime import signals
from runtime.errors import DiskFull, UserError, cut, reason
from runtime.text import printable, say_once

LOCK = ".lock"  # in a folder in which a process writes; its text says which one
REMOVING = ".removing"  # in a folder whose other files are being removed
PATIENCE = 3.0  # seconds for a process that is about to end, as the cell of a killed sweep
_unfinished: set[Path] = set()  # temporary files that this process is writing
_locks: dict[str, tuple[int, int]] = {}  # real path of a folder: descriptor of its lock, and the process that holds it

NOT_FILES = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: str | Path, mode: str = "rb", **text: Any) -> IO:
    """As `open` for reading, but only of a regular file, or of a link to one: a FIFO would keep the reader waiting, and
    a device may never end.

    Raises:
        OSError: it is something else, which `strerror` names; whatever `open` raises.
    """
    return open(path, mode, opener=_open_regular, **text)


def _open_regular(path: str, flags: int) -> int:
    _require_regular(os.stat(path), path)  # before it is opened, which alone makes some devices do something
    file = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # does not wait, should it have become a FIFO since
    try:
        _require_regular(os.fstat(file), path)
    except OSError:
        os.close(file)
        raise
    return file


def _require_regular(status: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        kind = NOT_FILES.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", path)


@contextmanager
def whole_file(path: str | Path, mode: str = "w", *, durable: bool = False) -> Iterator[IO]:
    """A file, of text (UTF-8) or with mode "wb" of bytes, that has its name only once all is written.

    After an error or Ctrl-C it is gone and what had the name before is untouched; after a kill, what had been flushed
    is beside it under a temporary name until `remove_unfinished`. Makes the folder. A disk that is full is `DiskFull`,
    a read-only one a `UserError`; so is, before anything is written, a name that is too long or that of a folder.

    Args:
        durable: also after a power cut the file is the old one or the new one, whole: content and name are on the disk
            when this returns. It costs some milliseconds; for what later starts rely on.
    """
    path, temporary = Path(path), None
    text: dict[str, Any] = {} if "b" in mode else {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    try:
        with suppress(FileExistsError):  # a file where the folder should be, for which the error below is clearer
            path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = temporary_name(path)
        _unfinished.add(temporary)
        with open(temporary, mode, **text) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        if temporary and (temporary.is_file() or temporary.is_symlink()):
            temporary.unlink()
        if isinstance(error, OSError):
            kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            what = f"cannot write {cut(str(path), 150)}: {reason(error)}"
            raise kind(f"{what}; nothing under that name was changed") from None
        raise
    finally:
        _unfinished.discard(temporary)


def _sync_folder(folder: Path) -> None:
    """Bring the names in it onto the disk, where its file system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove_unfinished(folder: Path, *, below: bool = False, alone: bool = False) -> None:
    """Remove what killed processes left under a `temporary_name` in this folder, and with `below` in those in it.

    Whether a process still runs can be asked only on its own machine, so files of other machines stay. `alone`: this
    process has locked the folder, so that all of them are left over, whatever runs under their processes' numbers now.
    """
    found = folder.glob(f"{'**/' if below else ''}*.unfinished-*") if os.path.isdir(folder) else ()
    for path in found:
        writer = re.fullmatch(r".*\.unfinished-(.+)-(\d+)", path.name, re.DOTALL)
        if writer and (alone or (writer[1] == platform.node() and not _runs(int(writer[2])))):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def temporary_name(path: Path) -> Path:
    """A name beside `path` that says which process writes it; short where the folder allows no longer one."""
    mark = f".unfinished-{platform.node()}-{os.getpid()}"
    if len(os.fsencode(path.name + mark)) <= os.pathconf(path.parent, "PC_NAME_MAX"):
        return path.with_name(path.name + mark)
    return path.with_name(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16] + mark)


def _runs(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if process == os.getpid():  # written by an earlier process with the same number, as in a container
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; a number that no process can have
        return True
    return True


def lock(folder: Path, *own: str) -> None:
    """Make this process the only one that writes in a folder until `unlock` or its end, however it ends.

    Makes the folder, and removes what killed processes left unfinished in it and in and below its folders `own`. The
    lock is the kernel's, on the file `LOCK`: POSIX's kind, which a forked process does not inherit and so cannot keep.
    Where the file system has none, a line on stderr says so. A second call by the same process changes nothing.

    Raises:
        UserError: another process holds it, and nothing was changed; or the folder cannot be made.
    """
    place = os.path.realpath(folder)
    if place in _locks:
        return
    try:
        _make(folder)
        descriptor = _locked(folder)
    except OSError as error:
        raise UserError(f"cannot write in {cut(str(folder))}: {reason(error)}") from None
    if descriptor is not None:
        _locks[place] = descriptor, os.getpid()
    alone = descriptor is not None
    remove_unfinished(folder, alone=alone)
    for name in own:
        remove_unfinished(folder / name, below=True, alone=alone)


def unlock(folder: Path | None = None) -> None:
    """Let other processes write in the folder, or in all that this process has locked."""
    for place in [os.path.realpath(folder)] if folder else list(_locks):
        descriptor, process = _locks.pop(place, (-1, -1))
        if process == os.getpid():  # else it is the lock of the process that forked this one
            with suppress(OSError):
                if os.fstat(descriptor).st_nlink:  # else someone removed the folder, and may have made another one
                    os.unlink(os.path.join(place, LOCK))
            os.close(descriptor)


def _before_exit() -> None:
    for path in list(_unfinished):
        with suppress(OSError):
            path.unlink()
    unlock()


atexit.register(unlock)
signals.BEFORE_EXIT.append(_before_exit)


@contextmanager
def locked(folder: Path, *own: str) -> Iterator[None]:
    """`lock`, and `unlock` at the end."""
    lock(folder, *own)
    try:
        yield
    finally:
        unlock(folder)


def empty(folder: Path) -> None:
    """Remove all that is in a folder that this process has locked; a kill in between leaves `REMOVING` there.

    Of a link to a folder, the files in that folder. UserError when another process writes in a folder below.
    """
    for below in folder.glob(f"*/**/{LOCK}"):
        with locked(below.parent):
            pass
    try:
        (folder / REMOVING).touch()
        for path in folder.iterdir():
            if path.name not in (LOCK, REMOVING):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / REMOVING).unlink()
    except OSError as error:
        raise UserError(f"cannot remove what is in {folder}: {error.strerror or error}") from None


def _make(folder: Path) -> None:
    """The folder with its parents. A link to nothing gets the folder that it names, but not that one's parents: they
    may be a disk that is not there."""
    with suppress(FileExistsError):  # a file where a folder should be, for which the error of what follows is clearer
        for path in (*reversed(folder.parents), folder):
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                if not target.parent.is_dir():
                    place = f"{cut(str(path))} is a link to {cut(str(target))}"
                    raise UserError(
                        f"{place}, which cannot be made: its parent is not there; mount it or remove the link"
                    )
                target.mkdir(exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)


def _locked(folder: Path) -> int | None:
    """A descriptor of the lock, which this process then holds; None where the file system has no locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else its holder has just ended and removed it
                break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                os.unlink(folder / LOCK)
                say_once(f"note: {folder} cannot be locked ({error.strerror}): let no second process write there")
                return None
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "another process"
                os.close(descriptor)
                advice = "wait until it ends, stop it, or choose another folder"
                raise UserError(f"{cut(str(folder))} is in use by {cut(printable(holder), 120)}; {advice}") from None
        os.close(descriptor)
        time.sleep(0.05)
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    text = f"process {os.getpid()} on {platform.node()} since {since}: {printable(command)}"
    with suppress(OSError):  # a full disk: it is locked all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    return descriptor
