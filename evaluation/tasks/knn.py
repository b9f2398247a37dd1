"""DINO's weighted vote of the nearest training images, on frozen features.

    python eval.py task=knn checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=knn data.root=/images backbone.weights=weights.pth

With `checkpoint`, data and backbone are what the run's config says, unless keys here say otherwise. Reports top-1 for
two usual settings (k=20 and k=200), and everything else for `task.k` and `task.temperature`. Writes results.json,
confusion.png, confused.png (test images of the most confused classes) and TensorBoard events to eval_knn/ in the
checkpoint's folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass

from evaluation.frozen import MeasureConfig, measure


@dataclass(kw_only=True)
class Config(MeasureConfig):
    """The keys of every measure of frozen features; `task.*` are those of `evaluation.frozen.knn`."""


def run(cfg: Config) -> None:
    measure(cfg)
