"""Mistakes end in one line and an exit status; whatever else goes wrong keeps its traceback."""

import pytest
import torch
from torch import nn

from runtime import errors


@pytest.mark.parametrize(
    ("problem", "status", "line"),
    [
        (errors.UserError("two\nlines"), 2, "error: two lines"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "error: the GPU's memory is full"),
        (MemoryError(), 2, "error: the memory is full: lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 2, "error: the memory is full"),
        (OSError(28, "No space left on device", "file"), 2, "error: cannot use file: No space left on device; make"),
        (OSError(27, "File too large"), 2, "error: cannot use a file: File too large; raise the limit"),
        (OSError(122, "Disk quota exceeded"), 2, "error: cannot use a file: Disk quota exceeded; make room"),
        (OSError(30, "Read-only file system", "f"), 2, "error: cannot use f: Read-only file system; choose"),
        (OSError(36, "File name too long", "f"), 2, "error: cannot use f: File name too long; choose a shorter name"),
        (OSError(13, "Permission denied", "f"), 2, "error: cannot use f: Permission denied; choose"),
        (OSError(36, "File name too long", "q" * 300), 2, f"error: cannot use {'q' * 57}...{'q' * 30}: File name too"),
        (MemoryError("too little\nmemory"), 2, "error: too little memory"),
        (OSError(12, "Cannot allocate memory"), 2, "error: the memory is full"),
        (KeyboardInterrupt(), 130, "stopped;"),
    ],
)
def test_one_line(problem, status, line, capsys):
    def main(_):
        raise problem

    with pytest.raises(SystemExit) as end:
        errors.run(main)
    shown = capsys.readouterr().err
    assert end.value.code == status and shown.startswith(line) and shown.count("\n") == 1


def test_a_batch_of_one_in_batch_norm_is_one_line(capsys):
    with pytest.raises(SystemExit):
        errors.run(lambda _: nn.BatchNorm1d(3)(torch.rand(1, 3)))
    assert "raise batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("problem", [ValueError("x"), RuntimeError("x"), OSError(2, "No such file")])
def test_our_own_mistakes_keep_their_traceback(problem):
    def main(_):
        raise problem

    with pytest.raises(type(problem)):
        errors.run(main)
