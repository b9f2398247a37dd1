"""Two processes of which one is killed or stopped, sees a broken image, or has no memory or room left: both end within
a minute, with one line for the cause, and leave nothing running."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from runtime import config
from tests.attacks.small_disk import SmallDisk
from tests.images import TOP, command, write_classes, write_mvtec
from tests.processes import environments_of, start_script
from tests.scripts import test_train_anomaly, test_train_classifier, test_train_ssl

MINUTE = 60  # seconds from the cause to the end of all
DIED = "error: another process of this run died without an error message; did it run out of memory?"
STOPPED = r"error: rank \d \(process \d+\) was stopped by a signal, .*; the same command resumes from the .*"

LINUX = pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux's /proc")

WAITING = """
import time
from pathlib import Path
import torch
from runtime import distributed, errors
errors.PATIENCE, distributed.LOOK, distributed.STOPPED = 1.0, 0.05, 0.5
def main(argv):
    distributed.setup("cpu")
    rank = distributed.rank()
    Path(argv[0], f"ready{rank}").touch()
    time.sleep(2 if rank else 0)  # longer than it may be stopped
    distributed.barrier()
    while not distributed.all_reduce_sum(torch.tensor(Path(argv[0], "end").exists() + 0)):
        time.sleep(0.01)
    print(rank)
errors.run(main)
"""


def descendants(process: int) -> set[int]:
    """Processes that a process started, and those that they did."""
    parents = {int(path.name): parent_of(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found, new = set(), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def state_of(process: int) -> str:
    """As in /proc: T of one that is stopped, Z of one that has ended, X of one that is gone."""
    return _status(process)[0]


def parent_of(process: int) -> int:
    return int(_status(process)[1])


def _status(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def wait_until(condition: Callable[[], object], deadline: float | None = None) -> None:
    deadline = deadline or time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def attack(words: list[str], ready: Callable[[], object], cause: Callable[[list[int]], None], out: Path) -> list:
    """Start two ranks, wait until they are `ready`, do them `cause`, and return their exit statuses.

    A rank that is stopped is killed once the other has ended, as torchrun does.
    """
    environments, _store = environments_of(2)
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


@pytest.mark.parametrize("asks", ["torch.empty(2**50)", "bytearray(2**50)"])
def test_a_rank_without_memory(asks, waiting, tmp_path):
    script = Path(waiting[0])
    script.write_text(script.read_text().replace("        time.sleep(0.01)", f"        {asks} if rank else None"))
    statuses = attack(waiting, lambda: False, lambda _: None, tmp_path / "out")
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith("error: ") and "memory" in line


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
def images(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("images")
    classes = write_classes(place / "classes")
    return {"train_ssl": classes, "train_classifier": classes, "train_anomaly": write_mvtec(place / "mvtec")}


def command_of(name: str, images: dict[str, Path], runs: Path) -> list[str]:
    """A training that would take hours."""
    more = ["epochs=5000", "data.cache=none", "data.workers=0", "holdout=0"]
    if name == "train_ssl":
        return ["train_ssl.py", *test_train_ssl.words("simclr", images[name], runs, *more)]
    if name == "train_classifier":
        return ["train_classifier.py", *test_train_classifier.words(images[name], runs, *more)]
    return ["train_anomaly.py", *test_train_anomaly.words("rd4ad", images[name], runs, *more)]


def in_training(folder: Path) -> Callable[[], bool]:
    """Whether a run has a checkpoint and some steps after it."""
    return lambda: (folder / "last.pt").exists() and '"step": 5,' in (folder / "metrics.jsonl").read_text()


SCRIPTS = ("train_ssl", "train_anomaly", "train_classifier")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("end", ["SIGKILL", pytest.param("SIGSTOP", marks=LINUX)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_rank_of_a_script_is_killed_or_stopped(name, end, victim, images, tmp_path):
    words = command_of(name, images, tmp_path)
    cause = sends(getattr(signal, end), victim)
    statuses = attack(words, in_training(tmp_path / "run"), cause, tmp_path / "out")
    (line,) = said(tmp_path / "out")
    assert sorted(statuses) == [-signal.SIGKILL, 2]
    assert line == DIED if end == "SIGKILL" else re.fullmatch(STOPPED, line)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_rank_sees_a_broken_image(name, images, tmp_path):
    """In an epoch each image is one rank's; it breaks while they run."""
    image = next(images[name].rglob("train/*/000.png"))
    whole = image.read_bytes()

    def break_it(_: list[int]) -> None:
        (tmp_path / "broken").write_bytes(whole[:-500])
        os.replace(tmp_path / "broken", image)

    try:
        statuses = attack(command_of(name, images, tmp_path), in_training(tmp_path / "run"), break_it, tmp_path / "out")
    finally:
        image.write_bytes(whole)
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith(f"error: cannot read image {image}")


@pytest.mark.slow
def test_one_rank_gets_no_more_memory(images, tmp_path):
    """What it has may suffice for hours, so that its images grow as well."""
    every = {image: image.read_bytes() for image in images["train_anomaly"].rglob("train/*/*.png")}
    Image.new("RGB", (3000, 3000)).save(tmp_path / "large.png")

    def limit(ranks: list[int]) -> None:
        resource.prlimit(ranks[1], resource.RLIMIT_AS, (1, 1))
        for number, image in enumerate(every):
            shutil.copy(tmp_path / "large.png", tmp_path / f"{number}.png")
            os.replace(tmp_path / f"{number}.png", image)

    words = command_of("train_anomaly", images, tmp_path)
    try:
        statuses = attack(words, in_training(tmp_path / "run"), limit, tmp_path / "out")
    finally:
        for image, whole in every.items():
            image.write_bytes(whole)
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith("error: ") and "memory" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_disk_of_rank_0_is_full(name, images, tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    environments, _store = environments_of(2)
    try:
        disk.empty(size=2**20)  # less than a checkpoint
        statuses = disk.run_ranks(command_of(name, images, disk.path), tmp_path / "out", environments)
    finally:
        disk.close()
    (line,) = said(tmp_path / "out")
    assert statuses == [2, 2] and line.startswith("error: cannot write ") and "/run/last.pt: " in line


def processes_with(mark: str) -> dict[int, str]:
    """{number: environment} of the processes that have `mark` in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if mark in environment and state_of(int(path.parent.name)) != "Z":
            found[int(path.parent.name)] = environment
    return found


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGKILL to rank 1", "SIGSTOP to rank 1", "SIGKILL to torchrun"])
def test_under_torchrun(end, images, tmp_path):
    """All of it with the real one, and with processes that decode images."""
    mark, name, everything = f"SCAVENGE_MARK={tmp_path}", "train_ssl", tmp_path / "err"
    words = config.overlay(command_of(name, images, tmp_path), ["data.workers=1"])
    environment = os.environ | dict([mark.split("=", 1)])
    with open(everything, "w") as err:
        torchrun = subprocess.Popen(
            command(words, processes=2), cwd=TOP, env=environment, stdout=subprocess.DEVNULL, stderr=err
        )
    try:
        wait_until(lambda: in_training(tmp_path / "run")() or torchrun.poll() is not None)
        of_rank_1 = [number for number, text in processes_with(mark).items() if "\0RANK=1\0" in text]
        (rank_1,) = (number for number in of_rank_1 if parent_of(number) == torchrun.pid)
        os.kill(rank_1 if "rank" in end else torchrun.pid, getattr(signal, end.split()[0]))
        deadline = time.monotonic() + MINUTE
        status = torchrun.wait(MINUTE)
        wait_until(lambda: not processes_with(mark), deadline)
    finally:
        for number in processes_with(mark):
            os.kill(number, signal.SIGKILL)
        torchrun.wait()
    text = everything.read_text().replace("\r", "\n")
    lines = [line for line in text.split("torch/distributed/elastic/")[0].splitlines() if line.startswith("error")]
    assert status != 0 and "Traceback (most recent call last)" not in text.split("torch/distributed/elastic/")[0]
    if end == "SIGKILL to rank 1":  # torchrun's own report says so, and may end rank 0 before it does
        assert lines in ([], [DIED]) and "Signal 9 (SIGKILL)" in text
    elif end == "SIGSTOP to rank 1":
        assert len(lines) == 1 and re.fullmatch(STOPPED, lines[0])
    else:
        assert lines == ["error: torchrun was killed; the same command resumes from the last checkpoint"]
