"""Seconds of a point of a loss landscape, one by one and several at once, and what 51 x 51 points take.

    python -m benchmarks.landscape [--write]          # --write: benchmarks/results/landscape.md (landscape_cuda.md)

A point of `task=landscape` moves all weights along two directions and measures the loss of a classifier. "Several at
once" moves K copies of them and passes all through torch.func's vmap, with the same images. On a CPU seconds are CPU
seconds of one thread, which other programs on the machine change little; all take turns, and the fastest turn of each
counts.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.machine import processor
from evaluation.inspect import landscape
from evaluation.inspect.run_loss import ClassifierLoss
from losses.supervised import cross_entropy
from models.backbones import BACKBONES
from models.classifier import Classifier
from runtime.version import commit

CASES = [  # network, pixels, images per pass, whether several points at once are measured, too
    ("mobilenet_v2", 32, 16, True),
    ("mobilenet_v2", 32, 100, True),
    ("resnet18", 32, 16, True),
    ("resnet18", 32, 100, True),
    ("mobilenet_v2", 64, 100, False),
    ("resnet18", 64, 100, False),
    ("resnet50", 64, 100, False),
    ("mobilenet_v2", 224, 20, False),
    ("resnet18", 224, 20, False),
    ("vit_tiny", 224, 20, False),
]
TOGETHER = (2, 8)  # points


def timed(call: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(name: str, size: int, images: int, stacked: bool, device: torch.device, turns: int) -> dict[str, float]:
    """Seconds per point: `one`, and for K at once `K`."""
    backbone = BACKBONES[name]()
    network: nn.Module = Classifier(backbone, nn.Linear(backbone.num_features, 10)).to(device).eval()
    network.to(memory_format=torch.channels_last)
    pixels, labels = torch.randn(images, 3, size, size, device=device), torch.arange(images, device=device) % 10
    loss = ClassifierLoss(name, network, [([pixels], labels)], [], criterion=cross_entropy, n_classes=10)
    weights = landscape.learned(network)
    directions = [landscape.random_direction(weights, seed) for seed in (0, 1)]
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}

    def one() -> None:
        landscape.move(network, start, directions, [0.01, 0.02])
        loss.measure()

    buffers = dict(network.named_buffers())
    forward = vmap(lambda its: functional_call(network, (its, buffers), (pixels,)))

    def several(stack: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, rows in stack.items():
                for row in rows:
                    row.copy_(start[name])
                    for direction in directions if name in directions[0] else ():
                        row.add_(direction[name], alpha=0.01)
            forward(stack)

    calls: dict[str, tuple[int, Callable[[], None]]] = {"one": (1, one)}
    for count in TOGETHER if stacked else ():
        stack = {key: weight.expand(count, *weight.shape).clone() for key, weight in weights.items()}
        calls[str(count)] = count, lambda stack=stack: several(stack)
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(turns + 1):
        for key, (count, call) in calls.items():
            took = timed(call, device) / count
            if turn:  # the first of each is left out
                seconds[key].append(took)
    return {key: min(each) for key, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=5, help="runs of each, the fastest counts")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/landscape.md (_cuda.md)")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, one thread"
    lines = [
        "# A point of a loss landscape",
        "",
        f"`python -m benchmarks.landscape`, fastest of {options.turns} turns, on {machine}; torch {torch.__version__}; "
        f"commit {commit()}. The last column is computed from the milliseconds, not measured.",
        "",
        f"| network | pixels | images | ms per point | {' | '.join(f'{count} at once' for count in TOGETHER)} | "
        "51 x 51 points of 1,000 images, hours |",
        f"|{'---|' * (5 + len(TOGETHER))}",
    ]
    print("\n".join(lines), flush=True)
    for name, size, images, stacked in CASES:
        took = measure(name, size, images, stacked, device, options.turns)
        several = " | ".join(f"{1000 * took[str(n)]:.1f}" if str(n) in took else "-" for n in TOGETHER)
        hours = took["one"] / images * 1000 * 51**2 / 3600
        lines.append(f"| {name} | {size} | {images} | {1000 * took['one']:.1f} | {several} | {hours:.2f} |")
        print(lines[-1], flush=True)
    if options.write:
        file = "landscape.md" if device.type == "cpu" else "landscape_cuda.md"
        Path(__file__).with_name("results").joinpath(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
