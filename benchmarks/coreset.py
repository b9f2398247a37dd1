"""Seconds of the exact k-center greedy against the plain torch loop, and whether the picks are the same.

    python -m benchmarks.coreset [--write]                     # the sizes of its table; --write: results/coreset.md
    python -m benchmarks.coreset --only "50,000 x 128"         # those whose name holds this
    python -m benchmarks.coreset --size 20000 128 2000 --device cuda

The plain loop keeps float32 norms and takes a matrix-vector product, a minimum and an argmax for every pick: the
fastest form we know in torch. anomalib's loop (2.6) takes the norm of the differences instead. A pick costs them the
same every time, so where all would take beyond a minute they are timed on fewer picks. The three and the floor's
product take turns and the fastest turn of each counts, so that a busy machine slows all alike. The picks are compared
to the float64 loop that defines them, for as many picks as `--check` seconds allow. Features: "network", random ReLUs
of 8 factors (low intrinsic dimension, as patch features have), and "whitened", a Gaussian (no structure to use). The
floor is what the arithmetic alone would take, 2 N D picks operations at the rate of a float32 matrix product
N x D x 4096 here, or one reading of the features at the rate of a sum over them if that is longer; a search that needs
not all distances can go below it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import processor
from runtime.version import commit
from search.bounds import full_precision
from search.coreset import greedy_coreset

SIZES = [  # N, D, picks: a small set, 1 % and 10 % under the projection, 1 % without
    (20_000, 128, 300),
    (50_000, 128, 500),
    (50_000, 128, 5_000),
    (150_000, 128, 1_500),
    (150_000, 128, 15_000),
    (50_000, 1536, 500),
]


def whitened(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator)


def network(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Two random ReLU layers of 8 factors of falling strength, and a projection: (n, d), participation ratio 7."""
    x = torch.randn(n, 8, generator=generator) * torch.tensor([2.0, 1.5, 1.0, 0.8, 0.5, 0.4, 0.3, 0.2])
    for width in (256, 256):
        x = (x @ torch.randn(x.shape[1], width, generator=generator) / x.shape[1] ** 0.5).relu()
    return x @ torch.randn(256, d, generator=generator) / 16


def plain_products(x: Tensor, n_picks: int) -> Tensor:
    """Float32 with precomputed norms: half of |x - y|^2 is |x|^2/2 + |y|^2/2 - x.y."""
    half = x.square().sum(1) / 2
    newest, least, picks = torch.tensor(0, device=x.device), torch.full_like(half, torch.inf), []
    for _ in range(n_picks):
        picks.append(newest)
        least = torch.minimum(least, torch.addmv(half, x, x[newest], alpha=-1).add_(half[newest]))
        least[newest] = -torch.inf
        newest = least.argmax()
    return torch.stack(picks)


def anomalib_loop(x: Tensor, n_picks: int) -> Tensor:
    """As in anomalib's KCenterGreedy, started at 0: norms of differences."""
    newest, least, picks = torch.tensor(0, device=x.device), torch.full((len(x),), torch.inf, device=x.device), []
    for _ in range(n_picks):
        picks.append(newest)
        least = torch.minimum(least, torch.linalg.norm(x - x[newest], dim=1))
        newest = least.argmax()
        least[newest] = 0
    return torch.stack(picks)


def plain_float64(x: Tensor, seconds: float) -> Tensor:
    """The definition, by differences, for as many picks as fit in `seconds`."""
    x, newest, picks, end = x.double(), 0, [], time.perf_counter() + seconds
    least = torch.full((len(x),), torch.inf, dtype=torch.float64)
    while time.perf_counter() < end and len(picks) < len(x):
        picks.append(newest)
        least = torch.minimum(least, (x - x[newest]).square_().sum(1))
        least[newest] = -torch.inf
        newest = int(least.argmax())
    return torch.tensor(picks)


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def floor(features: Tensor, n_picks: int) -> float:
    """Seconds of the arithmetic, or of one reading of the features, whichever is longer."""
    some = features[: 2**14]
    others = features[:4096].T.contiguous()
    with full_precision(features.device):
        product = min(timed(lambda: some @ others, features.device)[0] for _ in range(3))
    reading = timed(lambda: features.sum(0), features.device)[0]
    return max(product * len(features) / len(some) * n_picks / others.shape[1], reading)


def measure(features: Tensor, n_picks: int, *, turns: int, check: float) -> tuple[list[float], str]:
    """Seconds of the plain loop and of anomalib's for all picks, ours, the floor; verdict on the picks."""
    trial, _ = timed(lambda: plain_products(features, min(n_picks, 50)), features.device)
    sample = n_picks if trial * n_picks / 50 < 60 / turns else min(n_picks, 300)
    seconds = []
    for _ in range(turns):
        loops = [timed(lambda: loop(features, sample), features.device)[0] for loop in (plain_products, anomalib_loop)]  # noqa: B023
        ours, picks = timed(lambda: greedy_coreset(features, n_picks, start=0).picks, features.device)
        seconds.append([*(t * n_picks / sample for t in loops), ours, floor(features, n_picks)])
    expected = plain_float64(features.cpu(), check)[:n_picks]
    same = "yes" if torch.equal(picks[: len(expected)], expected) else "NO"
    return list(map(min, zip(*seconds))), f"{same}, of {len(expected):,} checked"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, metavar=("N", "D", "PICKS"), action="append")
    parser.add_argument("--only", default="", help='a part of the names of the cases to run, as "150,000 x 128"')
    parser.add_argument("--features", choices=["network", "whitened"], nargs="+", default=["network", "whitened"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=3, help="runs of each, the fastest counts")
    parser.add_argument("--check", type=float, default=60.0, help="seconds of the float64 loop that checks the picks")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/coreset.md (_cuda.md)")
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    lines = [
        "# Exact k-center greedy: seconds",
        "",
        f"`python -m benchmarks.coreset`, fastest of {options.turns} turns, on {machine}, "
        f"{torch.get_num_threads()} CPU threads; torch {torch.__version__}; commit {commit()}.",
        "",
        "| features | N x D | picks | plain loop, s | anomalib's, s | ours, s | plain / ours | anomalib's / ours "
        "| floor, s | ours / floor | same picks as the float64 loop |",
        "|---" * 11 + "|",
    ]
    print("\n".join(lines), flush=True)
    for n, d, n_picks in options.size or SIZES:
        for name in options.features:
            case = f"{n:,} x {d}, {n_picks:,} picks, {name}"
            if options.only not in case:
                continue
            print(f"{case} ...", file=sys.stderr, flush=True)
            features = {"network": network, "whitened": whitened}[name](n, d, torch.Generator().manual_seed(0)).to(
                device
            )
            (plain, anomalib, ours, least), verdict = measure(
                features, n_picks, turns=options.turns, check=options.check
            )
            row = [name, f"{n:,} x {d}", f"{n_picks:,}", f"{plain:.2f}", f"{anomalib:.2f}", f"{ours:.3f}"]
            row += [f"{plain / ours:.1f} x", f"{anomalib / ours:.1f} x", f"{least:.3f}", f"{ours / least:.2f}", verdict]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    if options.write:
        file = "coreset.md" if device.type == "cpu" else "coreset_cuda.md"
        Path(__file__).with_name("results").joinpath(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
