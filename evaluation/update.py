"""Change the training pictures of a fitted detector: learn what was added, forget what is gone, leave the rest."""

import os

import torch
from torch import nn

from data.loading import Loader
from evaluation.detection import batches_of
from training import checkpoint
from training.config import flatten
from training.errors import UserError

SECTIONS = ("backbone", "detector", "data")  # must be what the old run had,
FREE = (
    "backbone.weights",
    "backbone.part",
    "data.root",
    "data.on_error",
    "data.cache",
    "data.workers",
)  # but for these


def names_of(dataset, root: str) -> list[str]:
    """The pictures' paths below `root`: what a picture is known by in later runs."""
    return [os.path.relpath(path, root) for path in dataset.paths]


def update_memory(detector: nn.Module, path: str, resolved: dict, loader: Loader) -> str:
    """Load the fitted detector of the run at `path` and bring it to the pictures of `loader`; says what changed.

    Pictures are the same when their names below data.root are. The detector has `keep(numbers)` and `add(batches, n)`.

    Raises:
        UserError: the old run's detector, backbone or input differ, or none of its pictures is left.
    """
    old = checkpoint.load(path)
    if "learned" not in old:
        raise UserError(f"update={path} is not the last.pt of a finished run of train_anomaly.py")
    sections = [flatten({s: c[s] for s in SECTIONS}) for c in (old["config"], resolved)]
    for key in sorted({*sections[0], *sections[1]} - {*FREE}):
        if sections[0].get(key) != sections[1].get(key):
            raise UserError(
                f"update={path} was fitted with {key}={sections[0].get(key)}, this config says "
                f"{sections[1].get(key)}: make them equal, or fit anew without update"
            )
    detector.load_state_dict(old["model"])
    names = names_of(loader.dataset, resolved["data"]["root"])
    number = {names[i]: i for i in loader.indices.tolist()}
    learned = {old["names"][i] for i in old["learned"]}
    detector.keep(torch.tensor([number.get(n, -1) if n in learned else -1 for n in old["names"]], device=loader.device))
    new = torch.tensor([i for name, i in number.items() if name not in learned])
    if len(new):
        added = Loader(
            loader.dataset, loader.batch_size, loader.device, indices=new, cache=loader.cache, workers=loader.workers
        )
        detector.add(batches_of(added, "new pictures"), len(new))
    return f"update of {path}: {len(new)} pictures added, {len(learned - set(number))} removed, {len(names)} in all"
