"""The log of a run folder, as read back by json and by TensorBoard's own reader."""

import json
import math
import os
import subprocess

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.log import Log
from tests.images import TOP, command


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scalars_reach_json_and_tensorboard(tmp_path, capsys):
    log = Log(tmp_path, {"optim": {"lr": 0.1}})
    assert log.scalars(1, {"loss": torch.tensor(2.0), "nothing": None}) == {"loss": 2.0}
    log.scalars(2, {"loss": 1.5, "bad": math.nan})
    log.image("views/images 1-4", torch.zeros(3, 8, 8))
    log.results({"knn20_top1": 0.5, "worst": math.nan, "version": "x"})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "bad": "nan"}]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"knn20_top1": 0.5, "worst": None, "version": "x"}
    assert json.loads((tmp_path / "results.json").read_text())["knn20_top1"] == 0.5
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("1_loss/loss")] == [(1, 2.0), (2, 1.5)]
    assert events.Tags()["images"] == ["7_views/images 1-4"]
    assert log.repeat_results()
    assert "knn20_top1" in capsys.readouterr().out


def test_what_a_killed_process_left_after_its_checkpoint_is_dropped(tmp_path):
    log = Log(tmp_path, {})
    for step in (1, 2, 3):
        log.scalars(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    Log(tmp_path, {}, step=2).scalars(3, {"loss": 30.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_lines_are_on_the_disk_before_a_checkpoint_and_the_results_say_what_is_done(tmp_path, monkeypatch):
    log, path, synced = Log(tmp_path, {}), tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, os.fstat(file).st_size)))
    for step, end in enumerate((log.flush, lambda: log.results({"version": "x"})), 1):
        log.scalars(step, {"loss": 2.0})
        end()
        assert synced[0] == (path.stat().st_ino, path.stat().st_size)
        synced.clear()


def test_a_warning_is_said_at_the_third_point_in_a_row_and_once(tmp_path, capsys):
    log = Log(tmp_path, {})
    for step, warning in enumerate(["a", "a", None, "b", "b", "b", "b", None, "c", "c", "c"]):
        log.warn(step, warning)
    log.writer.close()
    assert capsys.readouterr().err.splitlines() == ["step 5: b", "step 10: c"]


LIMITED = """
import resource, sys, torch
from runtime import checkpoint, errors
from runtime.log import Log
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
def main(argv):
    log = Log(f"{argv[0]}/{when}", {})
    checkpoint.save(f"{argv[0]}/{when}/last.pt", {}, step=1, config={})
    if when == "at the end":
        waiting, close = log.writer.file_writer.event_writer._async_writer._byte_queue, log.writer.close
        log.writer.close = lambda: (waiting.put(bytes(100_000)), close())  # nobody asks how it went
        return log.results({"done": 1})
    if when == "in hparams":
        log.hparams = {str(i): "x" * 2000 for i in range(40)}
        return log.results({"done": 1})
    for step in range(1, 1000):
        log.scalars(step, {"loss": step})
        if step == 3:
            log.image("noise", torch.rand(3, 200, 200), step)
for when in ("at the end", "in hparams", "on the way"):
    try:
        errors.run(main)
    except SystemExit as end:
        assert end.code == 2
"""


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    """The limit acts in TensorBoard's thread, and is an OSError in Python as a full disk is."""
    words = command(["-c", LIMITED, str(tmp_path)])
    done = subprocess.run(words, cwd=TOP, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and done.stdout == ""
    for folder, line in zip(("at the end", "in hparams", "on the way"), done.stderr.splitlines(), strict=True):
        assert line.startswith(f"error: cannot write the curves in {tmp_path}/{folder}: File too large; raise the lim")
        assert f"the last good checkpoint is {tmp_path}/{folder}/last.pt" in line
        assert torch.load(tmp_path / folder / "last.pt", weights_only=True)["step"] == 1
        assert not (tmp_path / folder / "results.json").exists()
