"""Files that are whole or not there, and what killed processes leave of them."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from runtime.errors import UserError
from runtime.files import open_regular, remove_unfinished, temporary_name, whole_file
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


def test_only_regular_files_and_links_to_them_are_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    (tmp_path / "file").write_text("grün\n", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(name) as file:
            assert file.read() == "grün\n".encode()
        with open_regular(tmp_path / name, "r", encoding="utf-8") as file:
            assert list(file) == ["grün\n"]
    os.mkfifo("fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    kinds = {"fifo": "it is a FIFO", "zero": "it is a device", "socket": "it is a socket", ".": "Is a directory"}
    kinds |= {"loop": "Too many levels", "nowhere": "No such file", "missing": "No such file"}
    for name, reason in kinds.items():
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match=reason) as error:
            open_regular(name)
        assert error.value.strerror.startswith(reason) and error.value.filename == name
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_becomes_a_fifo_after_the_first_look_is_not_waited_for(tmp_path, monkeypatch):
    place, regular, look = tmp_path / "x.png", tmp_path / "regular", os.stat
    os.mkfifo(place)
    regular.touch()
    monkeypatch.setattr(os, "stat", lambda path, **more: look(regular if path == place else path, **more))
    with pytest.raises(OSError, match="it is a FIFO, not a regular file"):
        open_regular(place)
