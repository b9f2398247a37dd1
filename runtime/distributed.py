"""Processes: torchrun's environment, gather and reduce. At world size 1 everything here is the identity."""

import inspect
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from runtime import errors, signals
from runtime.errors import UserError, cut
from runtime.scripts import end_with_sweep, machine

# How long a process waits in a collective for one that still runs, as for rank 0 while it alone measures and draws: the
# metrics of 12,000 maps of 1024 x 1024 pixels, with intervals (benchmarks/results/aupro.md).
PATIENCE = timedelta(minutes=30)
LOOK, STOPPED = 1.0, 10.0  # seconds between looks at the other processes; and for which one may be stopped
_alone = False


def setup(device: str = "auto") -> torch.device:
    """Join torchrun's process group when there is one (nccl on CUDA, gloo on CPU) and return this process's device.

    Args:
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:1`.
    """
    end_with_sweep()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={cut(device)}, but torch finds no CUDA device here; use device=cpu")
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"device={cut(device)} is one device for several processes; use device=cuda, which gives each its own"
        )
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        target = torch.device(device)
        if target.type not in ("cpu", "cuda"):
            raise RuntimeError
        if target.type == "cuda":
            torch.cuda.set_device(target)
    except RuntimeError:
        raise UserError(
            f"device={cut(device)} does not exist here ({torch.cuda.device_count()} CUDA devices); use auto or cpu"
        ) from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "nccl" if target.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        threading.Thread(target=_watch, args=(_neighbors(), os.getppid()), daemon=True).start()
    return target


def _neighbors() -> dict[int, int]:
    """{rank: process} of the others on this machine; every process must call it. Empty without Linux's /proc."""
    here, everyone = machine(), [("", 0)] * world_size()
    dist.all_gather_object(everyone, (here, os.getpid()))
    return {r: process for r, (where, process) in enumerate(everyone) if where == here != "" and r != rank()}


def _watch(neighbors: dict[int, int], parent: int) -> None:
    """In a thread: end this process when another one is stopped (SIGSTOP), or torchrun was killed.

    A collective cannot tell a stopped process from one that takes its time, and nothing tells of torchrun. A killed
    process needs no look: collectives or torchrun notice it at once. What a debugger holds does not count as stopped.
    """
    looks = dict.fromkeys(neighbors, 0)  # in a row that found it stopped; no time, as this process may be stopped too
    while True:
        time.sleep(LOOK)
        if os.getppid() != parent and "TORCHELASTIC_RUN_ID" in os.environ:
            if os.environ["LOCAL_RANK"] == "0":
                tqdm.write("error: torchrun was killed; the same command resumes from the last checkpoint", sys.stderr)
            signals.exit_at_once(2)
        for number, process in neighbors.items():
            looks[number] = looks[number] + 1 if signals.state_of(process) == "T" else 0
            if looks[number] * LOOK >= STOPPED:
                what = (
                    f"rank {number} (process {process}) was stopped by a signal, and the others cannot go on without it"
                )
                errors.leave(UserError(f"{what}; the same command resumes from the last checkpoint"))


def cleanup() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process counts as the only one, so that a loss gathers nothing of the others, which meanwhile do
    something else."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def data_parallel(model: nn.Module) -> nn.Module:
    """The model, or with several processes DistributedDataParallel of it, which averages gradients and leaves buffers
    alone: a queue of 65536 keys is equal on all ranks and need not be sent at each step, and running statistics are
    used only in evaluation, which takes rank 0's (`share_buffers`)."""
    if world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    keyword = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name since 2.13
    options: dict[str, Any] = {keyword: False}
    return DistributedDataParallel(model, **options)


def unsynchronized(model: nn.Module, when: bool) -> AbstractContextManager:
    """Inside, if `when`, each process's backward passes leave its own gradients in place of the mean over processes."""
    return model.no_sync() if when and isinstance(model, DistributedDataParallel) else nullcontext()


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums the incoming gradients over ranks (official VICReg's FullGatherLayer)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (W*B, ...)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]  # (B, ...)


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (B, ...) -> (W*B, ...), differentiable; B must be equal on all ranks.

    The backward sums over ranks: with every rank's loss the mean over its own anchors and DDP's average of gradients,
    W processes on B/W rows each have exactly one process's gradient.
    """
    return _Gather.apply(x) if world_size() > 1 else x


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Like `gather` without gradient, for any number of rows per rank: (B_r, ...) -> (sum of B_r, ...)."""
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = max(int(count) for count in counts)
    padded = x.new_zeros((most, *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def gather_objects(x: Any) -> list:
    """What each rank has, in rank order; small things that pickle."""
    parts = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, x)
    return parts


@torch.no_grad()
def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of x over ranks, without gradient; x itself at world size 1."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


@torch.no_grad()
def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum of x over ranks, entry by entry."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of x over ranks, without gradient."""
    return all_reduce_sum(x) / world_size()


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers, since each has its own running statistics of BatchNorm."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
