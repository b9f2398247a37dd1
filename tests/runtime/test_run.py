"""A third script on `Run`: begun, killed, resumed and finished; and the means between points of the curves."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from runtime import checkpoint
from runtime.errors import UserError
from runtime.run import Run, Window

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@dataclass(kw_only=True)
class Config:
    runs: str
    run_name: str = "run"
    lr: float = 0.1
    device: str = "cpu"
    resume: str = "auto"
    log_every: int = 2
    save_every: int = 3


def main(cfg: Config, *, killed_in: int = 99, names: str = "ab", in_step: Callable[[int], None] = id) -> list[int]:
    """Descends w^2 in eight steps; returns the steps that were made."""
    run, made = Run(cfg), []
    w = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(w.weight)
    optimizer = torch.optim.SGD(w.parameters(), lr=cfg.lr, momentum=0.5)
    state = run.open({"model": w, "optimizer": optimizer}, 8, {"names": list(names)}, {"curves": {}, "least": 1.0})
    if run.is_finished():
        return made
    batches = iter([[torch.arange(4)]] * 8)
    for step in run.steps():
        if step == killed_in:
            raise KeyboardInterrupt
        made.append(step)
        run.window.next(batches)
        in_step(step)
        loss = w.weight.square().sum()
        run.window.add(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        if run.due(done, cfg.log_every):
            run.check(done, cfg.lr, w.weight.grad.norm(), NO_SCALER)
            state["curves"] = run.curves(done, {"lr": cfg.lr})
        state["least"] = min(state["least"], loss.item())
        if run.due(done, cfg.save_every) or run.stops(done):
            run.save(done, keep_last=int(run.due(done, cfg.save_every)), **state)
    run.finish({"loss": state["curves"]["loss"], "least": state["least"], "seconds": run.seconds})
    return made


def read(folder: Path) -> tuple[list[dict], dict, dict]:
    """Curves without speeds, results without what differs from run to run, the last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves = [{key: value for key, value in line.items() if "speed" not in key} for line in lines]
    results = json.loads((folder / "results.json").read_text())
    return curves, {key: results[key] for key in ("loss", "least")}, torch.load(folder / "last.pt", weights_only=True)


def test_a_run_that_was_killed_equals_one_that_was_not(tmp_path, capsys):
    assert main(Config(runs=f"{tmp_path}/a")) == list(range(8))
    with pytest.raises(KeyboardInterrupt):
        main(Config(runs=f"{tmp_path}/b"), killed_in=7)
    assert main(Config(runs=f"{tmp_path}/b")) == [6, 7]  # saved every third step, and at the end
    (curves, results, state), other = (read(tmp_path / name / "run") for name in "ab")
    assert [line["step"] for line in curves] == [2, 4, 6, 8] and curves[0]["loss"] == pytest.approx((1 + 0.64) / 2)
    assert (curves, results) == other[:2] and torch.equal(state["model"]["weight"], other[2]["model"]["weight"])
    assert state["step"] == 8 and state["names"] == ["a", "b"] and state["config"]["lr"] == 0.1
    assert sorted(p.name for p in (tmp_path / "b" / "run").glob("*.pt")) == ["last.pt", "step_00000008.pt"]
    capsys.readouterr()
    assert main(Config(runs=f"{tmp_path}/b")) == []  # finished: its results again
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] == results["loss"]


def test_time_goes_on_where_the_checkpoint_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        main(Config(runs=str(tmp_path)), killed_in=4)
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    torch.save(state | {"seconds": 1000.0}, tmp_path / "run" / "last.pt")
    main(Config(runs=str(tmp_path)))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seconds"] > 1000


def test_another_config_other_images_and_a_loss_that_is_no_number_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        main(Config(runs=str(tmp_path)), killed_in=4)
    with pytest.raises(UserError, match=r"another config \(lr: 0\.1 -> 0\.2\)"):
        main(Config(runs=str(tmp_path), lr=0.2))
    with pytest.raises(UserError, match=r"training images .* changed since it began"):
        main(Config(runs=str(tmp_path)), names="abc")
    assert main(Config(runs=str(tmp_path), lr=0.2, resume="never")) == list(range(8))
    with pytest.raises(UserError, match=r"the loss is inf by step 2 at lr 1e\+30; there is no checkpoint yet"):
        main(Config(runs=str(tmp_path), run_name="other", lr=1e30))


def test_window():
    window = Window(torch.device("cpu"))
    for value in (1.0, 2.0, 6.0):
        batch = torch.zeros(8, 3), torch.arange(8)
        assert window.next(iter([batch])) is batch
        window.add(torch.tensor(value))
    values = window.read()
    assert values["loss"] == 3.0 and values["speed/images_per_second"] > 0 and values["speed/data_wait_share"] >= 0
    window.add(torch.tensor(5.0))
    window.check(torch.tensor(2.0), "here")
    with pytest.raises(UserError, match="the gradient's norm is nan by step 3"):  # of a loss that is a number yet
        window.check(torch.tensor(math.nan), "by step 3")
    window.check(None, "here")
    assert window.read()["loss"] == 5.0
    window.add(torch.tensor(math.inf))
    with pytest.raises(UserError, match="the loss is inf by step 3"):
        window.check(None, "by step 3")


def test_pauses_are_no_training_time_and_a_vanishing_scale_stops():
    window = Window(torch.device("cpu"))
    started = window.started
    with window.paused():
        time.sleep(0.05)
    assert window.started >= started + 0.05
    window.check(None, "here", scale=1.0)
    with pytest.raises(UserError, match="fp16 has skipped nearly every step by step 30"):
        window.check(None, "by step 30", scale=0.5)
