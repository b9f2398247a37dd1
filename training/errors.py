"""Mistakes of the user: one line on stderr and exit status 2 instead of a traceback."""

import errno
import os
import reprlib
import sys

from training.text import printable

ADVICE = {  # for what the system refuses
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or change who may use it",
    errno.ENOTDIR: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}
SHORT = reprlib.Repr()  # of any value: neither its depth nor its length costs more than a line
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 90
SHORT.maxlevel = 3


class UserError(Exception):
    """Something the user can mend. The message says in one line what is wrong, where, and what to do."""


def shown(value) -> str:
    """A value of the user's in a message: as Python writes it, cut to 90 characters."""
    return cut(SHORT.repr(value))


def cut(text: str, width: int = 90) -> str:
    """At most `width` characters: of a longer text the beginning and the end."""
    return text if len(text) <= width else f"{text[: width - 33]}...{text[-30:]}"


def run(main) -> None:
    """Call `main(argv)`; a `UserError` becomes `error: ...` and exit status 2, Ctrl-C becomes exit status 130."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
        print(f"error{rank}: {' '.join(printable(str(error)).split())}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        print("error: batch norm cannot train on one value a channel: raise batch_size or data.size", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print("error: the GPU's memory is full: lower batch_size or data.size, or set precision=bf16", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        what = f"cannot use {cut(str(error.filename or 'a file'))}: {error.strerror}"
        print(f"error: {what}; {ADVICE[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; where there is a checkpoint, the same command goes on from it", file=sys.stderr)
        sys.exit(130)
