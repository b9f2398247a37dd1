"""Milliseconds for an image: the Poisson solver against one sparse solve for each patch, and each kind of defects.

    python -m benchmarks.defects                  # on one CPU thread
    python -m benchmarks.defects --write          # also benchmarks/results/defects.md
    python -m benchmarks.defects --device cuda

Patches are square with three channels. "Sparse" is scipy's `factorized` (SuperLU) of the patch's equations and a solve
for each channel: once anew for each patch, as a loop over images does it, and once with the factors kept. The error
is the largest difference between ours and the sparse solution, for patches of noise with values in 0 .. 255.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy.sparse import diags_array, eye_array, kron
from scipy.sparse.linalg import factorized

from benchmarks.machine import processor
from data.defects import DEFECTS
from data.defects.nsa import NSADefect
from data.defects.poisson import laplacian, solve
from runtime.version import commit

PATCHES, SIZES = 16, (34, 66, 102)  # of an image of 256 x 256, the largest patch of NSA has 102 pixels a side
IMAGES = (32, 256)  # of the kinds


def factors(size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Solver of the equations of the inside of a patch of size x size."""
    inner = size - 2
    second = diags_array([np.full(inner - 1, -1.0), np.full(inner, 2.0), np.full(inner - 1, -1.0)], offsets=(-1, 0, 1))
    return factorized((kron(second, eye_array(inner)) + kron(eye_array(inner), second)).tocsc())


def sparse(target: torch.Tensor, divergence: torch.Tensor, solver=None) -> torch.Tensor:
    """One patch (3, N, N) float64, by `factors`; made anew when None."""
    solver = solver or factors(target.shape[1])
    right = (laplacian(target[None])[0] - divergence)[:, 1:-1, 1:-1]
    result = target.clone()
    for channel, part in zip(result, right.numpy()):
        channel[1:-1, 1:-1] += torch.from_numpy(solver(part.ravel()).reshape(part.shape))
    return result


def milliseconds(work: Callable[[], object], count: int, device: torch.device, repeats: int = 3) -> float:
    """For each of `count`, of the fastest run after a first one: CPU time of this process, on CUDA time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(repeats + 1):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best / count * 1000


def solvers(size: int, device: torch.device) -> list[str]:
    """A row of the table: sizes, our float64 and float32, sparse anew, sparse with the factors kept, error of each."""
    source, target = (torch.rand(PATCHES, 3, size, size, dtype=torch.float64) * 255 for _ in range(2))
    pair = target, laplacian(source)
    there = [part.to(device) for part in pair]
    single = [part.float() for part in there]
    kept, cpu = factors(size), torch.device("cpu")
    expected = torch.stack([sparse(*one, kept) for one in zip(*pair)])
    errors = [(solve(*parts).cpu().double() - expected).abs().max() for parts in (there, single)]
    times = [milliseconds(lambda p=parts: solve(*p), PATCHES, device) for parts in (there, single)]
    times.append(milliseconds(lambda: [sparse(*one) for one in zip(*pair)], PATCHES, cpu, repeats=1))
    times.append(milliseconds(lambda: [sparse(*one, kept) for one in zip(*pair)], PATCHES, cpu, repeats=1))
    return [f"{size} x {size}", *(f"{t:.2f}" for t in times), *(f"{e:.0e}" for e in errors)]


def kinds(device: torch.device) -> list[list[str]]:
    """Rows: kind, milliseconds an image."""
    count, size = IMAGES
    images, ids = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8).to(device), torch.arange(count)
    rows = []
    for name, make in DEFECTS.items():
        draw = partial(make(), images, ids, 0, seed=0)
        rows.append([name, f"{milliseconds(draw, count, device):.2f}"])
    made, masks = NSADefect()(images, ids, 0, seed=0)
    labels = milliseconds(lambda: NSADefect().labels(images, made, masks), count, device, repeats=1)
    return [*rows, ["nsa's soft labels", f"{labels:.2f}"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/defects.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    lines = [
        "# Synthetic defects: milliseconds",
        "",
        f"`python -m benchmarks.defects` on {machine}, 1 CPU thread (CPU time); torch {torch.__version__}, SciPy "
        f"{scipy.__version__}; commit {commit()}. Fastest run.",
        "",
        f"Poisson's equation on a patch with three channels, in batches of {PATCHES}:",
        "",
        "| patch | ours, float64 | ours, float32 | sparse, each anew | factors kept | error, float64 | float32 |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(solvers(size, device)) + " |" for size in SIZES),
        "",
        f"Defects for an image of {IMAGES[1]} x {IMAGES[1]}, in batches of {IMAGES[0]}:",
        "",
        "| kind | ms an image |",
        "|---|---|",
        *("| " + " | ".join(row) + " |" for row in kinds(device)),
    ]
    print("\n".join(lines))
    if options.write:
        Path(__file__).with_name("results").joinpath("defects.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
