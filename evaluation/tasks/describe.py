"""Parameters, operations, maps and speed of a list of backbones, in a table.

    python eval.py task=describe backbones="resnet50,vit_small patch=8,convnext_tiny"

Each backbone is a name with its options; `backbones=all` takes every name. Writes results.json and TensorBoard events
to runs/<run_name>/eval_describe/.
"""

from dataclasses import dataclass
from typing import Literal

from evaluation import cost
from evaluation.tables import markdown_table
from models.backbones import BACKBONES
from models.backbones.build import build_backbone, from_words
from runtime import checkpoint, config, distributed
from runtime.errors import UserError
from runtime.log import Log
from runtime.precision import PRECISIONS
from runtime.values import PathText, Pixels, PositiveInt
from runtime.version import code_version


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    backbones: list[str]  # each a name and its options, as words
    size: Pixels = 224  # side of the images
    batch_size: PositiveInt = 16  # images per forward
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward whose speed is measured
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it


def run(cfg: Config) -> None:
    if not cfg.backbones:
        raise UserError("task=describe needs backbones: names with their options, or all")
    device = distributed.setup(cfg.device)
    asked = list(BACKBONES) if cfg.backbones == ["all"] else cfg.backbones
    backbones = [from_words(text, "backbones") for text in asked]
    folder = config.run_folder(cfg) / "eval_describe"
    checkpoint.open_run(folder, config.as_dict(cfg))
    log, described = Log(folder, cfg), {}
    for name, settings in zip(asked, backbones):
        backbone, _ = build_backbone(settings)
        about = {"batch_size": cfg.batch_size, "device": device, "dtype": PRECISIONS[cfg.precision]}
        described[name] = cost.describe(backbone, cfg.size, **about)
    table = markdown_table(*cost.description_table(described))
    log.text("describe", table)
    log.say(table)
    log.results({"task": "describe", "backbones": described, "version": code_version()})
    distributed.cleanup()
