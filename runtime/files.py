"""Files that have their name only once they are complete; reading of files, and of nothing else that has a name."""

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from runtime import signals
from runtime.errors import DiskFull, UserError, cut, reason

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
        signals.UNFINISHED.add(temporary)
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
        signals.UNFINISHED.discard(temporary)


def _sync_folder(folder: Path) -> None:
    """Bring the names in it onto the disk, where its file system can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove_unfinished(folder: Path, *, below: bool = False) -> None:
    """Remove what killed processes left under a `temporary_name` in this folder, and with `below` in those in it.

    Whether a process still runs can be asked only on its own machine, so files of other machines stay.
    """
    found = folder.glob(f"{'**/' if below else ''}*.unfinished-*") if os.path.isdir(folder) else ()
    for path in found:
        writer = re.fullmatch(r".*\.unfinished-(.+)-(\d+)", path.name, re.DOTALL)
        if writer and writer[1] == platform.node() and not _runs(int(writer[2])):
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
