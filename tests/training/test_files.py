"""Files that are whole or not there."""

import os

import pytest

from training.errors import UserError
from training.files import whole_file


def test_a_file_is_there_when_it_is_whole_and_not_before(tmp_path):
    path = tmp_path / "new" / "a.csv"
    with whole_file(path) as file:
        file.write("old\n")
        assert not path.exists()
    for mistake, raised in ((ValueError("x"), ValueError), (OSError(28, "No space left on device"), UserError)):
        with pytest.raises(raised), whole_file(path) as file:
            file.write("new\n")
            raise mistake
        assert path.read_text() == "old\n" and os.listdir(path.parent) == ["a.csv"]
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write("new\n")
        raise KeyboardInterrupt
    assert path.read_text() == "old\n" and len(os.listdir(path.parent)) == 2  # the rows so far lie beside it


def test_bytes_and_folders_that_are_not_there_yet(tmp_path):
    with whole_file(tmp_path / "a" / "b.bin", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    with pytest.raises(UserError, match="nothing was written"), whole_file(tmp_path / "a" / "b.bin" / "c") as file:
        file.write("x")
