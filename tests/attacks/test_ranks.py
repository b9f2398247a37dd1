"""Two processes of which one is killed or stopped, sees a broken image, or has no memory or room left: both end within a
minute, with one line for the cause, and leave nothing running."""

import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.datasets.folder import ClassFolder
from data.loading import Loader
from tests.attacks.small_disk import SmallDisk
from tests.images import TOP, command, write_classes, write_mvtec
from tests.processes import as_torchrun, start_script
from tests.scripts import test_train_anomaly, test_train_ssl

MINUTE = 60  # seconds from the cause to the end of all
DIED = "error: another process of this run died without an error message; did it run out of memory?"
STOPPED = (
    r"error: rank 1 \(process \d+\) was stopped by a signal, .*; the same command resumes from the last checkpoint"
)
LINUX = pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux's /proc")

WAITING = """
import time
from pathlib import Path
from runtime import distributed, errors
errors.PATIENCE, distributed.LOOK, distributed.STOPPED = 1.0, 0.05, 0.5
def main(argv):
    distributed.setup("cpu")
    rank = distributed.rank()
    Path(argv[0], f"ready{rank}").touch()
    time.sleep(2 if rank else 0)  # longer than it may be stopped
    distributed.barrier()
    while not Path(argv[0], "end").exists():
        distributed.barrier()
        time.sleep(0.01)
    print(rank)
errors.run(main)
"""


def descendants(process: int) -> set[int]:
    """Processes that a process started, and those that they did."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def state_of(process: int) -> str:
    """As in /proc: T of one that is stopped, Z of one that has ended, X of one that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def wait_until(condition: Callable[[], object], deadline: float | None = None) -> None:
    deadline = deadline or time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def attack(words: list[str], ready: Callable[[], object], cause: Callable[[list[int]], None], out: Path) -> list:
    """Start two ranks, wait until they are `ready`, do them `cause`, and return their exit statuses.

    A rank that is stopped is killed once the other has ended, as torchrun does.
    """
    store, environments = as_torchrun(2)
    ranks = [start_script(words, out.with_name(f"{out.name}{r}"), each) for r, each in enumerate(environments)]
    numbers = [rank.pid for rank in ranks]
    try:
        wait_until(lambda: ready() or not all(rank.is_alive() for rank in ranks))
        everyone = {*numbers}.union(*map(descendants, numbers))
        cause(numbers)
        deadline = time.monotonic() + MINUTE
        wait_until(lambda: not all(rank.is_alive() for rank in ranks), deadline)
        wait_until(lambda: all(state_of(number) in "ZXT" for number in numbers), deadline)
        for rank in ranks:
            if state_of(rank.pid) == "T":
                rank.kill()
            rank.join()
        wait_until(lambda: all(state_of(number) in "ZX" for number in everyone), deadline)
    finally:
        for rank in ranks:
            rank.kill()
        del store
    return [rank.exitcode for rank in ranks]


def said(out: Path) -> list[str]:
    """The lines of all ranks that are an error or of a traceback."""
    text = "\n".join(Path(f"{out}{rank}.err").read_text() for rank in range(2)).replace("\r", "\n")
    return [line for line in text.splitlines() if "rror" in line or "Traceback" in line]


@pytest.fixture
def waiting(tmp_path):
    (tmp_path / "script.py").write_text(WAITING)
    return [str(tmp_path / "script.py"), str(tmp_path)]


def both_ready(folder: Path) -> Callable[[], bool]:
    return lambda: all((folder / f"ready{rank}").exists() for rank in range(2))


def sends(number: int, victim: int) -> Callable[[list[int]], None]:
    return lambda ranks: os.kill(ranks[victim], number)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(victim, waiting, tmp_path):
    statuses = attack(waiting, both_ready(tmp_path), sends(signal.SIGKILL, victim), tmp_path / "out")
    assert sorted(statuses) == [-signal.SIGKILL, 2] and said(tmp_path / "out") == [DIED]


@LINUX
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank(victim, waiting, tmp_path):
    statuses = attack(waiting, both_ready(tmp_path), sends(signal.SIGSTOP, victim), tmp_path / "out")
    (line,) = said(tmp_path / "out")
    assert sorted(statuses) == [-signal.SIGKILL, 2] and re.fullmatch(STOPPED, line) and len(line) <= 300


@LINUX
def test_a_slow_rank_and_one_that_is_stopped_for_a_moment_are_waited_for(waiting, tmp_path):
    def pause(ranks: list[int]) -> None:
        for victims, seconds in (([1], 0.1), ([0], 0.1), ([1], 0.1), ([0, 1], 1.0)):  # all of them may for long
            for end in (signal.SIGSTOP, signal.SIGCONT):
                for victim in victims:
                    os.kill(ranks[victim], end)
                time.sleep(seconds)
        (tmp_path / "end").touch()

    statuses = attack(waiting, both_ready(tmp_path), pause, tmp_path / "out")
    assert statuses == [0, 0] and said(tmp_path / "out") == []


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """{script: (its words but for `runs`, an image that it learns from)}; the runs would take hours."""
    place = tmp_path_factory.mktemp("images")
    classes, mvtec = write_classes(place / "classes"), write_mvtec(place / "mvtec")
    more = ["epochs=5000", "data.cache=none", "data.workers=1"]
    own = {
        "train_ssl": ["train_ssl.py", *test_train_ssl.words("simclr", classes, place, *more, "eval_every=5000")],
        "train_anomaly": ["train_anomaly.py", *test_train_anomaly.words("rd4ad", mvtec, place, *more, "holdout=0")],
    }
    images = {"train_ssl": classes / "train/class0/000.png", "train_anomaly": mvtec / "part/train/good/000.png"}
    return {name: (words, images[name]) for name, words in own.items()}


def in_training(folder: Path) -> Callable[[], bool]:
    """Whether a run has a checkpoint and some steps after it."""
    return lambda: (folder / "last.pt").exists() and '"step": 5,' in (folder / "metrics.jsonl").read_text()


SCRIPTS = ("train_ssl", "train_anomaly")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("end", ["SIGKILL", pytest.param("SIGSTOP", marks=LINUX)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_rank_of_a_script_is_killed_or_stopped(name, end, victim, commands, tmp_path):
    words = [*commands[name][0], f"runs={tmp_path}"]
    cause = sends(getattr(signal, end), victim)
    statuses = attack(words, in_training(tmp_path / "run"), cause, tmp_path / "out")
    (line,) = said(tmp_path / "out")
    assert sorted(statuses) == [-signal.SIGKILL, 2]
    assert line == DIED if end == "SIGKILL" else re.fullmatch(STOPPED, line)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_rank_sees_a_broken_image(name, commands, tmp_path):
    """In an epoch each image is one rank's; it breaks while they run."""
    words, image = commands[name]
    whole = image.read_bytes()

    def break_it(_: list[int]) -> None:
        (tmp_path / "broken").write_bytes(whole[:-500])
        os.replace(tmp_path / "broken", image)

    try:
        statuses = attack([*words, f"runs={tmp_path}"], in_training(tmp_path / "run"), break_it, tmp_path / "out")
    finally:
        image.write_bytes(whole)
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith(f"error: cannot read image {image}")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_rank_gets_no_more_memory(name, commands, tmp_path):
    def limit(ranks: list[int]) -> None:
        used = int(Path(f"/proc/{ranks[1]}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(ranks[1], resource.RLIMIT_AS, (used, used))

    words = [*commands[name][0], f"runs={tmp_path}"]
    statuses = attack(words, in_training(tmp_path / "run"), limit, tmp_path / "out")
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith("error: ") and "memory" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_disk_of_rank_0_is_full(name, commands, tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    store, environments = as_torchrun(2)
    try:
        disk.empty(size=2**20)  # less than a checkpoint
        statuses = disk.run_ranks([*commands[name][0], f"runs={disk.path}"], tmp_path / "out", environments)
    finally:
        disk.close()
        del store
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith("error: cannot write ") and "/run/last.pt: " in line
