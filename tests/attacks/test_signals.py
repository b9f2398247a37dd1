"""SIGTERM and Ctrl-C at many moments of all scripts: saved where there is a loop, resumed bit-identically, one line."""

import csv
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.images import TOP, command, write_classes, write_mvtec
from tests.processes import environments_of, start_script
from tests.scripts.test_train_anomaly import words as anomaly_words
from tests.scripts.test_train_classifier import words as classifier_words
from tests.scripts.test_train_ssl import words as ssl_words

LAUNCHER = str(Path(__file__).with_name("signal_at.py"))
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
NAME = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class End(NamedTuple):
    status: list[int]  # of each process
    lines: list[str]  # on stderr, those that say how it ended
    moments: int
    loop: tuple[int, int] | None  # between which of them a training's steps are
    stderr: str


class Hit(NamedTuple):
    """A signal, and when it comes: a number of calls and returns after the first call of the function `since`."""

    moment: int = 0  # 0: never
    number: int = signal.SIGTERM
    since: str = "main"
    whom: str = "self"


NEVER = Hit()


def end_of(words: list[str], place: Path, *hits: Hit, meanwhile: Callable[[int], object] = id) -> End:
    """Run a script, as many processes of it as there are hits; whoever it started ends too. `meanwhile` gets the
    process's number."""
    place.mkdir(exist_ok=True)
    out, count = place / "out", place / "count"
    for path in (Path(f"{out}.err"), count):
        path.unlink(missing_ok=True)
    environments, _store = environments_of(len(hits))
    running = [
        start_script([LAUNCHER, h.since, str(h.moment), str(int(h.number)), h.whom, str(count), *words], out, each)
        for h, each in zip(hits, environments)
    ]
    meanwhile(running[0].pid)
    for process in running:
        process.join(120)
    status = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert None not in status, Path(f"{out}.err").read_text()
    deadline = time.monotonic() + 20
    while (left := members({process.pid for process in running})) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, left
    text = Path(f"{out}.err").read_text()
    lines = [x.strip() for x in re.split(r"[\r\n]", text) if re.search(r"^(stopped|error)|Traceback|\w(Error|pt):", x)]
    moments, *loop = json.loads(count.read_text()) if count.exists() else [0]  # it ended at once
    return End(status, lines, moments, tuple(loop) if all(loop) else None, text)


def members(sessions: set) -> list[str]:
    """The processes of sessions, which began with the scripts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = rest.split()[:4]
        if int(session) in sessions and state != "Z":
            found.append(f"{name}) {state}")
    return found


def flat(value, key: str = "") -> dict:
    """{dotted key: value}, tensors as hashes of their bytes, without times and where the run is."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in pairs for k, v in flat(part, f"{key}.{name}").items()}
    of_time = r"seconds|images_per_second|speed/|checksum"
    if re.search(rf"{of_time}|config\.runs|config\.backbone\.weights|config\.yaml$", key):
        return {}
    if isinstance(value, torch.Tensor):
        value = (value.dtype, value.shape, hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest())
    return {key: repr(value)}


def result_of(folder: Path) -> dict:
    """All that a run leaves, flat, without times: results, metrics, checkpoints, TensorBoard's scalars, other files."""
    found = {"metrics": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]}
    found |= {"results": json.loads((folder / "results.json").read_text())}
    found |= {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        found[f"scalar {tag}"] = [(e.step, e.value) for e in events.Scalars(tag) if "images_per_second" not in tag]
    found |= {
        f"image {tag}": [(e.step, e.encoded_image_string) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }
    others = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.name.startswith("events."))
    found["files"] = others
    found = flat(found)
    return {k: v for k, v in found.items() if not re.search("2_speed|wait_share", k)}


def assert_clean(end: End, hit: Hit, folder: Path) -> re.Match | None:
    """It ended in one line with the right status, and left nothing unfinished; returns "after step 3 of 12"."""
    assert len(end.lines) == 1 and end.lines[0].startswith(f"stopped by {NAME[hit.number]}"), end.stderr
    assert STATUS[hit.number] in end.status and {*end.status} <= {STATUS[hit.number], 2}, end.status
    assert not list(folder.rglob("*unfinished*"))
    after = re.search(r" after step (\d+) of (\d+); the same command resumes$", end.lines[0])
    if after:
        assert torch.load(folder / "run" / "last.pt", weights_only=True)["step"] == int(after[1])
        assert {*end.status} == {STATUS[hit.number]}
    else:
        assert end.lines[0].endswith("; if there is a checkpoint, the same command resumes from it")
    return after


def try_chain(words: list[str], tmp_path: Path, hits: int, *, steps: int = 24, processes: int = 1, whom="self") -> None:
    """A run without signals and one with many, resumed after each, are equal; of three signals in a training, two come
    in the loop, which saves. `words` are complete but for `runs`."""
    rng = random.Random(f"{words[:2]} {processes} {whom}")
    a, b = ([*words, f"runs={tmp_path / x}"] for x in "ab")
    whole = end_of(a, tmp_path / "a", *[NEVER] * processes)
    assert {*whole.status} == {0}, whole.stderr
    step = (whole.loop[1] - whole.loop[0]) / steps if whole.loop else 0
    for k in range(hits):
        looping = bool(step) and k % 3 > 0
        moment = (
            step * rng.uniform(0, 1.5) + 1
            if looping
            else rng.uniform(1, whole.loop[0] if whole.loop else whole.moments)
        )
        hit = Hit(round(moment), (signal.SIGTERM, signal.SIGINT)[k % 2], "hold" if looping else "main", whom)
        hit_by = [hit if processes == 1 or k % 3 in (rank, 2) else NEVER for rank in range(processes)]
        after = assert_clean(end_of(b, tmp_path / "b", *hit_by), hit, tmp_path / "b")
        assert after is not None or not looping
    last = end_of(b, tmp_path / "b", *[NEVER] * processes)
    assert {*last.status} == {0}, last.stderr
    assert_same(*(result_of(tmp_path / x / "run") for x in "ab"))


def assert_same(expected: dict, found: dict) -> None:
    assert expected.keys() == found.keys()
    assert [key for key in expected if expected[key] != found[key]] == []


# -------------------------------------------------------------------- quick: small scripts

THIRD = """
import os, signal, sys
from runtime import errors
from tests.runtime.test_run import Config, main

def in_step(step):
    if step == int(sys.argv[2]) and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), int(sys.argv[3]))

errors.run(lambda argv: main(Config(runs=argv[0]), in_step=in_step))
"""


def small(script: str, tmp_path: Path, *words: str, processes: int = 1) -> End:
    path = tmp_path / "script.py"
    path.write_text(script)
    return end_of([str(path), *words], tmp_path, *[NEVER] * processes)


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_third_script_is_saved_after_its_step_and_resumes(number, processes, tmp_path):
    """The mean of the two steps between points of the curves has a part from before the signal and one from after."""
    for place, steps in (("a", ["-1"]), ("b", ["2", "4", "-1"])):
        for step in steps:
            end = small(THIRD, tmp_path, str(tmp_path / place), step, str(int(number)), processes=processes)
            if step == "-1":
                assert {*end.status} == {0}, end.stderr
            else:
                assert {*end.status} == {STATUS[number]}, end.stderr
                after = f"after step {int(step) + 1} of 8; the same command resumes"
                assert end.lines == [f"stopped by {NAME[number]} {after}"]
                assert_clean(end, Hit(number=number), tmp_path / place)
    assert_same(*(result_of(tmp_path / x / "run") for x in "ab"))


ENDS = """
import os, signal, sys, time
from pathlib import Path
from runtime import errors, signals
from runtime.files import whole_file

def me(): os.kill(os.getpid(), signal.SIGTERM)

class Late:
    def __del__(self): me()

def main(argv):
    with whole_file(argv[0]) as file:
        file.write("half")
        file.flush()
        {what}
    raise KeyError("it went on")

errors.run(main)
"""


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("me()", "stopped by SIGTERM; if there is a checkpoint, the same command resumes from it"),
        (
            "Late(); time.sleep(60)",  # where Python drops exceptions
            "stopped by SIGTERM; if there is a checkpoint, the same command resumes from it",
        ),
        (
            "signals.hold(); signals.SAME = 0.1; me(); me(); time.sleep(0.2); me()",
            "stopped at once by SIGTERM for the second time",
        ),
    ],
)
def test_outside_of_a_loop_a_script_ends_at_once_in_one_line(what, line, tmp_path):
    end = small(ENDS.format(what=what), tmp_path, str(tmp_path / "file"))
    assert (end.lines, end.status) == ([line], [143]), end.stderr
    assert not list(tmp_path.glob("file*"))


@pytest.mark.slow
def test_a_program_that_imports_ours_keeps_its_handlers():
    program = """
import signal, sys
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook
import scavenge, train_ssl, sweep
assert before == ([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=TOP, timeout=300).returncode == 0


STARTING = """
import runtime.threads
import os, signal
os.kill(os.getpid(), signal.SIGINT)
import json  # as torch
def main(argv): pass
errors.run(main)
"""


def test_ctrl_c_while_a_script_imports_torch(tmp_path):
    (tmp_path / "script.py").write_text(STARTING)
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    started = [sys.executable, str(tmp_path / "script.py")]
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # of a background job it is ignored
    done = subprocess.run(started, capture_output=True, text=True, env=environment, timeout=300, **how)
    assert (done.returncode, done.stderr) == (130, "stopped at once by Ctrl-C\n")


SWEEP = """
import multiprocessing, os, signal, sys
from runtime import errors, scripts

def main(argv):
    server = multiprocessing.get_context("forkserver")
    running = [scripts.Running(argv, "", server, {})]
    with scripts.ends_with_all(running):
        print(scripts.first_ended(running).error, "and went on", file=sys.stderr)

if __name__ == "__main__":
    errors.run(main)
"""
CELL = """
import os, signal, sys, time
from runtime import signals

def main(argv):
    signals.hold()  # as in a training's step
    os.kill(os.getppid() if argv[0] == "parent" else int(argv[0]), signal.SIGTERM)
    while not signals.received:
        time.sleep(0.01)
    open(argv[1], "w").write("saved")
    signals.release()
"""


def test_a_sweep_waits_for_its_cell_to_be_saved(tmp_path):
    """The cell here signals the sweep, as a person would, and ends once it has got the same signal from it."""
    (tmp_path / "cell.py").write_text(CELL)
    path = tmp_path / "script.py"
    path.write_text(SWEEP.replace("Running(argv,", "Running([argv[0], str(os.getpid()), argv[1]],"))
    end = end_of([str(path), str(tmp_path / "cell.py"), str(tmp_path / "file")], tmp_path, NEVER)
    assert (end.status, len(end.lines)) == ([143], 1), end.stderr
    assert (tmp_path / "file").read_text() == "saved"


# -------------------------------------------------------------------- slow: the scripts


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_mvtec(tmp_path_factory.mktemp("parts"))


ODD = [
    "log_every=3",
    "save.every=5",
    "save.keep_last=2",
    "eval_every=1",
    "epochs=6",
]  # signals come between all of them
WORKERS = ["data.workers=2", "data.cache=none"]


def without_runs(words: list[str], *keys: str) -> list[str]:
    return [word for word in words if not word.startswith(("runs=", *keys))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hits", "more", "about"),
    [
        ("simclr", 9, [], {}),
        ("moco_v2", 9, WORKERS, {"whom": "group"}),
        ("dino", 6, [], {"processes": 2}),
    ],
)
def test_train_ssl(name, hits, more, about, classes, tmp_path):
    words = ["train_ssl.py", *without_runs(ssl_words(name, classes, tmp_path, *ODD, *more))]
    try_chain(words, tmp_path, hits, **about)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_train_classifier(processes, classes, tmp_path):
    more = ["save_every=5", "log_every=3", "early_stopping.patience=1", "early_stopping.min_delta=100", "epochs=9"]
    words = ["train_classifier.py", *without_runs(classifier_words(classes, tmp_path, *more))]
    try_chain(words, tmp_path, 4, processes=processes, steps=60)  # 8, and what is measured after them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hits", "more", "about"),
    [
        ("nsa", 5, ["save_every=5", "log_every=3", "epochs=6"], {"steps": 12}),
        ("cflow", 3, ["save_every=5", "log_every=3", "epochs=6"], {"steps": 12}),
        ("patchcore", 4, WORKERS, {"whom": "group"}),
        ("nsa", 3, ["save_every=5", "log_every=3", "epochs=6"], {"processes": 2, "steps": 12}),
    ],
)
def test_train_anomaly(name, hits, more, about, parts, tmp_path):
    words = ["train_anomaly.py", *without_runs(anomaly_words(name, parts, tmp_path, *more))]
    try_chain(words, tmp_path, hits, **about)


def files_of(folder: Path) -> dict:
    """{name: what it holds}, of JSON without times."""
    found = {}
    for path in folder.rglob("[!e]*.*"):  # TensorBoard's events apart
        values = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        found |= flat(values, str(path.relative_to(folder)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("script", "hits"), [("predict", 6), ("eval", 4)])
def test_scripts_without_a_training(script, hits, classes, parts, tmp_path):
    """What is there after a signal is whole; the same command again makes the rest."""
    fitted = end_of(["train_anomaly.py", *anomaly_words("padim", parts, tmp_path / "fitted")], tmp_path, NEVER)
    assert fitted.status == [0], fitted.stderr
    images = ["backbone=resnet18", "data.name=folder", f"data.root={classes}", "data.size=32", "device=cpu"]
    words = {
        "predict": ["predict.py", f"{tmp_path}/fitted/run", f"{parts}/part/test", "out={}/run", "device=cpu"],
        "eval": ["eval.py", "task=knn", *images, "data.cache=none", "data.workers=2", "runs={}", "run_name=run"],
    }[script]
    a, b = ([word.format(tmp_path / x) for word in words] for x in "ab")
    whole, rng = end_of(a, tmp_path / "a", NEVER), random.Random(script)
    assert whole.status == [0], whole.stderr
    for k in range(hits):
        number, whom = (signal.SIGTERM, signal.SIGINT)[k % 2], ("self", "group")[k // 2 % 2]
        hit = Hit(rng.randrange(1, whole.moments), number, whom=whom)
        assert_clean(end_of(b, tmp_path / "b", hit), hit, tmp_path / "b")
        whole_ones = files_of(tmp_path / "a" / "run")
        assert files_of(tmp_path / "b" / "run").items() <= whole_ones.items()
    assert end_of(b, tmp_path / "b", NEVER).status == [0]
    assert_same(*(files_of(tmp_path / x / "run") for x in "ab"))


def when(metrics: Path, step: int, send: Callable[[int, int], None], number: int, process: int) -> None:
    """Send a process, or its group, a signal once the metrics show the step."""
    deadline = time.monotonic() + 120
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    send(process, number)


@pytest.mark.slow
def test_sweep(classes, parts, tmp_path):
    """The cell that runs is saved and goes on where it was, no other cell starts, and the table is that of a sweep
    without signals."""
    trained = ssl_words("simclr", classes, tmp_path, "epochs=6", "save.every=99")  # so that only signals save
    detected = anomaly_words("nsa", parts, tmp_path, "epochs=5", "save_every=99")
    keys = {"pretraining": {"simclr": " ".join(without_runs(trained, "run_name="))}}
    keys |= {"detectors": {"nsa": " ".join(without_runs(detected, "run_name="))}}
    keys |= {"tasks": {"part": ""}, "also": "backbone=mobilenet_v2 backbone.width=0.25", "run_name": "grid"}
    (tmp_path / "sweep.yaml").write_text(json.dumps(keys))
    a, b = (["sweep.py", str(tmp_path / "sweep.yaml"), f"runs={tmp_path / x}"] for x in "ab")
    whole = end_of(a, tmp_path / "a", NEVER)
    assert whole.status == [0], whole.stderr
    top = tmp_path / "b" / "grid"
    first, second = top / "pretraining" / "simclr", top / "part" / "nsa" / "simclr"
    for folder, step, number, send in (
        (first, 3, signal.SIGTERM, os.kill),
        (first, 12, signal.SIGINT, os.killpg),
        (second, 2, signal.SIGINT, os.kill),
        (second, 5, signal.SIGTERM, os.killpg),
    ):
        send_it = partial(when, folder / "metrics.jsonl", step, send, number)
        end = end_of(b, tmp_path / "b", NEVER, meanwhile=send_it)
        assert_clean(end, Hit(number=number), top)
        assert torch.load(folder / "last.pt", weights_only=True)["step"] >= step
        assert not list(top.glob("results.*")) and (folder == second or not second.exists())
    last = end_of(b, tmp_path / "b", NEVER)
    assert last.status == [0] and "pretraining/simclr: done before" in last.stderr, last.stderr
    for cell in ("pretraining/simclr", "part/nsa/simclr"):
        assert_same(*(result_of(tmp_path / x / "grid" / cell) for x in "ab"))
    tables = [list(csv.DictReader((tmp_path / x / "grid" / "results.csv").open())) for x in "ab"]
    assert_same(*({k: v for k, v in flat(table).items() if not k.endswith(".weights")} for table in tables))


@pytest.mark.slow
def test_torchrun(classes, tmp_path):
    """It forwards what it gets to its processes, and waits 30 s; what it says itself, and its status, are its own."""
    words = ["train_ssl.py", *without_runs(ssl_words("simclr", classes, tmp_path, *ODD[:-1], *WORKERS, "epochs=40"))]
    for number in (signal.SIGTERM, signal.SIGINT):
        started = subprocess.Popen(
            command([*words, f"runs={tmp_path}"], processes=2), cwd=TOP, stderr=subprocess.PIPE, text=True
        )
        before = 0 if number == signal.SIGTERM else torch.load(tmp_path / "run" / "last.pt")["step"]
        when(tmp_path / "run" / "metrics.jsonl", (before // 3 + 2) * 3, os.kill, number, started.pid)
        _, text = started.communicate(timeout=300)
        lines = re.findall("stopped by .*", text)
        assert len(lines) == 1 and lines[0].startswith(f"stopped by {NAME[number]} after step"), text
        assert torch.load(tmp_path / "run" / "last.pt")["step"] == int(lines[0].split()[5]) > before


@pytest.mark.slow
@pytest.mark.parametrize("number", [*STATUS, signal.SIGKILL])
def test_the_demo_set_with_processes_that_draw(number, tmp_path):
    """The signal comes to all of them, while they still import what they need, and while they draw; if the first one
    is killed, they end by themselves."""
    words = [sys.executable, "-m", "data.demo", str(tmp_path / "set"), "scale=3"]
    about = {"cwd": TOP, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # of a background job it is ignored
    for begun in ("set.unfinished-*", "set.unfinished-*/*/*"):
        started = subprocess.Popen(words, **about, **how)
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(begun)) and time.monotonic() < deadline:
            time.sleep(0.01)
        (os.kill if number == signal.SIGKILL else os.killpg)(started.pid, number)
        while (left := members({started.pid})) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            os.killpg(started.pid, signal.SIGKILL)
        _, text = started.communicate()
        assert not left and "Traceback" not in text, (left, text)
        if number != signal.SIGKILL:
            assert started.returncode == STATUS[number] and not list(tmp_path.iterdir())
            assert text.splitlines()[-1].startswith(f"stopped by {NAME[number]}")
