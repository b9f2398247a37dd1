"""A sweep's cells on several devices at a time: which one each sees, and what is left of a sweep that is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import sweep
from runtime import signals
from runtime.errors import UserError
from tests.images import TOP
from tests.sweeps import SCRIPT, calls, make, rows_of, write

MEETS = """
    folder.parent.mkdir(parents=True, exist_ok=True)
    Path(f"seen_{folder.parent.name}_{folder.name}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    if Path("together").exists():  # each cell waits until two have begun
        while len([*Path(".").glob("seen_*")]) < 2:
            time.sleep(0.01)
        while folder.parent.name == "pretraining" and not Path("seen_b_random").exists():  # which has to overtake
            time.sleep(0.01)
    if Path("held").exists() and folder.parent.name == "b":
        print("held up", file=sys.stderr)
        Path(f"pid_{folder.name}").write_text(str(os.getpid()))
        time.sleep(300)
"""
FOUR = {"pretraining": {"random": "", "mine": "my_train.py x.yaml"}}
FOUR |= {"detectors": {"a": "my_test.py x.yaml", "b": "my_test.py x.yaml k=2"}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    script = SCRIPT.replace("import json, time", "import json, os, sys, time")
    script = script.replace("    folder.mkdir(", MEETS + "    folder.mkdir(")
    for name in ("my_train.py", "my_test.py"):
        (tmp_path / name).write_text(script)
    return tmp_path


def seen(place) -> dict[str, str]:
    return {path.name.removeprefix("seen_"): path.read_text() for path in sorted(place.glob("seen_*"))}


def test_cells_run_at_the_same_time_each_on_its_own_device(place, capfd):
    (place / "together").touch()
    sweep.main([write(place, **FOUR), "devices=3,GPU-8f"])
    devices = seen(place)
    assert devices.keys() == {"pretraining_mine", "a_random", "b_random", "a_mine", "b_mine"}
    assert {*devices.values()} == {"3", "GPU-8f"} and "CUDA_VISIBLE_DEVICES" not in os.environ
    rows = rows_of(place)  # in the order of the sweep, whichever ended first
    assert list(rows) == ["pretraining/mine", "part/a/random", "part/a/mine", "part/b/random", "part/b/mine"]
    assert rows["part/a/mine"]["read"] == "lr 0.1 seed 0", "a pretraining comes before what needs it"
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["failed"] == []
    sweep.main([write(place, **FOUR), "devices=cpu"])
    assert capfd.readouterr().err.count("done before") == 5 and {*calls(place).values()} == {1}


def test_a_failed_pretraining_stops_only_what_needs_it(place, capfd):
    with pytest.raises(SystemExit):
        sweep.main(
            [
                write(place, **FOUR | {"pretraining": {"random": "", "mine": "my_train.py x.yaml k=-1"}}),
                "devices=cpu,cpu",
            ]
        )
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["failed"] == ["pretraining/mine", "part/a/mine", "part/b/mine"]
    assert "    failed: ValueError: k is negative (pretraining/mine)" in err.splitlines()
    assert seen(place) == dict.fromkeys(["a_random", "b_random", "pretraining_mine"], "")
    assert "k is negative" in (place / "runs/grid/.cells/pretraining/mine.log").read_text()  # its traceback


@pytest.mark.parametrize(
    ("visible", "count", "keys", "expected"),
    [
        (None, 0, {}, [""]),
        (None, 4, {}, ["0", "1", "2", "3"]),
        ("2, 5", 2, {}, ["2", "5"]),
        ("2,5,9", 2, {}, ["2", "5"]),  # torch finds only these
        ("", 0, {}, [""]),
        (None, 4, {"also": "device=cpu"}, [""]),
        (None, 4, {"also": "device=cuda"}, ["0", "1", "2", "3"]),
        (None, 4, {"also": "device=cuda:1"}, [""]),  # one after the other, there
        (None, 4, {"launcher": "torchrun"}, [""]),
        (None, 4, {"devices": ["0", "0", "cpu"]}, ["0", "0", "cpu"]),
    ],
)  # fmt: skip
def test_which_devices(visible, count, keys, expected, place, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name in ("my_train.py", "my_test.py"):
        (place / name).write_text(SCRIPT.replace("    k: int = 1", '    k: int = 1\n    device: str = "auto"'))
    cfg = sweep.load([write(place, **FOUR | keys)])
    assert sweep.devices_of(cfg, sweep.check(sweep.plan(cfg)[1])) == expected


def test_devices_beside_what_also_chooses_them(place):
    with pytest.raises(UserError, match="devices gives each cell one device, and launcher gives a cell several"):
        sweep.main([write(place, **FOUR), "devices=0,1", "launcher=torchrun --nproc_per_node=2"])
    (place / "fixed.py").write_text(SCRIPT.replace("    k: int = 1", '    k: int = 1\n    device: str = "cuda:1"'))
    with pytest.raises(UserError, match=r"part/c/\w+ has device=cuda:1, but devices gives each cell its own"):
        sweep.main([write(place, **FOUR | {"detectors": {"c": "fixed.py x.yaml"}}), "devices=0,1"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_with_two_cells_running_goes_on_where_it_was(number, place):
    (place / "held").touch()
    words = [sys.executable, str(TOP / "sweep.py"), write(place, **FOUR), "devices=6,7"]
    environment = os.environ | {"PYTHONPATH": str(TOP)}
    how = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # of a background job it is ignored
    started = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, **how)
    while len([*place.glob("pid_*")]) < 2 or not all(path.read_text() for path in place.glob("pid_*")):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    cells = [int(path.read_text()) for path in place.glob("pid_*")]
    os.kill(started.pid, number)
    assert started.wait(timeout=120) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    deadline = time.monotonic() + 60
    while any(signals.state_of(cell) not in ("Z", "X", "") for cell in cells):
        assert time.monotonic() < deadline, "a cell outlives its sweep"
        time.sleep(0.05)
    before = calls(place)
    assert before == {"part/a/mine": 1, "part/a/random": 1, "pretraining/mine": 1}
    assert not [*(place / "runs/grid").glob("results.*")]
    (place / "held").unlink()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.count("done before") == 3, done.stderr
    assert calls(place) == before | {"part/b/mine": 1, "part/b/random": 1}
    assert {path.name for path in (place / "runs/grid").iterdir()} >= {"results.html", "results.md", "results.csv"}
