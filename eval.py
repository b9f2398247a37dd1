"""Measure a backbone, compare runs, or look at what they are made of.

    python eval.py task=knn checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=linear data.root=/images backbone.weights=weights.pth
    python eval.py task=compare runs=runs/patchcore_imagenet,runs/patchcore_dino
    python eval.py task=defects data.name=mvtec data.root=/mvtec data.category=tile data.size=256
    python eval.py task=describe backbones="resnet50,vit_small patch=8,convnext_tiny"

`task` chooses a file in evaluation/tasks/, which declares the other keys and does the work.
"""

import runtime.threads  # before torch

import dataclasses

from evaluation.features import stored_sections
from evaluation.tasks import TASKS, module_of
from runtime import config, errors, help
from runtime.values import PathText, coerce


def main(argv: list[str]) -> None:
    layers = config.read(argv)
    name = config.chosen(layers, "task")
    if name is None and help.asked(argv):
        lines = help.names({name: module_of(name) for name in TASKS})
        help.show(f"{__doc__}\nTasks; `task=NAME --help` shows the keys of one.\n\n{lines}")
    task = module_of(name)
    task.run(config.load(task.Config, argv, *stored(task.Config, layers)))


def schema(argv: list[str]) -> type | None:
    """The dataclass of a command line's keys, for sweep.py; None where a checkpoint has the others."""
    layers = config.read(argv)
    return None if any(layer.get("checkpoint") for layer in layers) else module_of(config.chosen(layers, "task")).Config


def stored(schema: type, layers: list[dict]) -> list[dict]:
    """The sections of the checkpoint that `layers` name, as the lowest layer of a task with a key `checkpoint` that has
    these sections."""
    named = [layer["checkpoint"] for layer in layers if "checkpoint" in layer]
    if not named or not {"checkpoint", "data", "backbone"} <= {field.name for field in dataclasses.fields(schema)}:
        return []
    path = coerce(named[-1], PathText | None, "checkpoint")
    return [] if path is None else [stored_sections(path)]


if __name__ == "__main__":
    errors.run(main)
