"""Change the training images of a fitted detector: learn what was added, forget what is gone, leave the rest."""

from dataclasses import replace

import torch
from torch import nn

from data import DataConfig
from data.depth import WHITE
from data.loading import Loader
from evaluation.anomaly.detection import batches_of
from models.anomaly import DetectorConfig
from models.anomaly.detector import Detector
from models.backbones.build import BackboneConfig
from runtime import checkpoint
from runtime.config import completed, flatten
from runtime.errors import UserError
from runtime.integrity import faults_of_part, first_two
from runtime.values import coerce
from runtime.version import another_version

# what must be as the old run had it, but for FREE, which changes nothing that a memory already holds
SECTIONS = {"backbone": BackboneConfig, "detector": DetectorConfig, "data": DataConfig}
FREE = ("backbone.weights", "backbone.part", "detector.image_score", "data.masks", "data.category")


def with_range_of(path: str, config: DataConfig) -> DataConfig:
    """The section with the black and white that the run to update was fitted with: `auto` must not find others."""
    old = checkpoint.section(checkpoint.load(path), "data", path)
    ends = {
        key: old.get(key, fixed) for key, fixed in (("white", WHITE), ("black", 0)) if getattr(config, key) == "auto"
    }
    return replace(
        config, **{key: coerce(end, float, f"the config in {path}: data.{key}") for key, end in ends.items()}
    )


def load_memory(path: str, resolved: dict, detector: nn.Module) -> dict:
    """The checkpoint of a fitted run to update, proved to fit this run's config and backbone.

    Raises:
        UserError: it is no finished run, or its detector, backbone, input or precision differ.
    """
    old = checkpoint.load(path)
    if "calibration" not in old:
        raise UserError(f"update={path} is not the last.pt of a finished run of train_anomaly.py")
    before = {name: completed(schema, checkpoint.section(old, name, path)) for name, schema in SECTIONS.items()}
    before["precision"] = old["config"].get("precision")
    now = {name: resolved[name] for name in before}
    for key in checkpoint.config_changes(before, now):
        if key not in FREE:
            raise UserError(
                f"update={path} was fitted with {key}={flatten(before).get(key)}, this config says "
                f"{flatten(now).get(key)}: make them equal, or fit anew without update"
            )
    if found := faults_of_part(detector, old.get("model"), "model"):
        raise UserError(f"update={path} does not fit this config: {first_two(found)}; fit anew without update")
    if "names" not in old or not {*old.get("learned", [-1])} <= {*range(len(old["names"]))}:
        raise UserError(f"update={path} does not name the images that it learned: fit anew without update")
    for name, tensor in detector.backbone.state_dict().items():
        if not torch.equal(tensor.cpu(), old["model"][f"backbone.{name}"]):
            raise UserError(
                f"update={path} has other backbone weights ({name} differs): give the same backbone.weights"
            )
    return old


def update_memory(detector: Detector, old: dict, names: list[str], loader: Loader) -> str:
    """Bring the fitted detector of checkpoint `old` to the images of `loader`; returns what changed, in words.

    Images are the same when their names below data.root are; `names` are those of all of the loader's dataset. The
    detector has `keep(numbers)` and `add(batches, n)`. Raises UserError when none of its images is left.
    """
    geometry = loader.dataset.geometry
    detector.load_state_dict(old["model"])
    detector.try_out("the run to update", (geometry.height, geometry.width))
    number = {names[i]: i for i in loader.indices.tolist()}
    learned = {old["names"][i] for i in old["learned"]}
    detector.keep(torch.tensor([number.get(n, -1) if n in learned else -1 for n in old["names"]], device=loader.device))
    new = torch.tensor([i for name, i in number.items() if name not in learned])
    if len(new):
        added = Loader(
            loader.dataset, loader.batch_size, loader.device, indices=new, cache=loader.cache, workers=loader.workers
        )
        detector.add(batches_of(added, "new images", detector.normalization), len(new))
    other = another_version(old.get("version"), with_script=False)
    kept = other and f"; those from before were learned by {other}, without update all are learned anew"
    return f"update: {len(new)} images added, {len(learned - set(number))} removed, {len(number)} in all{kept}"
