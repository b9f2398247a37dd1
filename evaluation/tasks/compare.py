"""Paired bootstrap between runs, as a table and in <first run>/eval_compare/.

    python eval.py task=compare runs=runs/patchcore_imagenet,runs/patchcore_dino

Takes run folders of train_anomaly.py that were tested on the same images, resamples these images for all runs alike,
and prints which differences are more than chance (evaluation/anomaly/compare.py).
"""

from dataclasses import dataclass
from pathlib import Path

from evaluation.anomaly.compare import compare, compare_table, load_scores
from evaluation.tables import markdown_table
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.log import Log
from runtime.values import PathText, Seed
from runtime.version import code_version


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    runs: list[PathText]  # folders of train_anomaly.py; the first is what the others are compared with
    seed: Seed = 0  # of the bootstrap


def run(cfg: Config) -> None:
    distributed.setup("cpu")
    if len(cfg.runs) < 2:
        raise UserError(f"task=compare needs two run folders or more, not {len(cfg.runs)}: runs=runs/a,runs/b")
    cfg.runs = [str(checkpoint.folder_of(path)) for path in cfg.runs]
    result = compare([load_scores(Path(path) / "test_scores.pt") for path in cfg.runs], cfg.runs, seed=cfg.seed)
    folder = Path(cfg.runs[0]) / "eval_compare"
    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    table = markdown_table(*compare_table(result))
    log.text("compare", table)
    log.say(table)
    log.results({"task": "compare"} | result | {"version": code_version()})
