"""Two processes in one folder: one works, the other says in a line who does, and changes nothing."""

import errno
import fcntl
import os
import platform
import signal
import time
from pathlib import Path

import pytest

import predict
import sweep
from data.image_files import find_images
from runtime import checkpoint, files, signals
from runtime.errors import UserError
from tests.attacks.test_kills import cases, differences, litter, place, run, state_of, undisturbed  # noqa: F401
from tests.processes import script, start_script
from tests.scripts.test_predict import write_run

HOLDER = """
import os, sys, time
from pathlib import Path

from runtime.files import lock

lock(Path(sys.argv[1]))
if sys.argv[2:] == ["fork"] and os.fork() == 0:
    Path(sys.argv[1] + ".child").write_text(str(os.getpid()))
    time.sleep(300)
Path(sys.argv[1] + ".held").touch()
time.sleep(300)
"""
TAKER = """
import os, sys
from pathlib import Path

from runtime import files
from runtime.errors import UserError

files.PATIENCE, folder, taken = 0, Path(sys.argv[1]), 0
while taken < 40:
    try:
        files.lock(folder)
    except UserError:
        continue
    with open(folder / "alone", "x"):
        taken += 1
    os.unlink(folder / "alone")
    files.unlock(folder)
"""
LEAVER = """
import sys, threading, time
from pathlib import Path

from runtime import errors, files

files.lock(Path(sys.argv[1]))
with files.whole_file(Path(sys.argv[1]) / "last.pt") as file:
    threading.Thread(target=errors.leave, args=[errors.UserError("rank 1 was stopped")]).start()
    time.sleep(300)
"""


def wait_for(what) -> None:
    deadline = time.monotonic() + 100
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that locks a folder and then sleeps."""
    (tmp_path / "holder.py").write_text(HOLDER)
    started = []

    def hold(folder: Path, *words: str):
        started.append(start_script([f"{tmp_path}/holder.py", str(folder), *words], tmp_path / "out"))
        wait_for(Path(f"{folder}.held").exists)
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.join()


def snapshot(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def test_the_second_is_told_who_works_and_takes_over_when_it_is_killed(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    folder = tmp_path / "new" / "run"
    process, before = holder(folder), snapshot(folder)
    for take in (
        files.lock,
        lambda folder: checkpoint.open_run(folder, {}),
        lambda f: checkpoint.open_run(f, {}, resume="never"),
    ):
        with pytest.raises(UserError) as caught:
            take(folder)
        said = str(caught.value)
        assert f"is in use by process {process.pid} on {platform.node()} since 20" in said and "holder.py" in said
        assert len(said) <= 300 and "\n" not in said
    assert snapshot(folder) == before
    process.kill()
    process.join()
    with files.locked(folder):
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
    assert not list(folder.iterdir())


def test_a_process_that_ends_in_a_moment_is_waited_for(holder, tmp_path, monkeypatch):
    process, waits = holder(tmp_path / "run"), []

    def sleep(seconds):
        waits.append(seconds)
        process.kill()
        process.join()

    monkeypatch.setattr(files.time, "sleep", sleep)
    with files.locked(tmp_path / "run"):
        assert len(waits) == 1


def test_a_fork_does_not_keep_the_lock_of_a_killed_process(holder, tmp_path):
    process = holder(tmp_path / "run", "fork")
    wait_for(lambda: (tmp_path / "run.child").exists() and (tmp_path / "run.child").read_text())
    child = int((tmp_path / "run.child").read_text())
    process.kill()
    process.join()
    with files.locked(tmp_path / "run"):
        os.kill(child, signal.SIGKILL)  # it was there until now
    assert not list((tmp_path / "run").iterdir())


def test_a_process_that_ends_at_once_leaves_neither_its_lock_nor_what_it_is_writing(tmp_path):
    """As one of two ranks does when the other one is stopped, whatever its main thread is about."""
    (tmp_path / "leaver.py").write_text(LEAVER)
    process = start_script([f"{tmp_path}/leaver.py", f"{tmp_path}/run"], tmp_path / "out")
    process.join()
    assert (process.exitcode, (tmp_path / "out.err").read_text().strip()) == (2, "error: rank 1 was stopped")
    assert os.listdir(tmp_path / "run") == []


def test_only_one_of_four_is_ever_in_a_folder(tmp_path):
    (tmp_path / "taker.py").write_text(TAKER)
    processes = [start_script([f"{tmp_path}/taker.py", f"{tmp_path}/run"], tmp_path / f"out{i}") for i in range(4)]
    for number, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"out{number}.err").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_that_its_holder_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    lockf, removed = fcntl.lockf, []

    def lock_of_what_is_gone(descriptor, how):
        if not removed:
            removed.append(os.unlink(tmp_path / ".lock"))
        return lockf(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", lock_of_what_is_gone)
    with files.locked(tmp_path):
        assert removed and (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert checkpoint.open_run(tmp_path / "run", {}) is None
    assert capsys.readouterr().err == (
        f"note: {tmp_path}/run cannot be locked (No locks available): let no second process write there\n"
    )
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


def test_links_and_folders_that_are_replaced(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"cannot write in .*run: "):
        files.lock(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "run" / ".lock").unlink()
    files.lock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    (tmp_path / "moved" / ".lock").unlink()
    (tmp_path / "run" / ".lock").write_text("of another process")
    files.unlock(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == "of another process"


def test_a_run_that_is_removed_holds_no_running_one(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0)
    checkpoint.open_run(tmp_path / "run", {})
    files.unlock(tmp_path / "run")
    process = holder(tmp_path / "run" / "eval_knn")
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=rf"eval_knn is in use by process {process.pid} "):
        checkpoint.open_run(tmp_path / "run", {}, resume="never")
    assert {p for p in before if p.is_file()} == {p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    process.kill()
    process.join()
    assert checkpoint.open_run(tmp_path / "run", {}, resume="never") is None
    files.unlock(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


def test_predict_and_sweep_leave_a_folder_in_use_alone(holder, place, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(files, "PATIENCE", 0)
    fitted = write_run(tmp_path / "fitted", find_images(place / "mvtec/part/train")[:3], "patchcore")
    process, (name, *words) = holder(tmp_path / "grid"), cases(place)["sweep"].words(tmp_path)
    before, begun = snapshot(tmp_path / "grid"), rf"grid is in use by process {process.pid} "
    assert name == "sweep.py"
    with pytest.raises(UserError, match=begun):
        sweep.main(words)
    with pytest.raises(UserError, match=begun):
        predict.main([str(fitted), str(place / "mvtec/part/test/spot"), f"out={tmp_path}/grid", "device=cpu"])
    assert snapshot(tmp_path / "grid") == before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
@pytest.mark.parametrize("name", cases(Path("nowhere")))
def test_the_same_command_twice(name, place, tmp_path):  # noqa: F811
    """The first is stopped in the middle while the second is started, and then goes on."""
    case = cases(place)[name]
    expected, count = undisturbed(case, tmp_path / "whole", tmp_path / "out")
    folder = tmp_path / "twice"
    if case.before:
        case.before(folder)
    words = ["tests/attacks/at_event.py", "stop", str(count // 2), str(folder), *case.words(folder)]
    first = start_script(words, tmp_path / "first")
    try:
        wait_for(lambda: signals.state_of(first.pid) == "T")
        before = snapshot(folder)
        status, err = run("count", 0, folder, case.words(folder), tmp_path / "second")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and "Traceback" not in err, err
        assert f" is in use by process {first.pid} on {platform.node()} since " in errors[0] and len(errors[0]) <= 300
        assert snapshot(folder) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0, (tmp_path / "first.err").read_text()
    state = state_of(folder)
    assert differences(state, expected) == [] and not litter(state)


@pytest.mark.slow
def test_two_ranks_are_told_once(holder, place, tmp_path):  # noqa: F811
    words = cases(place)["fitted"].words(tmp_path)
    process = holder(tmp_path / "run")
    with pytest.raises(AssertionError, match=f" is in use by process {process.pid} ") as caught:
        script(words, processes=2)
    assert str(caught.value).count(" is in use by ") == 1
    process.kill()
    process.join()
    assert script(words, processes=2)["n_train"] and not litter(state_of(tmp_path / "run"))
