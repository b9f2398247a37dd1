"""Threads that wait for others soon sleep instead of spinning. Every program here imports this before torch.

At the end of each parallel loop, OpenMP's threads wait for the slowest one, and by default they spin. Where another
program keeps a core busy, spinning takes the very time that the slowest thread needs: a ResNet-18's training step took
6 times as long, the picks of a coreset 50 times (`python -m benchmarks.neighbor`). OpenMP reads its settings once, when
torch loads it. What the user has set is kept. GCC's OpenMP here spins 10,000 times before it sleeps, not 300,000:
without a busy neighbor a step then takes 1-2 % longer and a coreset about 10 %, where sleeping at once costs 4 % and
40 %; beside a busy neighbor both settings gain as much.
"""

import os
from concurrent.futures import ThreadPoolExecutor

SETTINGS = (
    "OMP_WAIT_POLICY",  # of every OpenMP
    "GOMP_SPINCOUNT",  # GCC's, which torch's Linux wheels bring
    "KMP_BLOCKTIME",  # LLVM's and Intel's
    "KMP_LIBRARY",
)

OURS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}

if not any(name in os.environ for name in SETTINGS):
    os.environ |= OURS


def cpu_count() -> int:
    """Processors that this process may use, which in a container or under taskset are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Threads(ThreadPoolExecutor):
    """When its `with` block ends early, by an error or Ctrl-C, what no thread has begun is dropped."""

    def __exit__(self, *_) -> None:
        self.shutdown(cancel_futures=True)
