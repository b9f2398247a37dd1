"""Datasets by the name that the configuration gives them, and what the section `data` of a configuration says.

`from data import ...` also gives the sections and builders that stand beside their own tables: those of `augment` in
data/augment/recipes.py, of `defect` in data/defects/__init__.py.
"""

import runtime.threads  # before torch

from dataclasses import dataclass, field, replace
from typing import Literal

from data.augment.recipes import AugmentConfig as AugmentConfig
from data.augment.recipes import build_augment as build_augment
from data.dataset import Dataset
from data.datasets.cifar10 import CIFAR10
from data.datasets.condition import Condition
from data.datasets.few_shot import FewShot
from data.datasets.folder import ClassFolder
from data.datasets.mvtec import MVTec
from data.datasets.one_against_all import OneAgainstAll
from data.datasets.scavport import ScavPortAnom, ScavPortClass, ScavPortOneVsAll
from data.datasets.table import Table
from data.datasets.vessel_archive import VesselArchive
from data.defects import DefectConfig as DefectConfig
from data.depth import WHITE
from data.geometry import Fit, Geometry, Resample
from data.loading import Cache
from data.white import find_range, warn_if_dark
from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.schema import choice
from runtime.text import say_once

DATASETS: dict[str, type[Dataset]] = {
    "folder": ClassFolder,
    "cifar10": CIFAR10,
    "mvtec": MVTec,
    "few_shot": FewShot,
    "one_against_all": OneAgainstAll,
    "scavport_class": ScavPortClass,
    "scavport_one_vs_all": ScavPortOneVsAll,
    "scavport_anom": ScavPortAnom,
    "vessel_archive": VesselArchive,
    "condition": Condition,
    "table": Table,
}


@dataclass(kw_only=True)
class DataConfig:
    """`data.*`: these keys, and the keyword-only arguments of the chosen dataset."""

    name: str = choice(DATASETS)
    size: tuple[int, ...] | Literal["native"]  # pixels: 256 for a square; 256,384: height, width; native: as the files
    fit: Fit = "squash"  # how images of other proportions are made to fit it; data/geometry.py
    resize: int | None = None  # fit=crop only: the short side before the center crop
    resample: Resample = "bilinear"  # Pillow's filter, antialiased
    white: float | Literal["auto"] = WHITE  # of deep files: 1023, 4095 of 10, 12-bit cameras; auto: find it
    black: float | Literal["auto"] = 0  # likewise; both of a thermal camera, to show what lies between
    percentiles: tuple[float, float] = (0, 100)  # black and white that auto takes of the training set's values
    units: tuple[float, float] | None = None  # what a 16-bit file's 0 and 65535 stand for, as -80,2000 degrees; black
    # and white are then given in it
    gray: bool = False  # keep one channel, of colors their luma; a network gets it three times
    cache: Cache = "auto"  # where decoded images stay; auto: where they fit
    workers: int = 4  # processes that decode when nothing is cached
    options: dict = field(default_factory=dict)


def settled(config: DataConfig) -> DataConfig:
    """The section with numbers for `size: native` and for `white` and `black` of `auto`, found from the training set.

    A run stores the numbers, so that its test set, predict.py and `update=` have the same. One that resumes finds them
    again, and is refused when they changed.

    Raises:
        UserError: `native` with training images of several sizes.
    """
    if "auto" not in (config.white, config.black) and config.size != "native":
        return config
    train_set = DATASETS[config.name]("train", 8, **config.options)  # for its files and their headers
    if config.size == "native":
        config = replace(config, size=native_size(train_set))
    if "auto" not in (config.white, config.black):
        return config
    found = dict(zip(("black", "white"), find_range(train_set.paths, config.percentiles)))
    return replace(config, **{end: in_units(found[end], config) for end in found if getattr(config, end) == "auto"})


def in_units(value: float, config: DataConfig) -> float:
    """A stored value in `data.units`."""
    low, high = config.units or (0, WHITE)
    return value if config.units is None else low + value / WHITE * (high - low)


def stored(value: float, config: DataConfig) -> float:
    """The inverse."""
    low, high = config.units or (0, WHITE)
    return value if config.units is None else (value - low) / (high - low) * WHITE


def native_size(dataset: Dataset) -> tuple[int, int]:
    """Height and width of a data set's original images, which must be of one size."""
    sizes = dataset.sizes
    other = (sizes != sizes[0]).any(1).nonzero()[:, 0]
    if len(other):
        named = (f"{dataset.paths[i]} has {sizes[i, 0]} x {sizes[i, 1]}" for i in (0, int(other[0])))
        raise UserError(f"data.size=native needs images of one size: {', '.join(named)}; give a number")
    return tuple(sizes[0].tolist())


def build_geometry(config: DataConfig) -> Geometry:
    """How the images of a settled `data` section become inputs."""
    if len(config.size) not in (1, 2):
        numbers = ",".join(map(str, config.size))
        raise UserError(f"data.size={numbers} must be one number for a square, or two: height,width")
    ends = {"white": stored(config.white, config), "black": stored(config.black, config), "gray": config.gray}
    return Geometry(config.size[0], config.size[-1], config.fit, config.resize, config.resample, **ends)


def build_dataset(config: DataConfig, split: str) -> Dataset:
    """The `train` or `test` set of a settled `data` section, or another of its class's `splits`.

    Rank 0 says in one line what was found.

    Raises:
        UserError: it does not know the split, or what the data set has to say.
    """
    having = [name for name, kind in DATASETS.items() if split in kind.splits]
    if config.name not in having:
        raise UserError(f"data.name={config.name} has no split '{split}', which this needs: use {' or '.join(having)}")
    dataset = DATASETS[config.name](split, build_geometry(config), **config.options)
    if is_main():
        say_once(f"data: {dataset.matched}")
    if split == "train":
        warn_if_dark(dataset.paths, dataset.geometry.white)
    return dataset


def what_is_used(dataset: Dataset, learned: int, others: dict[str, int]) -> str:
    """One line on how many of a data set's images are learned from, and why each of the rest is not.

    `others`: reasons that the data set does not know, such as a hold-out, with the number of images.
    """
    reasons = {why: count for why, count in {**dataset.left_out, **others}.items() if count}
    rest = ", ".join(f"{count} {why}" for why, count in reasons.items())
    if not rest:
        return f"data: all {learned} images are learned from"
    return f"data: {learned} of {learned + sum(reasons.values())} images are learned from, {rest}"
