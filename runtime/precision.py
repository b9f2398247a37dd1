"""The precisions of autocast by name, and full precision inside it, for losses and densities: half precision would ruin
their sums and logarithms."""

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
P = ParamSpec("P")
R = TypeVar("R")


def at_least_float32(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: the function runs with autocast off, and its floating-point tensors have one type, at least float32.

    That type is float64 if any of them is float64. Labels, masks and other tensors stay as they are, and gradients have
    the types of the caller's tensors. Tensors are found among the arguments, of which there must be one, and in lists
    and tuples of them. It does nothing for a generator function, whose body runs only after the call has returned.
    """

    @functools.wraps(function)
    def promoted(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = _tensors([*args, *kwargs.values()])
        dtype = torch.float32
        for tensor in tensors:
            if tensor.is_floating_point():
                dtype = torch.promote_types(dtype, tensor.dtype)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*_to(args, dtype), **{name: _to(value, dtype) for name, value in kwargs.items()})

    return promoted


def _tensors(values: Iterable) -> list[Tensor]:
    """All tensors among the values, in order."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += _tensors(value)
    return found


def _to(value, dtype: torch.dtype):
    """The value, its floating-point tensors as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_to(each, dtype) for each in value) if type(value) in (list, tuple) else value
