"""Small image sets on disk in the layouts of the real ones, and the command line of a script."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.anomaly.detector import Batch

TOP = Path(__file__).parent.parent


def write_classes(root: Path, *, classes: int = 3, each: int = 12, size: int = 40) -> Path:
    """root/train/<class>/ and root/test/<class>/: stripes whose direction is the class, with noise."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)))
    for split, count in (("train", each), ("test", max(2, each // 3))):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                angle = np.pi * c / classes + rng.normal(0, 0.1)
                wave = np.sin((np.cos(angle) * grid[0] + np.sin(angle) * grid[1]) / 2 + rng.uniform(0, 6))
                image = 128 + 60 * wave[..., None] + rng.normal(0, 25, (size, size, 3))
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def write_mvtec(
    root: Path, *, category: str = "part", normal: int = 12, size: int = 48, width: int | None = None
) -> Path:
    """root/part/ in MVTec layout: a texture, and the same with a bright square (`spot`) and its mask."""
    rng = np.random.default_rng(1)
    shape = (size, width or size)

    def texture():
        return rng.normal(120, 20, shape).clip(0, 255).astype(np.uint8)

    for folder, count in (("train/good", normal), ("test/good", 4), ("test/spot", 4)):
        (root / category / folder).mkdir(parents=True)
        for i in range(count):
            image, mask = texture(), np.zeros(shape, np.uint8)
            if folder == "test/spot":
                y, x = rng.integers(8, size - 20, 2)
                image[y : y + 12, x : x + 12] = 250
                mask[y : y + 12, x : x + 12] = 255
                masks = root / category / "ground_truth" / "spot"
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(masks / f"{i:03d}_mask.png")
            Image.fromarray(image).save(root / category / folder / f"{i:03d}.png")
    return root


def batches(images: Tensor, size: int, *, first: int = 0, valid: Tensor | None = None) -> list[Batch]:
    """Images as a detector's `fit` takes them, `size` at a time, numbered from `first`."""
    numbers = torch.arange(first, first + len(images))
    masks = [None] * len(images) if valid is None else valid.split(size)
    return [Batch(*parts) for parts in zip(images.split(size), masks, numbers.split(size))]


def command(words: list[str], *, processes: int = 1) -> list[str]:
    """`python words`, or the same under torchrun."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *run, *words]
