"""Files that are whole or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from training.errors import UserError


@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """A file, of text (UTF-8) or with mode "wb" of bytes, that has its name only once all is written.

    After an error it is gone and what had the name before is untouched; after a kill, what had been flushed lies beside
    it under a temporary name. Makes the folder. A disk that is full or read-only is a `UserError`.
    """
    path, temporary = Path(path), Path(f"{path}.tmp{os.getpid()}")
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **text) as file:
            yield file
        os.replace(temporary, path)
    except Exception as error:
        if temporary.is_file() or temporary.is_symlink():
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}; nothing was written under that name") from None
        raise
