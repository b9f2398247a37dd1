"""Seconds of subspace, PaDiM and PatchCore beside the network: 209 images of 224 x 224, the stages of two ResNets.

    python -m benchmarks.subspace
    python -m benchmarks.subspace --write    # also benchmarks/results/subspace.md
    python -m benchmarks.subspace --device cuda

The stages are random numbers made before. "Fit" is all of `fit` but the network; "score" is what an image costs beyond
the network, 16 at a time, map included; "left out" is the same with each image left out in turn, as for thresholds.
Each detector reads the stages that are its default.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import processor
from models.anomaly.detector import Batch, Detector
from models.anomaly.padim import PaDiM
from models.anomaly.patchcore import PatchCore
from models.anomaly.subspace import Subspace
from runtime.version import commit

N, SIZE, BATCH = 209, 224, 16
SIDES = (56, 28, 14)
CHANNELS = {"ResNet-18": (64, 128, 256), "Wide-ResNet-50-2": (256, 512, 1024)}
DETECTORS = {
    "subspace": lambda net: Subspace(net),
    "PaDiM, 100 channels": lambda net: PaDiM(net, channels=100),
    "PatchCore 1 %": lambda net: PatchCore(net, coreset=0.01),
}


def timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times(build: Callable[[nn.Module], Detector], channels: tuple[int, ...], device: torch.device) -> list[float]:
    """Seconds to fit, to score an image, and to score it left out."""
    model, generator = build(nn.Conv2d(3, 1, 1)).to(device), torch.Generator(device).manual_seed(0)
    numbers = torch.arange(N, device=device).split(BATCH)
    stages = [
        [torch.randn(len(some), c, s, s, generator=generator, device=device).relu_() for c, s in zip(channels, SIDES)]
        for some in numbers
    ]
    chosen = [[batch[stage - 1] for stage in model.stages] for batch in stages]
    parts: list[list[Tensor]] = [*chosen]
    model.features = lambda _: parts.pop(0)
    images = torch.empty(BATCH, 3, SIZE, SIZE, device=device)
    batches = [Batch(images[: len(some)], None, some) for some in numbers]
    fit = timed(lambda: model.fit(batches, N), device)
    with torch.no_grad():
        score, left = (
            min(timed(lambda out=out: model.measure(chosen[0], (SIZE, SIZE), None, out), device) for _ in range(3))
            for out in (None, numbers[0])
        )
    return [fit, score / BATCH, left / BATCH]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/subspace.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    lines = [
        f"# subspace, PaDiM and PatchCore: seconds beside the network, {N} images of {SIZE} x {SIZE}",
        "",
        f"`python -m benchmarks.subspace` on {machine}, {torch.get_num_threads()} CPU threads; "
        f"torch {torch.__version__}; commit {commit()}.",
        "",
        "| stages of | detector | fit, s | score, s an image | left out, s an image |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for network, channels in CHANNELS.items():
        for name, build in DETECTORS.items():
            fit, score, left = times(build, channels, device)
            lines.append(f"| {network} | {name} | {fit:.1f} | {score:.4f} | {left:.4f} |")
            print(lines[-1], flush=True)
    if options.write:
        Path(__file__).with_name("results").joinpath("subspace.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
