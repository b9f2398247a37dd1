"""TensorBoard, metrics.jsonl and results.json of a run folder; only rank 0 writes."""

import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.summary_pb2 import DataClass
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm import tqdm

from runtime import checkpoint, distributed
from runtime.config import as_dict, changed
from runtime.errors import ADVICE, UserError, cut
from runtime.files import unlock, whole_file
from runtime.tags import HEADLINES, layout, tag_of
from runtime.text import printable
from runtime.version import another_version

# What torch leaves out of these kinds of summaries, without which TensorBoard's loader drops the description.
WITHOUT_METADATA = {
    "simple_value": ("scalars", DataClass.DATA_CLASS_SCALAR),
    "image": ("images", DataClass.DATA_CLASS_BLOB_SEQUENCE),
    "histo": ("histograms", DataClass.DATA_CLASS_TENSOR),
}

SCENE = {  # of a mesh: seen from above, lit from above, both sides of its triangles
    "camera": {"cls": "PerspectiveCamera", "fov": 60, "position": [1.2, 1.8, 2.6], "lookAt": [0, 0, 0]},
    "lights": [
        {"cls": "AmbientLight", "color": "#ffffff", "intensity": 0.8},
        {"cls": "DirectionalLight", "color": "#ffffff", "intensity": 0.3, "position": [1, 3, 2]},
    ],
    "material": {"cls": "MeshStandardMaterial", "side": 2, "roughness": 1, "metalness": 0},
}


class Log:
    """What a run shows: `scalars` to TensorBoard and metrics.jsonl, images, text, and the final results.

    In TensorBoard everything stands under the tag, and with the description, that runtime/tags.py has for its key.

    Args:
        folder: the run folder.
        config: the script's Config, or plain nested values.
        step: where training (re)starts; lines and events after it, left by a killed process, are dropped, so that an
            interrupted run's curves equal an uninterrupted one's.
    """

    def __init__(self, folder: str | Path, config, step: int = 0):
        self.folder, self.config, self.warnings = Path(folder), as_dict(config), 0
        self.writer: Any = None  # a SummaryWriter, of rank 0 only
        self.hparams, self.has_charts = changed(config), False
        self.hparams.pop("run_name", None)  # TensorBoard names each run anyway
        if not distributed.is_main():
            return
        kept, damaged = self._lines_up_to(step)
        with whole_file(self._metrics, durable=True) as file:
            file.writelines(line + "\n" for line in kept)
        threading.excepthook = _without_tensorboard
        with self._writing():
            self.writer = SummaryWriter(self.folder, purge_step=step + 1)
        self.text("config", "```yaml\n" + yaml.safe_dump(self.config, sort_keys=False) + "```")
        if damaged:
            self.say(f"{self._metrics}: left out damaged lines: {damaged}")

    def _lines_up_to(self, step: int) -> tuple[list[str], int]:
        """The lines of metrics.jsonl up to this step, and the number of those that are damaged, as by a killed process
        or a power cut."""
        if not self._metrics.is_file():
            return [], 0
        try:
            lines = self._metrics.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"cannot read {self._metrics}: {error.strerror}") from None
        steps = [_step_of(line) for line in lines]
        kept = [line.decode() for line, at in zip(lines, steps) if at is not None and at <= step]
        return kept, steps.count(None)

    @contextmanager
    def _writing(self):
        """What cannot be written inside, or by TensorBoard's thread before, is a `UserError`."""
        try:
            yield
        except OSError as error:
            what = f"cannot write the curves in {cut(str(self.folder))}: {error.strerror or error}"
            advice = f"{ADVICE.get(error.errno, 'make it possible')}, then the same command resumes"
            raise UserError(f"{what}; {advice}; {checkpoint.last_good(self.folder)}") from None

    def _add(self, key: str, made, step: int) -> None:
        """Write one of torch's summaries, made with `key` as its tag, under the tag that tags.py has for the key."""
        key, (value,) = printable(key), made.value
        tag, value.metadata.summary_description = tag_of(key)
        value.tag = tag + value.tag.removeprefix(key)  # torch adds "/text_summary" to texts
        if kind := WITHOUT_METADATA.get(value.WhichOneof("value")):
            value.metadata.plugin_data.plugin_name, value.metadata.data_class = kind
        self.writer.file_writer.add_summary(made, step)

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def scalars(self, step: int, values: Mapping[str, float | Tensor | None]) -> dict[str, float]:
        """Write one line and one point a value; tensors are read here, which waits for the device. Returns floats."""
        floats = {key: float(value) for key, value in values.items() if value is not None}
        if self.writer:
            finite = {key: value if math.isfinite(value) else str(value) for key, value in floats.items()}
            with self._writing():
                if not self.has_charts:
                    self.writer.add_custom_scalars(layout())
                    self.has_charts = True
                for key, value in floats.items():
                    self._add(key, summary.scalar(key, value), step)
                with open(self._metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **finite}) + "\n")
        return floats

    def image(self, key: str, image: Tensor, step: int = 0) -> None:
        """A (3, H, W) image, uint8 or float in [0, 1]."""
        if self.writer:
            with self._writing():
                self._add(key, summary.image(printable(key), image, dataformats="CHW"), step)

    def histogram(self, key: str, values: Tensor, step: int = 0) -> None:
        """How the values (N,) spread."""
        if self.writer:
            with self._writing():
                self._add(key, summary.histogram(printable(key), values.numpy(), self.writer.default_bins), step)

    def precision_recall(self, key: str, labels: Tensor, predictions: Tensor) -> None:
        """TensorBoard's curve of `labels` (N,) 0/1 and `predictions` (N,) in [0, 1]."""
        if self.writer:
            with self._writing():
                self._add(key, summary.pr_curve(printable(key), labels.numpy(), predictions.numpy()), 0)

    def embedding(self, key: str, points: Tensor, columns: dict[str, list[str]], images: Tensor) -> None:
        """TensorBoard's projector: points (N, D), of each a text in every column, and an image uint8 (N, 3, s, s)."""
        if self.writer:
            header = list(columns)
            rows = [[_one_cell(text) for text in row] for row in zip(*columns.values())]
            about = {"metadata": rows, "metadata_header": header, "label_img": images.float() / 255, "tag": key}
            with self._writing():
                shutil.rmtree(self.folder / "00000" / key, ignore_errors=True)  # of a run before, else torch prints
                self.writer.add_embedding(points.float(), **about)

    def mesh(self, key: str, vertices: Tensor, colors: Tensor, faces: Tensor) -> None:
        """A surface to turn: vertices (N, 3), fewer than 2^16; their colors uint8 (N, 3); triangles int (F, 3)."""
        if self.writer:
            tag, description = tag_of(key)
            points, colored, numbers = (x[None].cpu().numpy() for x in (vertices.float(), colors, faces))  # (1, N, 3)
            with self._writing():
                made = summary.mesh(printable(tag), points, colored, numbers, SCENE, description=description)
                self.writer.file_writer.add_summary(made, 0)

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

    def text(self, key: str, text: str, step: int = 0) -> None:
        if self.writer:
            with self._writing():
                self._add(key, summary.text(printable(key), printable(text)), step)

    def flush(self) -> None:
        """Bring what was written onto the disk: the lines of metrics.jsonl for good, since after a power cut the
        checkpoint that follows does not make them again; TensorBoard's events as far as the system's cache."""
        if self.writer:
            with self._writing():
                self.writer.flush()
                with open(self._metrics, "rb") as file:
                    os.fsync(file.fileno())

    def results(self, results: dict) -> None:
        """Write results.json and TensorBoard's hparams; print the JSON as the script's last line on stdout. Other
        processes may then write in the folder."""
        if not self.writer:
            return
        self.flush()
        values = {f"{'1_final' if k in HEADLINES else 'final'}/{k}": v for k, v in results.items() if _is_number(v)}
        values |= {key: v if _is_number(v) else printable(str(v)) for key, v in self.hparams.items()}
        with self._writing():
            # Not add_hparams: its metrics are cards of one dot, and its list of keys, which TensorBoard reads of the
            # first run only, hides the keys that only other runs have.
            _, *session = summary.hparams(values, {})
            for part in session:
                self.writer.file_writer.add_summary(part)
            self.writer.close()
        line = json.dumps(_without_nan(results))
        with whole_file(self.folder / "results.json", durable=True) as file:
            file.write(line + "\n")
        unlock(self.folder)
        print(line, flush=True)

    def repeat_results(self) -> bool:
        """Whether this run had its results written already; prints them again. A damaged file is reported, counts as
        none, so that the run writes it anew."""
        path = self.folder / "results.json"
        results = checkpoint.read_object(path) or {}
        version = results.get("version")
        if not isinstance(version, str):
            if path.exists():
                self.say(f"{path} is damaged: the results are written anew")
            return False
        if self.writer:
            other = another_version(version)
            other = other and f", by {other}"
            self.say(f"done before{other}: these are the results in {path} (resume=never starts from the beginning)")
            print(json.dumps(results), flush=True)
        return True


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, None of a damaged one."""
    try:
        step = json.loads(line.decode()).get("step")
    except (ValueError, AttributeError, RecursionError):
        return None
    return step if type(step) is int else None


def _without_nan(value):
    """JSON has no NaN and no infinity: these become null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_cell(text: str) -> str:
    """A cell of a TSV file, which has no way to quote."""
    return " ".join(printable(text).split()) or "-"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """threading.excepthook: what TensorBoard's thread could not write its writer raises again, so no traceback here."""
    if not type(failed.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(failed)
