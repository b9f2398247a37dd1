"""A data set's frozen features as arrays, for other programs: features.npz.

    python eval.py task=features checkpoint=runs/simclr_scavport/last.pt
    python eval.py configs/eval_folder.yaml task=features data.root=/images backbone.weights=weights.pth

`numpy.load` gives of each split <split>_features (N, D) float32, <split>_labels (N,) int64 and <split>_names (N,), the
images' paths below data.root, and `classes`. Writes features.npz and results.json to eval_features/ in the checkpoint's
folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass

import numpy as np

from evaluation.frozen import FrozenConfig, features_of, opened
from runtime import distributed
from runtime.files import whole_file


@dataclass(kw_only=True)
class Config(FrozenConfig):
    """The keys of every task on frozen features."""


def run(cfg: Config) -> None:
    found = opened(cfg, "features")
    train, test = features_of(cfg, found)
    arrays = {"classes": np.array(found.classes)}
    for split, dataset, (features, labels) in (("train", found.train_set, train), ("test", found.test_set, test)):
        arrays |= {f"{split}_features": features.cpu().numpy(), f"{split}_labels": labels.cpu().numpy()}
        arrays[f"{split}_names"] = np.array(dataset.names)
    if distributed.is_main():
        with whole_file(found.folder / "features.npz", "wb") as file:
            np.savez(file, **arrays)
    found.write({"file": str(found.folder / "features.npz"), "width": train[0].shape[1]})
