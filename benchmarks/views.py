"""Speed of batched augmentation against torchvision v2 called image by image, on one CPU thread.

    python -m benchmarks.views [--write]     # --write: also to benchmarks/results/views.md

Both get the same uint8 tensors and give normalized float32 views: SimCLR's for CIFAR-10 (2 x 32 x 32) and, for
information, DINO's (2 x 224 x 224 + 8 x 96 x 96). Times are CPU seconds of the one thread, which other programs on the
machine change little; the two take turns and the fastest turn of each counts.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.machine import processor
from data.augment.recipes import RECIPES
from data.augment.views import Augment, View
from data.normalize import MEAN, STD
from runtime.version import commit

GOAL = 10  # times torchvision's rate, for SimCLR's views


def per_sample(view: View) -> v2.Transform:
    """The same view by torchvision v2 transforms of a uint8 tensor (3, S, S); steps that never happen are left out."""
    steps = [
        v2.RandomResizedCrop(view.size, view.scale, view.ratio, InterpolationMode(view.interpolation), antialias=True),
        v2.RandomHorizontalFlip(view.flip_p),
        v2.RandomApply([v2.ColorJitter(*view.jitter)], view.jitter_p),
        v2.RandomGrayscale(view.gray_p),
    ]
    if view.blur_p > 0:
        steps.append(v2.RandomApply([v2.GaussianBlur(view.blur_kernel, view.blur_sigma)], view.blur_p))
    if view.solarize_p > 0:
        steps.append(v2.RandomSolarize(128, view.solarize_p))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(views: list[View], images: Tensor, *, sample: int, turns: int) -> tuple[float, float]:
    """Images per second, each giving all views: of Augment, and of torchvision on the first `sample` images."""
    augment, transforms = Augment(views, seed=0), [per_sample(view) for view in views]
    ids = torch.arange(len(images))
    batched, single = [], []
    for turn in range(turns):
        batched.append(seconds(lambda turn=turn: augment(images, ids, epoch=turn)))
        single.append(seconds(lambda: [[transform(x) for transform in transforms] for x in images[:sample]]))
    return len(images) / min(batched), sample / min(single)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/views.md")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int, size: int) -> Tensor:
        coarse = torch.rand(count, 3, size // 4, size // 4, generator=generator)
        return v2.functional.resize(coarse, [size, size]).mul(255).byte()

    simclr = RECIPES["simclr"](size=32, strength=0.5, blur_p=0.0, interpolation="bilinear")
    cases = {
        "SimCLR CIFAR-10, 2 x 32, batch 512": (simclr, drawn(512, 32), 128, 10),
        "DINO, 2 x 224 + 8 x 96 from 256, batch 32": (RECIPES["dino"](), drawn(32, 256), 8, 3),
    }
    lines = [
        "# Augmentation: images per second on one CPU thread",
        "",
        f"`python -m benchmarks.views --write` on {processor()}, one thread; torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}; commit {commit()}.",
        "",
        "| views | scavenge, batched | torchvision v2, per sample | ratio |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name, (views, images, sample, turns) in cases.items():
        batched, single = measure(views, images, sample=sample, turns=turns)
        lines.append(f"| {name} | {batched:,.0f} | {single:,.0f} | {batched / single:.1f} x |")
        print(lines[-1], flush=True)
    lines += ["", f"Goal: the first row at {GOAL} x or more."]
    print("\n".join(lines[-2:]))
    if write:
        Path(__file__).with_name("results").joinpath("views.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
