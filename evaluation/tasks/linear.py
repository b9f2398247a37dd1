"""A linear classifier on frozen features; learning rate chosen on a hold-out of the training set.

    python eval.py task=linear checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=linear data.root=/images backbone.weights=weights.pth

With `checkpoint`, data and backbone are what the run's config says, unless keys here say otherwise. Writes
results.json, confusion.png, confused.png (test images of the most confused classes) and TensorBoard events to
eval_linear/ in the checkpoint's folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass

from evaluation.frozen import MeasureConfig, measure


@dataclass(kw_only=True)
class Config(MeasureConfig):
    """The keys of every measure of frozen features; `task.*` are those of `evaluation.frozen.linear`."""


def run(cfg: Config) -> None:
    measure(cfg)
