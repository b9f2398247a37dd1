"""Small sweeps over a script that takes no time: it writes down what it was called with."""

import csv
import json
import re
from pathlib import Path

import sweep
from runtime import version

SCRIPT = """
import json, time
from dataclasses import dataclass, field
from pathlib import Path

from runtime import config
from runtime.version import code_version


def network():
    pass


@dataclass(kw_only=True)
class Backbone:
    name: str = config.choice(dict.fromkeys(["small", "x", "y"], network))
    weights: str | None = None
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Data:
    root: str = "images"
    workers: int = 0


@dataclass(kw_only=True)
class Optim:
    lr: float = 0.1


@dataclass(kw_only=True)
class Config:
    backbone: Backbone
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    k: int = 1
    flag: bool = False
    seed: int = 0
    resume: str = "auto"
    runs: str = "runs"
    run_name: str


def main(argv):
    cfg = config.load(Config, argv)
    folder = config.run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "calls", "a") as file:
        file.write("called\\n")
    read = Path(cfg.backbone.weights).read_text() if cfg.backbone.weights else "random"
    if cfg.k < 0:
        raise ValueError("k is negative")
    (folder / "last.pt").write_text(f"lr {cfg.optim.lr} seed {cfg.seed}")
    results = {"image_auroc": cfg.k / 10, "read": read, "time": time.time(), "version": code_version()}
    (folder / "results.json").write_text(json.dumps(results))
"""


YAML = "backbone: {name: small}\n"


def make(folder: Path) -> Path:
    """A folder with my_train.py, its copy my_test.py and x.yaml, for sweeps that are run in it."""
    for name in ("my_train.py", "my_test.py"):
        (folder / name).write_text(SCRIPT)
    (folder / "x.yaml").write_text(YAML)
    return folder


BASE = {
    "pretraining": {"random": "", "mine": "my_train.py x.yaml"},
    "detectors": {"a": "my_test.py x.yaml", "b": "my_test.py x.yaml k=2"},
    "tasks": {"part": "data.root=part"},
    "run_name": "grid",
}


def write(place: Path, **keys) -> str:
    (place / "sweep.yaml").write_text(json.dumps(BASE | keys))  # JSON is YAML
    return "sweep.yaml"


def cells_of(place, words=(), **keys):
    _, cells = sweep.plan(sweep.load([write(place, **keys), *words]))
    return {cell.name: cell.words for cell in cells}, sweep.check(cells)


def rows_of(place) -> dict[str, dict]:
    with open(place / "runs" / "grid" / "results.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def table_of(folder: Path) -> str:
    """results.md without its links and marks, which widen its columns."""
    text = (folder / "results.md").read_text()
    text = re.sub(r"\*\*|\[(.+?)\]\[\d+\]", lambda found: found[1] or "", text)
    return re.sub(r" +\|", " |", text)


def calls(place) -> dict[str, int]:
    """How often each cell was run since its folder was made."""
    top = place / "runs" / "grid"
    return {str(f.parent.relative_to(top)): len(f.read_text().split()) for f in sorted(top.rglob("calls"))}


def edit(script):
    script.write_text(script.read_text() + "# edited\n")
    version._script_hash.cache_clear()  # a sweep reads a script once
