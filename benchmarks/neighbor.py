"""A training step and a coreset on a machine that others use: seconds with waiting threads that spin and that sleep.

    python -m benchmarks.neighbor [--write]      # --write: benchmarks/results/neighbor.md

"Spin" is what GCC's OpenMP, which torch's Linux wheels bring, does where nobody asks for anything else: a thread that
waits for the others spins 300,000 times before it sleeps. "Sleep" is what runtime/threads.py sets. The step is a
ResNet-18's forward, backward and SGD in float32; the neighbors are processes that count, one for each core. Two
processes, one of each kind, take turns, and medians count.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.coreset import network
from benchmarks.machine import processor
from models.backbones.resnet import ResNet18
from runtime import threads
from runtime.version import commit
from search.coreset import greedy_coreset

CORES = threads.cpu_count()
SETTINGS = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep": threads.OURS}


def serve(pixels: int) -> None:
    """Read the names of jobs from stdin, and after each print the seconds it took."""
    torch.manual_seed(0)
    model, images = ResNet18(), torch.randn(32, 3, pixels, pixels)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    features = network(20_000, 128, torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(images).square().sum().backward()
        optimizer.step()

    jobs = {"step": step, "coreset": lambda: greedy_coreset(features, 300, start=0)}
    for line in sys.stdin:
        start = time.perf_counter()
        jobs[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def start(setting: dict[str, str], pixels: int) -> subprocess.Popen:
    known = {name for each in SETTINGS.values() for name in each}
    environment = {name: value for name, value in os.environ.items() if name not in known} | setting
    command = [sys.executable, "-m", "benchmarks.neighbor", "--serve", "--pixels", str(pixels)]
    environment["OMP_NUM_THREADS"] = str(CORES)
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(worker: subprocess.Popen, job: str) -> float:
    print(job, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def measure(workers: dict[str, subprocess.Popen], n_neighbors: int, turns: int) -> dict[str, list[float]]:
    """{job: median seconds with the settings in their order}, after a turn to warm up."""
    neighbors = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_neighbors)]
    try:
        found = {}
        for job in ("step", "coreset"):
            seconds = [[ask(worker, job) for worker in workers.values()] for _ in range(1 + turns)][1:]
            found[job] = [median(each) for each in zip(*seconds)]
        return found
    finally:
        for process in neighbors:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="of each setting with each job")
    parser.add_argument("--pixels", type=int, default=96, help="of a side of the step's 32 images")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/neighbor.md")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.pixels)
        return
    workers = {name: start(setting, options.pixels) for name, setting in SETTINGS.items()}
    lines = [
        "# Waiting threads that spin or sleep: seconds\n",
        f"`python -m benchmarks.neighbor`, {options.pixels} pixels, median of {options.turns} turns, on "
        f"{processor()}, {CORES} threads; torch {torch.__version__}; commit {commit()}.\n",
        "| | busy neighbors | spin, s | sleep, s | sleep / spin |",
        "|---" * 5 + "|",
    ]
    print("\n".join(lines), flush=True)
    for n_neighbors in (0, CORES):
        for job, (spin, sleep) in measure(workers, n_neighbors, options.turns).items():
            lines.append(f"| {job} | {n_neighbors} | {spin:.3f} | {sleep:.3f} | {sleep / spin:.3f} |")
            print(lines[-1], flush=True)
    for worker in workers.values():
        worker.communicate()  # the end of its jobs ends it
    if options.write:
        Path(__file__).with_name("results").joinpath("neighbor.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
