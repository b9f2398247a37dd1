"""kNN and logistic regression with only a few labeled images per class, on frozen features.

    python eval.py task=few_label checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=few_label data.root=/images backbone.weights=weights.pth

The labeled images are drawn from the training set, several times; mean and deviation over the draws, in a table. Writes
results.json and TensorBoard events to eval_few_label/ in the checkpoint's folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass

from evaluation.few_label import DRAWS, LABELS, few_label
from evaluation.frozen import FrozenConfig, features_of, opened
from evaluation.tables import markdown_table
from runtime.values import PositiveInt


@dataclass(kw_only=True)
class Config(FrozenConfig):
    per_class: tuple[PositiveInt, ...] = LABELS  # labeled images of each class
    draws: PositiveInt = DRAWS  # of these images; their seeds are seed, seed + 1, ...


def run(cfg: Config) -> None:
    found = opened(cfg, "few_label")
    train, test = features_of(cfg, found)
    options = {"per_class": cfg.per_class, "draws": cfg.draws, "seed": cfg.seed}
    rows = few_label(train, test, n_classes=len(found.classes), **options)
    counts = train[1].bincount(minlength=len(found.classes))
    if few := [str(n) for n in cfg.per_class if (counts < n).any()]:
        found.log.say(f"some classes have fewer than {', '.join(few)} training images, and there they are all taken")
    for row in rows:
        values = {key: value for key, value in row.items() if key.endswith(("_top1", "_std"))}
        found.log.scalars(row["per_class"], {f"few_label/{key}": value for key, value in values.items()})
    table = markdown_table(
        ["labels per class", "images", "kNN (k=20)", "logistic regression"],
        [[str(row["per_class"]), str(row["n_labeled"]), _mean(row, "knn"), _mean(row, "logistic")] for row in rows],
    )
    found.log.text("few_label", table)
    found.log.say(table)
    found.write({"few_label": rows})


def _mean(row: dict, measure: str) -> str:
    spread = row[f"{measure}_top1_std"]
    return f"{row[f'{measure}_top1']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
