"""One backbone on several data sets: logistic regression on its frozen features, a row per set.

    python eval.py task=transfer checkpoint=runs/simclr data.name=mixed data.size=96 \\
        data.sets.steel.name=folder data.sets.steel.root=/steel data.sets.tiles.name=folder data.sets.tiles.root=/tiles

`data.sets` are those of a mixed set (docs/data.md), but each is measured by itself, on its own split. The penalty is
chosen on a hold-out of each training set, as in SimCLR's linear transfer (Chen et al. 2020, B.8), which is that of
Kornblith et al. (2019). They report top-1, but of FGVC Aircraft, Oxford Pets, Caltech-101 and Oxford Flowers the mean
accuracy per class; the table has both. For fine-tuned networks: python sweep.py configs/sweeps/transfer.yaml. Writes
results.json and TensorBoard events to eval_transfer/ in the checkpoint's folder (without one: in runs/<run_name>/).
"""

import statistics
from dataclasses import dataclass

from data.datasets.mixed import Mixed
from evaluation.compare_classification import interval, with_replicates
from evaluation.frozen import FrozenConfig, features_of, opened
from evaluation.logistic import logistic_probe
from evaluation.tables import markdown_table, with_interval
from runtime.errors import UserError

METRICS = {"accuracy": "top1", "recall": "balanced_accuracy"}  # by their keys in results.json


@dataclass(kw_only=True)
class Config(FrozenConfig):
    """The keys of every task on frozen features."""


def run(cfg: Config) -> None:
    check(cfg)
    found = opened(cfg, "transfer")
    assert isinstance(found.train_set, Mixed) and isinstance(found.test_set, Mixed)
    parts = [(name, part, found.test_set.parts[name]) for name, part in found.train_set.parts.items()]
    for name, part, _ in parts:
        if len(part.labels.unique()) < 2:
            raise UserError(f"data.sets.{name} has training images of one class only, and transfer needs two or more")
    (train, _), (test, _) = features_of(cfg, found)  # of all sets, one after the other
    by_set = zip(
        parts,
        train.split([len(part) for _, part, _ in parts]),
        test.split([len(tested) for _, _, tested in parts]),
    )
    rows = []
    for (name, part, tested), own_train, own_test in by_set:
        device, n_classes = own_train.device, len(part.classes)
        labels = part.labels.to(device)
        scores, report = logistic_probe(own_train, labels, own_test, n_classes=n_classes, seed=cfg.seed)
        ((values, replicates),) = with_replicates([scores], tested.labels, seed=cfg.seed)
        row = {"set": name, "n_classes": n_classes, "n_train": len(part), "n_test": len(tested)}
        for metric, key in METRICS.items():
            row |= {key: values[metric], f"{key}_interval": interval(replicates[metric])}
        rows.append(row | {"l2": report["l2"]})
    means = {key: statistics.fmean(row[key] for row in rows) for key in METRICS.values()}
    table = markdown_table(
        ["set", "classes", "training images", "test images", "top-1 [95 %]", "mean per class [95 %]"],
        [
            [*(str(row[key]) for key in ("set", "n_classes", "n_train", "n_test")), *shown(row)]
            for row in (*rows, {"set": "mean", "n_classes": "", "n_train": "", "n_test": ""} | means)
        ],
    )
    found.log.text("transfer", table)
    found.log.say(table)
    found.write({"sets": rows} | means)


def check(cfg: Config) -> None:
    """`UserError` for data that are not several sets side by side."""
    if cfg.data.name != "mixed":
        raise UserError(f"task=transfer takes data.name=mixed with data.sets, not data.name={cfg.data.name}")
    for key, default in (("merge", None), ("min_per_class", 1)):
        if cfg.data.options[key] != default:
            raise UserError(f"task=transfer measures each set by itself, in which data.{key} has no place: remove it")


def shown(row: dict) -> list[str]:
    return [with_interval(row, key) for key in METRICS.values()]
