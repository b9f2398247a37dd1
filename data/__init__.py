"""Datasets and augmentation recipes by the name that the configuration gives them."""

from dataclasses import dataclass, field
from typing import Literal

from data.augment import RECIPES, View
from data.cifar10 import CIFAR10
from data.folder import ClassFolder
from data.mvtec import MVTec

DATASETS = {"folder": ClassFolder, "cifar10": CIFAR10, "mvtec": MVTec}


@dataclass(kw_only=True)
class DataConfig:
    """`data.*`: these keys, and the keyword-only arguments of the chosen dataset."""

    name: str = field(metadata={"choices": DATASETS})
    size: int  # pictures are stored as size x size
    cache: Literal["auto", "device", "ram", "none"] = "auto"
    workers: int = 4  # processes that decode when nothing is cached
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class AugmentConfig:
    """`augment.*`: the recipe's name and its keyword-only arguments."""

    name: str = field(metadata={"choices": RECIPES})
    options: dict = field(default_factory=dict)


def build_dataset(config: DataConfig, split: str):
    """The training or test set of a `data` section."""
    return DATASETS[config.name](split, config.size, **config.options)


def build_views(config: AugmentConfig) -> list[View]:
    """The views of an `augment` section."""
    return RECIPES[config.name](**config.options)
