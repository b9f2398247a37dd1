"""The linear evaluation of DINO, MoCo, SimCLR or VICReg, as their official scripts do it.

    python eval.py task=protocol protocol=moco checkpoint=runs/moco_v2_scavport/last.pt
    torchrun --nproc_per_node=4 eval.py task=protocol protocol=dino data.name=imagenette data.root=/data backbone=...

A linear classifier learns by SGD from random crops of the training images, each seen anew in each epoch, on features
that do not change; the last epoch is tested on center crops. Nothing is chosen. `data.size` is the side of the crops.
For a fast measure on stored features, see task=linear and task=logistic. Writes results.json, confusion.png,
confused.png (test images of the most confused classes) and TensorBoard events to eval_protocol/ in the checkpoint's
folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from data import DataConfig
from data.augment.views import View
from data.loading import Loader
from evaluation.classification import classification_report
from evaluation.features import extract
from evaluation.frozen import FrozenConfig, opened
from evaluation.linear_probe import with_one
from evaluation.protocols import PROTOCOLS, WHOLE, Probed, train_classifier
from runtime import distributed
from runtime.values import PositiveInt


@dataclass(kw_only=True)
class Config(FrozenConfig):
    protocol: Literal["dino", "moco", "simclr", "vicreg"]  # whose learning rate, schedule, features and test images
    epochs: PositiveInt | None = None  # none: the protocol's, 90 or 100; of others the schedule is stretched
    train_batch: PositiveInt | None = None  # images per step, over all processes; none: the protocol's, at most all


def run(cfg: Config) -> None:
    protocol = PROTOCOLS[cfg.protocol]

    def by_split(data: DataConfig, split: str) -> DataConfig:
        """Whole images to crop from; of the test the center."""
        sides = [round(side * WHOLE) for side in data.size]
        if split == "train":
            return replace(data, fit="squash", resize=None, size=tuple(sides))
        return replace(data, fit="crop", resize=max(sides), resample=protocol.resample)

    found = opened(cfg, "protocol", by_split)
    seen = by_split(cfg.data, "test")
    size = " x ".join(map(str, (*seen.size, *seen.size)[:2]))
    found.log.say(
        f"protocol={cfg.protocol}: trained on random crops of {size} pixels, tested on the center of images whose "
        f"short side is {seen.resize} ({seen.resample})"
    )
    world, epochs = distributed.world_size(), cfg.epochs or protocol.epochs
    batch = max(min(cfg.train_batch or protocol.batch_size, len(found.train_set)) // world, 1)
    load = {"cache": cfg.data.cache, "workers": cfg.data.workers}
    loader = Loader(found.train_set, batch, found.device, shuffle=True, seed=cfg.seed, **load)
    view = View((*seen.size, *seen.size)[:2], scale=(0.08, 1.0), flip_p=0.5, interpolation=protocol.crops)
    probed = Probed(found.backbone, protocol)
    weight = train_classifier(
        probed,
        loader,
        view,
        protocol,
        n_classes=len(found.classes),
        epochs=epochs,
        seed=cfg.seed,
        log=lambda epoch, loss, lr: found.log.scalars(epoch, {"loss": loss, "lr": lr}),
    )
    features, labels = extract(probed, Loader(found.test_set, cfg.batch_size, found.device, **load), progress="test")
    scores = with_one(features) @ weight  # (N, C)
    found.confusion(scores, labels)
    about = {"protocol": cfg.protocol, "epochs": epochs, "train_batch": batch * world, "width": features.shape[1]}
    found.write(about | classification_report(torch.nan_to_num(scores), labels, found.classes))
