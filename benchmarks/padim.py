"""Seconds to fit PaDiM at the size of a category of MVTec AD: 209 images of 224 x 224, Wide-ResNet-50-2, stages 1-3.

    python -m benchmarks.padim                 # all channels and the reference's 550, statistics alone and whole fit
    python -m benchmarks.padim --peers --write # adds the reference's loop; --write: results/padim.md
    python -m benchmarks.padim --device cuda

"Statistics" is all of `fit` but the network, whose stages are random numbers made before; "whole fit" runs the network
with random weights, 16 images at a time. "Score" is what an image costs beyond the network, 16 at a time, map
included. The reference's loop (numpy.cov and numpy.linalg.inv, position by position) is timed on a few positions.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import processor
from models.anomaly.detector import Batch
from models.anomaly.padim import PaDiM
from models.backbones.resnet import WideResNet50
from runtime.version import commit

N, SIZE, BATCH = 209, 224, 16
STAGES = ((256, 56), (512, 28), (1024, 14))  # channels, side
CHANNELS = (None, 550)


def timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def numbered(count: int, device: torch.device) -> list[Batch]:
    """Random images in batches."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        Batch(torch.randn(len(part), 3, SIZE, SIZE, generator=generator, device=device), None, part)
        for part in torch.arange(count, device=device).split(BATCH)
    ]


def random_stages(count: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(count, channels, side, side) for channels, side in STAGES]
    stages = [torch.randn(shape, generator=generator, device=device).relu_() for shape in shapes]
    return [stage.to(memory_format=torch.channels_last) for stage in stages]


def reference_loop(channels: int, positions: int = 16) -> float:
    """Seconds of the reference's covariance and inverse, all positions, from a few."""
    x = np.random.default_rng(0).normal(size=(positions, N, channels)).astype(np.float32)
    start = time.perf_counter()
    for at in x:
        np.linalg.inv(np.cov(at, rowvar=False) + 0.01 * np.identity(channels))
    return (time.perf_counter() - start) * STAGES[0][1] ** 2 / positions


def statistics(channels: int | None, device: torch.device) -> tuple[float, float]:
    """Seconds of `fit` without the network, and of scoring an image without it."""
    model = PaDiM(torch.nn.Conv2d(3, 1, 1), channels=channels).to(device)
    stages = random_stages(N, device)
    parts = iter(list(zip(*(stage.split(BATCH) for stage in stages))))
    model.features = lambda _: list(next(parts))
    batches = numbered(N, device)
    seconds = timed(lambda: model.fit(batches, N), device)
    some = [stage[:BATCH] for stage in stages]
    score = [timed(lambda: model.measure(some, (SIZE, SIZE)), device) for _ in range(4)]
    return seconds, min(score) / BATCH


def whole_fit(channels: int | None, dtype: torch.dtype, device: torch.device) -> float:
    torch.manual_seed(0)
    model = PaDiM(WideResNet50(), channels=channels).to(device, memory_format=torch.channels_last)
    batches = numbered(N, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return timed(lambda: model.fit(batches, N), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peers", action="store_true", help="time the reference's loop too, about 30 s")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/padim.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    lines = [
        f"# PaDiM: seconds to fit {N} images of {SIZE} x {SIZE}, Wide-ResNet-50-2",
        "",
        f"`python -m benchmarks.padim` on {machine}, {torch.get_num_threads()} CPU threads; torch {torch.__version__}; "
        f"commit {commit()}.",
        "",
        "| channels | statistics, s | whole fit, fp32, s | whole fit, bf16, s | score, s an image | loop, s |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for channels in CHANNELS:
        fit, score = statistics(channels, device)
        whole = [whole_fit(channels, dtype, device) for dtype in (torch.float32, torch.bfloat16)]
        total = sum(count for count, _ in STAGES)
        loop = f"{reference_loop(channels or total):.0f}" if options.peers else ""
        name = f"all {total}" if channels is None else f"{channels}, random"
        lines.append(f"| {name} | {fit:.1f} | {whole[0]:.1f} | {whole[1]:.1f} | {score:.3f} | {loop} |")
        print(lines[-1], flush=True)
    if options.write:
        Path(__file__).with_name("results").joinpath("padim.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
