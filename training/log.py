"""TensorBoard, metrics.jsonl and results.json of a run folder; only rank 0 writes."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import checkpoint, distributed
from training.config import flatten
from training.errors import ADVICE, UserError
from training.files import whole_file
from training.text import printable
from training.version import another_version


class Log:
    """What a run shows: `scalars` to TensorBoard and metrics.jsonl, pictures, text, and the final results.

    Args:
        folder: the run folder. `step`: where training (re)starts; lines and events after it, left by a killed process,
        are dropped, so that an interrupted run's curves equal an uninterrupted one's.
    """

    def __init__(self, folder: str | Path, config: dict, step: int = 0):
        self.folder, self.config, self.writer, self.warnings = Path(folder), config, None, 0
        if not distributed.is_main():
            return
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with whole_file(self._metrics) as file:
            file.writelines(line + "\n" for line in kept)
        threading.excepthook = _without_tensorboard
        with self._writing():
            self.writer = SummaryWriter(self.folder, purge_step=step + 1)
        self.text("config", "```yaml\n" + yaml.safe_dump(config, sort_keys=False) + "```")

    @contextmanager
    def _writing(self):
        """What cannot be written inside, or by TensorBoard's thread before, is a `UserError`."""
        try:
            yield
        except OSError as error:
            what = f"cannot write the curves in {self.folder}: {error.strerror or error}"
            advice = f"{ADVICE.get(error.errno, 'make it possible')}, then the same command resumes"
            raise UserError(f"{what}; {advice}; {checkpoint.last_good(self.folder)}") from None

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def scalars(self, step: int, values: dict[str, float | Tensor]) -> dict[str, float]:
        """Write one line and one point a value; tensors are read here, which waits for the device. Returns floats."""
        values = {key: float(value) for key, value in values.items() if value is not None}
        if self.writer:
            finite = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
            with self._writing():
                for key, value in values.items():
                    self.writer.add_scalar(key, value, step)
                with open(self._metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **finite}) + "\n")
        return values

    def picture(self, tag: str, image: Tensor, step: int = 0) -> None:
        """A (3, H, W) picture, uint8 or float in [0, 1]."""
        if self.writer:
            with self._writing():
                self.writer.add_image(tag, image, step)

    def say(self, line: str) -> None:
        """A line for the person at the terminal, on stderr: stdout's last line is the results."""
        if self.writer:
            tqdm.write(printable(line), file=sys.stderr)  # above a progress bar, not into it

    def warn(self, step: int, warning: str | None) -> None:
        """Say what is wrong when it was so at three points in a row, for a loss may pass through any value; once until
        it is well again. Also under TensorBoard's text."""
        self.warnings = self.warnings + 1 if warning else 0
        if self.warnings == 3:
            self.warn_now(step, warning)

    def warn_now(self, step: int, warning: str | None) -> None:
        """Say at once what is wrong at this step, if anything is; also under TensorBoard's text."""
        if warning:
            self.say(f"step {step}: {warning}")
            self.text("warning", warning, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        if self.writer:
            with self._writing():
                self.writer.add_text(tag, printable(text), step)

    def results(self, results: dict) -> None:
        """Write results.json and TensorBoard's hparams; print the JSON as the script's last line on stdout."""
        if not self.writer:
            return
        hparams = {k: v for k, v in flatten(self.config).items() if isinstance(v, int | float | str | bool)}
        hparams = {k: printable(v) if isinstance(v, str) else v for k, v in hparams.items()}
        metrics = {f"final/{k}": v for k, v in results.items() if isinstance(v, int | float)}
        with self._writing():
            self.writer.add_hparams(hparams, metrics, run_name=".")
            self.writer.close()
        with whole_file(self.folder / "results.json") as file:
            file.write(json.dumps(results) + "\n")
        print(json.dumps(results), flush=True)

    def repeat_results(self) -> bool:
        """Whether this run had its results written already; prints them again."""
        path = self.folder / "results.json"
        if path.exists() and self.writer:
            other = another_version(json.loads(path.read_text()).get("version"))
            other = other and f", by {other}"
            self.say(f"done before{other}: these are the results in {path} (resume=never starts afresh)")
            print(path.read_text().strip(), flush=True)
        return path.exists()


def _without_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """threading.excepthook: what TensorBoard's thread could not write its writer raises again, so no traceback here."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)


class Window:
    """Means since the last reading: loss, pictures a second, share of the time spent waiting for data.

    The loss is added up on the device, so nothing waits for it until `read`.
    """

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self._restart()

    def _restart(self) -> None:
        self.loss.zero_()
        self.losses = self.pictures = 0
        self.waited, self.started = 0.0, time.perf_counter()

    def next(self, batches: Iterator):
        """next(batches), timed and counted; the pictures are as many as the batch's last entry has rows."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        self.pictures += len(batch[-1]) * distributed.world_size()
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
            "speed/images_per_second": self.pictures / seconds,
            "speed/data_wait_share": self.waited / seconds,
        }
        self._restart()
        return values
