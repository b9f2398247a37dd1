"""Speed of the batched corruptions against the plain ones called image by image, on one CPU thread.

    python -m benchmarks.corruptions [--write]     # --write: also to benchmarks/results/corruptions.md

Both get the same images, 32 x 32 and 224 x 224, at severity 3. Times are CPU seconds of the one thread, which other
programs on the machine change little; the two take turns and the fastest turn of each counts. The plain ones are numpy,
scipy and Pillow, but for those marked by a star, which are loops over pixels in Python.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks import plain_corruptions
from benchmarks.machine import processor
from data.corruptions import BENCHMARK, FURTHER, Constants, corrupt
from runtime.version import commit

SEVERITY = 3
COUNTS: dict[Constants, tuple[int, int, int]] = {32: (256, 6, 2), 224: (8, 1, 2)}  # images batched, plain; turns


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def images(count: int, size: int) -> Tensor:
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    return v2.functional.resize(coarse, [size, size]).mul(255).byte()


def measure(name: str, constants: Constants, counts: tuple[int, int, int]) -> tuple[float, float]:
    """Seconds per image, batched and plain. Frost, here drawn and no photograph, has no plain form."""
    batch, single, turns = counts
    pixels, rng = images(batch, constants), np.random.default_rng(0)
    one = pixels[:single].permute(0, 2, 3, 1).double().numpy() / 255
    row = (BENCHMARK | FURTHER)[name]
    values = (row.at_32 if constants == 32 else row.at_224)[SEVERITY - 1]

    def plain() -> None:
        for x in one:
            np.uint8(np.clip(plain_corruptions.corrupted(name, x, values, rng), 0, 1) * 255)

    ids = torch.arange(batch)
    about = {"seed": 0, "constants": constants}
    pairs = [
        (seconds(lambda: corrupt(pixels, ids, name, SEVERITY, **about)), seconds(plain if name != "frost" else int))
        for _ in range(turns)
    ]
    batched, looped = (min(times) for times in zip(*pairs))
    return batched / batch, looped / single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/corruptions.md")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    sizes = [f"{size} px: {text}" for size in COUNTS for text in ("batched, ms", "plain, ms", "ratio")]
    lines = [
        "# Corruptions: CPU milliseconds per image",
        "",
        f"`python -m benchmarks.corruptions --write` on {processor()}, one thread, severity {SEVERITY}; torch "
        f"{torch.__version__}; commit {commit()}.",
        "",
        f"| corruption | {' | '.join(sizes)} |",
        f"|{'---|' * (len(sizes) + 1)}",
    ]
    print("\n".join(lines), flush=True)
    for name in BENCHMARK | FURTHER:
        cells = []
        for constants, counts in COUNTS.items():
            batched, plain = measure(name, constants, counts)
            cells += [f"{1000 * batched:.2f}", f"{1000 * plain:.2f}", f"{plain / batched:.1f} x"]
            if name == "frost":
                cells[-2:] = ["-", "-"]
        lines.append(f"| {name}{' *' * (name in plain_corruptions.LOOPS)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["", "\\* The plain one is a loop over pixels in Python."]
    print("\n".join(lines[-2:]))
    if write:
        Path(__file__).with_name("results").joinpath("corruptions.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
