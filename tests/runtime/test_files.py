"""Files that are whole or not there, and what killed processes leave of them."""

import os
import signal
import subprocess
import sys

import pytest

from runtime.errors import UserError
from runtime.files import remove_unfinished, temporary_name, whole_file
from tests.images import TOP

WRITER = """
import sys, time
from runtime.files import whole_file
with whole_file(sys.argv[1]) as file:
    file.write("row")
    file.flush()
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_file_is_there_when_it_is_whole_and_not_before(tmp_path):
    path = tmp_path / "new" / "a.csv"
    with whole_file(path) as file:
        file.write("old\n")
        assert not path.exists()
    mistakes = (ValueError("x"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt), (SystemExit(), SystemExit)
    for mistake, raised in (*mistakes, (OSError(28, "No space left on device"), UserError)):
        with pytest.raises(raised), whole_file(path) as file:
            file.write("new\n")
            raise mistake
        assert path.read_text() == "old\n" and os.listdir(path.parent) == ["a.csv"]


def test_bytes_and_folders_that_are_not_there_yet(tmp_path):
    with whole_file(tmp_path / "a" / "b.bin", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    with pytest.raises(UserError, match="nothing under"), whole_file(tmp_path / "a" / "b.bin" / "c") as file:
        file.write("x")


@pytest.mark.parametrize("character", ["x", "ä", "\udcff"])
def test_every_legal_name_can_be_written_and_others_are_refused_before_the_work(character, tmp_path):
    most = 255 // len(os.fsencode(character))
    for length in range(most - 40, most + 1):
        with whole_file(tmp_path / (character * length)) as file:
            file.write(str(length))
    assert {len(name) for name in os.listdir(tmp_path)} == set(range(most - 40, most + 1))
    for length in range(most - 40, most + 1):
        assert (tmp_path / (character * length)).read_text() == str(length)
    (tmp_path / "folder").mkdir()
    for name, why in (((character * (most + 1)), "File name too long"), ("folder", "Is a directory")):
        with pytest.raises(UserError, match=why), whole_file(tmp_path / name) as file:
            raise AssertionError("the work began")


def test_two_long_names_are_written_at_the_same_time(tmp_path):
    one, other = (tmp_path / ("x" * 250 + end) for end in ("1", "2"))
    with whole_file(one) as first, whole_file(other) as second:
        first.write("1")
        second.write("2")
    assert (one.read_text(), other.read_text()) == ("1", "2")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    places = [tmp_path / "a.csv", tmp_path / ("y" * 250), tmp_path / "deep" / "b.png"]
    killed, running = (
        [
            subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=TOP, stdout=subprocess.PIPE)
            for path in places
        ]
        for _ in range(2)
    )
    try:
        for process in killed + running:
            assert process.stdout.readline() == b"written\n"
        for process in killed:
            process.send_signal(signal.SIGKILL)
            process.wait()
        left = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert len(left) == 6
        mine = {tmp_path / name for name in ("a.csv", "b.tmp1", "last.pt.tmp99", "c.unfinished-x", "d.unfinished-1")}
        mine |= {tmp_path / f"e.unfinished-another.machine-{killed[0].pid}"}
        for path in mine:
            path.write_text("mine")
        remove_unfinished(tmp_path)
        assert len([path for path in left if path.exists()]) == 4  # not in the folder below
        remove_unfinished(tmp_path, below=True)
        still = {path for path in left if path.exists()}
        assert len(still) == 3 and all(path.exists() for path in mine)
        assert {int(path.name.rpartition("-")[2]) for path in still} == {process.pid for process in running}
    finally:
        for process in killed + running:
            process.kill()
            process.wait()
    remove_unfinished(tmp_path, below=True)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == mine


def test_leftovers_with_the_number_of_this_very_process_are_removed(tmp_path):
    """In a container every run may be process 1."""
    with pytest.raises(ValueError, match="now"), whole_file(tmp_path / "a") as file:
        left = file.name
        raise ValueError("now")
    with open(left, "w") as file:
        file.write("of a process before")
    (temporary_name(tmp_path / "set") / "folder").mkdir(parents=True)  # as data.demo.generate makes one
    remove_unfinished(tmp_path)
    assert not os.listdir(tmp_path)
