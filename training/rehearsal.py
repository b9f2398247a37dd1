"""Passing something through a network before the first step, to find out what cannot work, without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from runtime.errors import UserError, one_value_per_channel
from training.sam import frozen_statistics


@contextmanager
def no_trace(network: nn.Module, device: torch.device, *, training: bool) -> Iterator[None]:
    """Inside, the network passes in train or eval mode without gradients. Afterwards its modes, BatchNorm's statistics
    and the state of the random numbers are what they were: a run is bit for bit the one without a rehearsal."""
    devices = [device] if device.type == "cuda" else []
    modes = {module: module.training for module in network.modules()}
    network.train(training)
    try:
        with torch.no_grad(), frozen_statistics(network), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def naming(sizes: dict[str, int | tuple[int, int]]) -> Iterator[None]:
    """Inside, a `UserError` about a size, 90 x 90 for example, is prefixed with the key that has this value."""
    try:
        yield
    except UserError as error:
        keys = [f"{k}={words(v)}" for k, v in sizes.items() if " x ".join(map(str, shape_of(v))) in str(error)]
        raise UserError(f"{', '.join(keys)}: {error}" if keys else str(error)) from None


@contextmanager
def batch_norm_needs_more(batch_size: int) -> Iterator[None]:
    """Inside, torch's error about a batch norm with a single value per channel becomes a `UserError`."""
    try:
        yield
    except ValueError as error:
        if not one_value_per_channel(error):
            raise
        raise UserError(
            f"batch_size={batch_size} leaves one image per process and pass, and a batch norm one value per channel: "
            "raise batch_size"
        ) from None


def shape_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def words(size: int | tuple[int, int]) -> str:
    """As on a command line: 224, or 224,64."""
    height, width = shape_of(size)
    return str(height) if height == width else f"{height},{width}"
