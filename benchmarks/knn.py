"""Seconds of the exact nearest-neighbor search against torch.cdist and topk, and against the matrix product alone.

    python -m benchmarks.knn [--write]                 # --write: benchmarks/results/knn.md (knn_cuda.md)
    python -m benchmarks.knn --only 1536 --device cuda

784 queries are the patches of one image of 224 x 224 at stride 8. The peak is a plain product queries @ bank.T of the
same shape, measured here in the precision that the search uses; the share is its time over ours. torch.cdist computes
float32 products as well, so its neighbors can be wrong: the table counts for how many of the first 64 queries the
nearest is not that of a search by float64 differences. The ways take turns and the fastest turn of each counts.
Features as in benchmarks/coreset.py, "network"; queries are other points of the same kind.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.coreset import network, timed
from benchmarks.machine import processor
from runtime.version import commit
from search.bounds import matmul_precision
from search.nearest import nearest, prepare

SIZES = [(784, 16_384, 128), (784, 16_384, 1024), (1024, 16_384, 1536)]  # queries, entries, features
NEIGHBORS = (1, 9)
CHECKED = 64  # queries compared to a search by differences, which is slow


def plain(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with matmul_precision(queries.device, "ieee"):
        return torch.cdist(queries, bank).topk(k, largest=False)


def by_differences(queries: Tensor, bank: Tensor) -> Tensor:
    """Index of the nearest entry, (Q,), by the definition."""
    bank = bank.double()
    return torch.stack([(bank - query).square_().sum(1).argmin() for query in queries.double()])


def measure(
    queries: Tensor, bank: Tensor, k: int, precision: str, turns: int
) -> tuple[float, float, float, Tensor, Tensor]:
    """Seconds of cdist and topk, of the product alone, and ours; nearest entries of the first and the last, (Q,)."""
    prepared, device, seconds = prepare(bank, precision=precision), queries.device, []
    for _ in range(turns + 1):  # the first turn warms up
        theirs, found = timed(lambda: plain(queries, bank, k), device)
        with matmul_precision(device, precision):
            product = timed(lambda: queries @ bank.T, device)[0]
        ours, exact = timed(lambda: nearest(queries, bank, k, prepared=prepared), device)
        seconds.append((theirs, product, ours))
    return *(min(column) for column in zip(*seconds[1:])), found[1][:, 0], exact[1][:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help='a part of the names of the cases to run, as "x 1536"')
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--precision", choices=["ieee", "tf32", "bf16"], nargs="+", help="default: ieee; on CUDA tf32 too"
    )
    parser.add_argument("--turns", type=int, default=5, help="runs of each, the fastest counts")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/knn.md (knn_cuda.md)")
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    lines = [
        "# Exact nearest neighbors: seconds",
        "",
        f"`python -m benchmarks.knn`, fastest of {options.turns} turns, on {machine}, {torch.get_num_threads()} CPU "
        f"threads; torch {torch.__version__}; commit {commit()}.",
        "",
        "| queries x bank x D | k | product in | cdist + topk, s | its mistakes | ours, s | GFLOP/s | share of the "
        "product alone | same as by differences |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for q, m, d in SIZES:
        case = f"{q} x {m:,} x {d}"
        if options.only not in case:
            continue
        print(f"{case} ...", file=sys.stderr, flush=True)
        points = network(q + m, d, torch.Generator().manual_seed(0)).to(device)
        queries, bank = points[:q], points[q:].contiguous()
        truth = by_differences(queries[:CHECKED], bank)
        for precision in options.precision or (["ieee"] if device.type == "cpu" else ["ieee", "tf32"]):
            for k in NEIGHBORS:
                theirs, product, ours, first, exact = measure(queries, bank, k, precision, options.turns)
                row = [
                    case,
                    str(k),
                    precision,
                    f"{theirs:.4f}",
                    str(int((first[:CHECKED] != truth).sum())),
                    f"{ours:.4f}",
                ]
                row += [f"{2e-9 * q * m * d / ours:,.0f}", f"{product / ours:.0%}"]
                lines.append(f"| {' | '.join([*row, 'yes' if torch.equal(exact[:CHECKED], truth) else 'NO'])} |")
                print(lines[-1], flush=True)
    if options.write:
        file = "knn.md" if device.type == "cpu" else "knn_cuda.md"
        Path(__file__).with_name("results").joinpath(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
