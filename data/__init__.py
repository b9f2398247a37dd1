"""Datasets by the name that the configuration gives them, and what the section `data` of a configuration says.

`from data import ...` also gives the sections and builders that stand beside their own tables: those of `augment` in
data/augment/recipes.py, of `defect` in data/defects/__init__.py.
"""

import runtime.threads  # before torch

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from data.augment.recipes import AugmentConfig as AugmentConfig
from data.augment.recipes import build_augment as build_augment
from data.dataset import Dataset
from data.datasets.categories import open_set
from data.datasets.cifar import CIFAR10, CIFAR10C, CIFAR100
from data.datasets.condition import Condition
from data.datasets.detections import Detections
from data.datasets.dimo import DIMO, DIMOOneVsAll
from data.datasets.few_shot import FewShot
from data.datasets.folder import ClassFolder, Imagenette
from data.datasets.kolektor import KolektorSDD, KolektorSDD2
from data.datasets.magnetic_tile import MagneticTile
from data.datasets.mixed import KINDS, Mixed
from data.datasets.mvtec import BTAD, MVTec
from data.datasets.mvtec_ad2 import MVTecAD2
from data.datasets.mvtec_loco import MVTecLOCO
from data.datasets.one_against_all import OneAgainstAll
from data.datasets.scavport import ScavPortAnom, ScavPortClass, ScavPortOneVsAll
from data.datasets.stl10 import STL10
from data.datasets.table import Table
from data.datasets.vessel_archive import VesselArchive
from data.datasets.visa import VisA
from data.defects import DefectConfig as DefectConfig
from data.depth import WHITE
from data.geometry import Fit, Geometry, Resample
from data.loading import Cache
from data.splits import require_same_classes
from data.white import find_range, warn_if_dark
from runtime.distributed import is_main
from runtime.errors import UserError
from runtime.schema import choice
from runtime.text import say_once
from runtime.values import Pixels, PixelsOrZero, Range, Rising

Scale = Annotated[tuple[float, float], Rising(strict=True)]
Percentile = Annotated[float, Range(least=0, most=100)]
Percentiles = Annotated[tuple[Percentile, Percentile], Rising()]
DATASETS: dict[str, type[Dataset]] = {
    "folder": ClassFolder,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "cifar10_c": CIFAR10C,
    "stl10": STL10,
    "imagenette": Imagenette,
    "mvtec": MVTec,
    "mvtec_loco": MVTecLOCO,
    "mvtec_ad2": MVTecAD2,
    "visa": VisA,
    "btad": BTAD,
    "kolektor_sdd": KolektorSDD,
    "kolektor_sdd2": KolektorSDD2,
    "magnetic_tile": MagneticTile,
    "few_shot": FewShot,
    "one_against_all": OneAgainstAll,
    "mixed": Mixed,
    "scavport_class": ScavPortClass,
    "scavport_one_vs_all": ScavPortOneVsAll,
    "scavport_anom": ScavPortAnom,
    "vessel_archive": VesselArchive,
    "condition": Condition,
    "dimo": DIMO,
    "dimo_one_vs_all": DIMOOneVsAll,
    "table": Table,
    "detections": Detections,
}
KINDS.update(DATASETS)  # of which a mixed set is made


@dataclass(kw_only=True)
class DataConfig:
    """`data.*`: these keys, and the keyword-only arguments of the chosen dataset."""

    name: str = choice(DATASETS)
    size: tuple[Pixels, ...] | Literal["native"]  # pixels: 256 for a square; 256,384: height, width; native: as files
    fit: Fit = "squash"  # how images of other proportions are made to fit it; data/geometry.py
    resize: Pixels | None = None  # fit=crop only: the short side before the center crop
    resample: Resample = "bilinear"  # Pillow's filter, antialiased
    white: float | Literal["auto"] = WHITE  # of deep files: 1023, 4095 of 10, 12-bit cameras; auto: find it
    black: float | Literal["auto"] = 0  # likewise; both of a thermal camera, to show what lies between
    percentiles: Percentiles = (0, 100)  # black and white that auto takes of the training set's values
    units: Scale | None = None  # what a 16-bit file's 0 and 65535 stand for, as -80,2000 degrees; black
    # and white are then given in it
    gray: bool = False  # keep one channel, of colors their luma; a network gets it three times
    tile: PixelsOrZero = 0  # detectors: squares of the files' own pixels instead of whole images; `size` is of the maps
    overlap: PixelsOrZero = 64  # pixels that neighboring tiles share
    cache: Cache = "auto"  # where decoded images stay; auto: where they fit; file: on the disk, for later runs
    workers: Annotated[int, Range(least=0, most=1024)] = 4  # processes that decode when nothing is cached
    balanced: bool = False  # pretraining sees each class equally often: images of rare ones repeat within an epoch
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
    train_set = open_set(DATASETS[config.name], "train", 8, config.options)  # for its files and their headers
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


def build_dataset(config: DataConfig, split: str, *, tiled: bool = False) -> Dataset:
    """The `train` or `test` set of a settled `data` section, or another of its class's `splits`; always whole images.

    Rank 0 says in one line what was found.

    Raises:
        UserError: it does not know the split, the section asks for tiles and the caller is not `tiled`, or what the
            data set has to say.
    """
    if config.tile and not tiled:
        raise UserError("data.tile is for detectors, which train_anomaly.py fits: remove it")
    having = [name for name, kind in DATASETS.items() if split in kind.splits]
    if config.name not in having:
        raise UserError(f"data.name={config.name} has no split '{split}', which this needs: use {' or '.join(having)}")
    dataset = open_set(DATASETS[config.name], split, build_geometry(config), config.options)
    _check_classes(config, dataset)
    if is_main():
        say_once(f"data: {dataset.matched}")
    if split == "train":
        warn_if_dark(dataset.paths, dataset.geometry.white)
    return dataset


def _check_classes(config: DataConfig, dataset: Dataset) -> None:
    """`UserError` unless what is tested on has images of just the classes of `train`; of drawn splits, in which a class
    of one image cannot be on both sides, a warning. Sets with defects, and those that say so, are let pass."""
    if dataset.split not in ("validation", "test") or dataset.defects is not None or not dataset.same_classes:
        return
    drawn = dataset.division is not None and dataset.division.file is None
    options = config.options | ({"on_error": "fail"} if "on_error" in config.options else {})  # its files are enough
    learned = open_set(DATASETS[config.name], "train", 8, options)
    found = {
        f"split {its.split} of {its.root or config.name}": {
            its.classes[label] for label in its.labels.unique().tolist()
        }
        for its in (learned, dataset)
    }
    try:
        require_same_classes(found)
    except UserError as error:
        if not drawn:
            raise
        if is_main():
            say_once(f"warning: {error}")


def what_is_used(dataset: Dataset, learned: int, others: dict[str, int]) -> str:
    """One line on how many of a data set's images are learned from, and why each of the rest is not.

    `others`: reasons that the data set does not know, such as a hold-out, with the number of images.
    """
    reasons = {why: count for why, count in {**dataset.left_out, **others}.items() if count}
    rest = ", ".join(f"{count} {why}" for why, count in reasons.items())
    if not rest:
        return f"data: all {learned} images are learned from"
    return f"data: {learned} of {learned + sum(reasons.values())} images are learned from, {rest}"
