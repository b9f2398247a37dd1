"""Images per second from files to batches, against torchvision's ImageFolder in a DataLoader; how long a start takes.

    python -m benchmarks.loading /path/to/class_folders [--size 224] [--write]

Both decode the same files with two workers or threads and resize them to the same size; a batch is uint8 on the CPU.
The system's file cache is warm for all. Then 100,000 names are listed, as at the start of a run.
"""

from runtime.threads import cpu_count

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import data.cache_file
from benchmarks.machine import processor
from data.datasets.folder import ClassFolder
from data.image_files import list_images
from data.loading import Loader
from runtime.version import commit

BATCH = 64
NAMES = 100_000


def seconds_of(batches) -> tuple[float, int]:
    """Seconds and images of an epoch."""
    began, count = time.perf_counter(), 0
    for images, *_ in batches:
        count += len(images)
    return time.perf_counter() - began, count


def ours(root: str, size: int, cache: str) -> list[float]:
    """Images per second: of two epochs, then of the first one of a new start."""
    rates = []
    for epochs in (2, 1):
        began = time.perf_counter()
        dataset = ClassFolder("train", size, root=root, test_fraction=0.0)
        loader = Loader(dataset, BATCH, "cpu", shuffle=True, cache=cache, workers=cpu_count())
        for epoch in range(epochs):
            seconds_of(loader.epoch(epoch))
            rates.append(len(dataset) / (time.perf_counter() - began))
            began = time.perf_counter()
    return rates


def theirs(root: str, size: int) -> list[float]:
    rates = []
    for epochs in (2, 1):
        began = time.perf_counter()
        steps = v2.Compose([v2.Resize((size, size)), v2.PILToTensor()])
        loader = DataLoader(torchvision.datasets.ImageFolder(root, steps), BATCH, shuffle=True, num_workers=cpu_count())
        for _ in range(epochs):
            _, count = seconds_of(loader)
            rates.append(count / (time.perf_counter() - began))
            began = time.perf_counter()
    return rates


def listing(folder: Path) -> tuple[float, float]:
    """Seconds of ours and of ImageFolder for a tree of many names in 100 folders."""
    for number in range(100):
        below = folder / f"class{number:03d}"
        below.mkdir()
        for i in range(NAMES // 100):
            (below / f"{i:06d}.jpg").touch()
    times = []
    for function in (list_images, torchvision.datasets.ImageFolder):
        began = time.perf_counter()
        function(str(folder))
        times.append(time.perf_counter() - began)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of class folders")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/loading.md")
    chosen = parser.parse_args()
    count = len(list_images(chosen.root).paths)
    lines = [
        "# From files to batches",
        "",
        f"`python -m benchmarks.loading {Path(chosen.root).name} --size {chosen.size} --write`: {count} images, on "
        f"{processor()}, {cpu_count()} cores; torch {torch.__version__}, torchvision {torchvision.__version__}; commit "
        f"{commit()}. Images per second, with the listing of the folder in each first epoch.",
        "",
        "| | first epoch | second epoch | first epoch of the next start |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data.cache_file.FOLDER = Path(folder)
        rows = {"torchvision ImageFolder + DataLoader": theirs(chosen.root, chosen.size)}
        rows |= {f"data.cache={cache}": ours(chosen.root, chosen.size, cache) for cache in ("none", "ram", "file")}
        for name, rates in rows.items():
            lines.append(f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |")
            print(lines[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mine, torchvisions = listing(Path(folder))
    lines += ["", f"{NAMES:,} names are listed in {mine:.2f} s (ImageFolder: {torchvisions:.2f} s). Goal: below 5 s."]
    print("\n".join(lines[-2:]))
    if chosen.write:
        Path(__file__).with_name("results").joinpath("loading.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
