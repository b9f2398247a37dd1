"""Copies to the GPU that run beside the step on the batch before."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def prefetch(batches: Iterable[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches in their order with all but the last tensor (the indices) copied to the device, one batch ahead.

    On the CPU the batches as they are. On CUDA batch k + 1 is asked for, and its copy started on a stream of its own,
    before batch k is handed over: so an error of batch k + 1 comes one step early. Copies run beside the step only
    from pinned memory, which torch does not use again before they are done.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ready = torch.cuda.Stream(device), None
    for batch in batches:
        if ready is not None:
            _await(ready, stream, device)  # before the next copy starts, so that nobody waits for that one
        with torch.cuda.stream(stream):
            following = (*(column.to(device, non_blocking=True) for column in batch[:-1]), batch[-1])
        if ready is not None:
            yield ready
        ready = following
    if ready is not None:
        _await(ready, stream, device)
        yield ready


def _await(batch: tuple[Tensor, ...], stream: torch.cuda.Stream, device: torch.device) -> None:
    """What the caller's stream does from now on waits for the copies, and their memory, which is `stream`'s, is given
    away only after what the caller's stream did with it."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for column in batch[:-1]:
        column.record_stream(current)
