"""Seconds and memory of DINO's loss in chunks, with its gradient, against the plain formula under autograd.

    python -m benchmarks.dino_loss [--write]          # --write: benchmarks/results/dino_loss.md (dino_loss_cuda.md)
    python -m benchmarks.dino_loss --size 8 10 65536 --device cuda

Student (B, V, K) and teacher (B, 2, K) logits are bfloat16, as autocast leaves them. The plain version casts them to
float32, as the loss needs, and keeps what autograd asks for. Forward and backward are timed together, on a CPU in CPU
seconds of one thread, which other programs on the machine change little; the two take turns and the fastest turn of
each counts. "Largest float32" is the largest tensor of that type that an operation returned. "Peak" is the most memory
in use beyond that before, when the logits are there: torch.cuda's max_memory_allocated, or the process's resident
memory, which Linux only tells. It includes the gradient, which is as large as the student. "Error" is the length of the
difference between the bfloat16 gradient and the same in float32, over the latter's length.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import processor
from losses.dino import DINOLoss
from runtime.version import commit

SIZES = [(64, 10, 65_536), (64, 10, 4_096)]  # B, V, K
TEMPERATURE = 0.04
MIB = 2**20


class LargestFloat32(TorchDispatchMode):
    """The most bytes of a float32 tensor that an operation returned."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.dtype == torch.float32:
                self.bytes = max(self.bytes, x.nbytes)
        return result


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula of losses/dino.py at center 0, for autograd."""
    q = F.softmax(teacher.float() / TEMPERATURE, dim=-1)  # (B, 2, K)
    log_p = F.log_softmax(student.float() / 0.1, dim=-1)  # (B, V, K)
    pairs = -torch.einsum("bik,bvk->iv", q, log_p) / len(q)  # (2, V)
    return (pairs.sum() - pairs.diagonal().sum()) / (2 * student.shape[1] - 2)


def timed(call: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes in use at most during the call, beyond those before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be used again uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is that of now
    before = highest()
    call()
    return highest() - before


def highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(size: tuple[int, int, int], device: torch.device, turns: int) -> list[tuple[str, float, int, int, float]]:
    """For the plain version and ours: name, seconds, bytes of the largest float32, peak bytes, error."""
    batch, views, prototypes = size
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(count, batch, prototypes, generator=generator, device=device).mul_(0.2).bfloat16().transpose(0, 1)
        for count in (views, 2)
    )
    student.requires_grad_()
    loss = DINOLoss(prototypes).to(device)
    forward = {"autograd": plain, "in chunks": lambda s, t: loss(s, t, TEMPERATURE)[0]}
    gradient = {
        name: lambda run=run: torch.autograd.grad(run(student, teacher), student)[0] for name, run in forward.items()
    }
    largest, most, seconds = {}, {}, {name: [] for name in gradient}
    for name, call in gradient.items():
        with LargestFloat32() as mode:
            call()
        largest[name], most[name] = mode.bytes, peak(call, device)
    for _ in range(turns):
        for name, call in gradient.items():
            seconds[name].append(timed(call, device))
    exact = student.detach().float().requires_grad_()
    exact = torch.autograd.grad(plain(exact, teacher), exact)[0]
    errors = {name: ((call().float() - exact).norm() / exact.norm()).item() for name, call in gradient.items()}
    return [(name, min(seconds[name]), largest[name], most[name], errors[name]) for name in gradient]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, metavar=("B", "V", "K"), action="append")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=10, help="runs of each, the fastest counts")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/dino_loss.md (_cuda.md)")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, one thread"
    lines = [
        "# DINO's loss and its gradient from bfloat16 logits: seconds and memory",
        "",
        f"`python -m benchmarks.dino_loss`, fastest of {options.turns} turns, on {machine}; "
        f"torch {torch.__version__}; commit {commit()}.",
        "",
        "| B x V x K | student, MiB | version | seconds | largest float32, MiB | peak beyond the logits, MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for size in options.size or SIZES:
        for name, seconds, largest, most, error in measure(size, device, options.turns):
            case = f"{size[0]} x {size[1]} x {size[2]:,} | {2 * size[0] * size[1] * size[2] / MIB:.0f}"
            metrics = f"{seconds:.4f} | {largest / MIB:.1f} | {most / MIB:.0f} | {error:.1e}"
            lines.append(f"| {case} | {name} | {metrics} |")
            print(lines[-1], flush=True)
    if options.write:
        file = "dino_loss.md" if device.type == "cpu" else "dino_loss_cuda.md"
        Path(__file__).with_name("results").joinpath(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
