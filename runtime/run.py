"""What surrounds a training loop: device, run folder, log, progress bar, time, checkpoints, and what is due.

run = Run(cfg)                                   # the device; all processes have met
state = run.open(parts, total, images, {"metrics": {}})  # resumes: `parts` and `state` are as they were saved
if run.is_finished():
    return
for step in run.steps():
    batch = run.window.next(batches)
    ...
    run.window.add(loss)
    done = step + 1
    if run.due(done, cfg.log_every):
        run.check(done, lr, grad_norm, scaler)
        curves = run.curves(done, {"lr": lr, "grad_norm": grad_norm, "epoch": done / epoch_steps})
    if run.due(done, cfg.save_every) or run.stops(done):
        run.save(done, **state)
run.finish({"loss": curves["loss"]})
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import checkpoint, distributed, signals
from runtime.config import as_dict, run_folder
from runtime.errors import UserError
from runtime.files import unlock
from runtime.log import Log
from runtime.version import code_version

AGREED_EVERY = 2.0  # seconds between two looks of several processes at whether one of them got a signal


class Run:
    """It has no loop and calls nothing back: a script asks it for things and keeps the loop.

    Args:
        cfg: the script's Config, of which it reads `device`, `runs`, `run_name` and `resume`. What else the script
            settles in it before `open` is what config.yaml and the checkpoints have.

    Attributes:
        device: of this process. world: number of processes. folder: the run folder, which `open` makes.
        start, total: the step where training (re)starts, and the number of steps; a script lowers it to end early.
        log: lines, curves, images. window: what happened since the last point of the curves. Both come with `open`.
    """

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, run_folder(cfg)
        self.device, self.world = distributed.setup(cfg.device), distributed.world_size()

    def open(self, parts: dict, total: int, images: dict[str, list], fresh: dict) -> dict:
        """Make the run folder, or take up the run in it; see `checkpoint.open_run` for what it refuses and removes.

        Args:
            parts: {name: what has a state_dict} of every checkpoint; a resumed run's are restored.
            total: steps of the whole run.
            images: names and numbers of the images, which a resumed run must find again (`checkpoint.IMAGES`).
            fresh: what else the script keeps in its checkpoints, with the values of a fresh start.

        Returns:
            `fresh`, of a resumed run with the values that were saved.
        """
        self.parts, self.total, self.images, self.config = parts, total, images, as_dict(self.cfg)
        about = {"schema": type(self.cfg), "resume": self.cfg.resume, "images": images}
        saved = checkpoint.open_run(self.folder, self.config, **about) or {}
        if saved:
            checkpoint.restore(saved, parts, self.folder / checkpoint.LAST, total)
            # a kill may have come between this checkpoint and its copy
            checkpoint.keep_copy(self.folder, saved["step"], saved.get("keep_last", 0))
        self.start, self._began = saved.get("step", 0), time.perf_counter() - saved.get("seconds", 0.0)
        self.log, self.window = Log(self.folder, self.cfg, self.start), Window(self.device, saved.get("window"))
        self.log.warnings = saved.get("warnings", 0)
        self._saved, self._looked, self._look_at, self._signal = self.start, self.start, self.start + 1, 0
        if saved and (older := [key for key in fresh if key not in saved]):
            self.log.say(f"the checkpoint has no {', '.join(older)}, which begin as in a fresh run")
        return {key: saved.get(key, value) for key, value in fresh.items()}

    @property
    def seconds(self) -> float:
        """Since `open`, with the time of the sessions before this one up to their last checkpoint."""
        return time.perf_counter() - self._began

    def is_finished(self) -> bool:
        """Whether all was done before and results.json is there; prints the results again and ends the processes."""
        finished = self.start == self.total and self.log.repeat_results()
        distributed.barrier()  # all processes must have looked before rank 0 writes results
        if finished:
            unlock(self.folder)
            distributed.cleanup()
        return finished

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are still to do, behind a progress bar on rank 0; raises `signals.Stopped`
        after a step at which the run `stops`."""
        about = {"initial": self.start, "unit": "step", "disable": not distributed.is_main()}
        self._loop_began = time.perf_counter()
        with tqdm(range(self.start, self.total), self.cfg.run_name, self.total, **about) as self.bar:
            for step in self.bar:
                yield step
                if self.stops(step + 1):
                    distributed.barrier()  # no process leaves before rank 0 has saved
                    raise signals.Stopped(self._signal, self._way_back(step + 1))
                if step + 1 >= self.total:  # which the script may have lowered
                    break
        signals.release()

    def _way_back(self, done: int) -> str:
        """Where the run stops, and how it goes on, in words."""
        again = "without resume=never the same command" if self.cfg.resume == "never" else "the same command"
        since = "" if self._saved == done else f" from step {self._saved}"
        return f" after step {done} of {self.total}; {again} resumes{since}"

    def stops(self, done: int) -> bool:
        """Whether the run ends after this step because SIGTERM or Ctrl-C came, and so saves now. Every rank must call
        it. A second call in a step answers the same.

        Several processes, of which perhaps one got the signal, agree about every `AGREED_EVERY` seconds and at the
        end: asking one another means to wait for the device.
        """
        if done > self._looked:
            self._looked = done
            if self.world == 1:
                self._signal = signals.received
            elif done >= self._look_at or done == self.total:
                seconds = (time.perf_counter() - self._loop_began) / (done - self.start)
                mine = torch.tensor([signals.received, seconds], device=self.device)
                number, seconds = distributed.all_reduce_max(mine).tolist()
                self._signal, self._look_at = int(number), done + max(1, int(AGREED_EVERY / seconds))
        return self._signal != 0

    def due(self, done: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens now that so many are done."""
        return done % every == 0 or done == self.total

    def check(self, done: int, lr: float, grad_norm: Tensor, scaler: torch.amp.GradScaler) -> None:
        """`UserError` when the loss or the gradient is not finite, before weights that it ruined are saved."""
        where = f"by step {done} at lr {lr:.3g}; {checkpoint.last_good(self.folder)}"
        self.window.check(None if scaler.is_enabled() else grad_norm, where, scaler.get_scale())

    def curves(self, done: int, values: dict[str, float | Tensor]) -> dict[str, float]:
        """Write a point of the curves, the window's means and `values`; returns all of it. Every rank must call it."""
        curves = self.log.scalars(done, {**self.window.read(), **values})
        self.bar.set_postfix_str(f"loss {curves['loss']:.3f}, {curves['speed/images_per_second']:.0f} images/s")
        return curves

    def save(self, done: int, keep_last: int = 0, **state) -> None:
        """Write last.pt: the parts, the images, and the script's `state`; also as one of `keep_last` step_*.pt."""
        about = self.images | state | {"step": done, "config": self.config, "seconds": self.seconds}
        about |= {"window": self.window.state(), "warnings": self.log.warnings, "keep_last": keep_last}
        with self.window.paused():
            self.log.flush()
            checkpoint.save(self.folder / checkpoint.LAST, self.parts, **about)
            checkpoint.keep_copy(self.folder, done, keep_last)
        self._saved = done

    def finish(self, results: dict) -> None:
        """Write and print the results, of which rank 0's count, with the version of the code; ends the processes."""
        self.log.results(results | {"version": code_version()})
        distributed.barrier()
        distributed.cleanup()


class Window:
    """Means since the last reading: loss, images per second, share of the time spent waiting for data.

    The loss is added up on the device, so nothing waits for it until `read`.

    Args:
        saved: the `state` of an interrupted run, whose loss is added up further; images and time are not.
    """

    def __init__(self, device: torch.device, saved: dict | None = None):
        self.loss = torch.zeros((), device=device)
        self._restart()
        if saved is not None:
            each, world = saved["loss"], distributed.world_size()
            self.loss.fill_(each[distributed.rank()] if len(each) == world else sum(each) / len(each))
            self.losses = saved["losses"]

    def state(self) -> dict:
        """What a checkpoint keeps: the sum of each process's losses, and their number. Every rank must call it."""
        return {"loss": distributed.gather_rows(self.loss[None]).tolist(), "losses": self.losses}

    def _restart(self) -> None:
        self.loss.zero_()
        self.losses = self.images = 0
        self.waited, self.started = 0.0, time.perf_counter()

    def next(self, batches: Iterator):
        """next(batches), timed and counted; the images are as many as the batch's last entry has rows.

        From here on the step is finished before a signal ends the run. Before the first batch, for which a whole set
        may have to be decoded, there is nothing that would be lost.
        """
        asked = time.perf_counter()
        batch = next(batches)
        signals.hold()
        self.waited += time.perf_counter() - asked
        self.images += len(batch[-1]) * distributed.world_size()
        return batch

    def add(self, loss: Tensor) -> None:
        self.loss += loss.detach()
        self.losses += 1

    @contextmanager
    def paused(self):
        """What happens inside, evaluation and saving, is no training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def check(self, grad_norm: Tensor | None, where: str, scale: float = 1.0) -> None:
        """Stop on a loss of this window that is not finite, or a gradient of the last step (None: fp16's scaler has
        skipped such a step), before weights that it ruined are saved; `where` says step, learning rate and what to go
        back to. `scale` is that scaler's: it halves with each step that is skipped."""
        if scale < 1:
            raise UserError(f"fp16 has skipped nearly every step {where}; use precision=bf16 or fp32")
        for name, value in (("loss", self.loss), ("gradient's norm", grad_norm)):
            if value is not None and not torch.isfinite(value):
                raise UserError(
                    f"the {name} is {float(value)} {where}; lower the learning rate or use precision=bf16 or fp32"
                )

    def read(self) -> dict[str, float]:
        """Means over this window and all ranks; starts the next window. Every rank must call it."""
        seconds = time.perf_counter() - self.started
        values = {
            "loss": float(distributed.all_reduce_mean(self.loss)) / max(self.losses, 1),
            "speed/images_per_second": self.images / seconds,
            "speed/data_wait_share": self.waited / seconds,
        }
        self._restart()
        return values
