"""Sharpness-aware minimization: a step takes the gradient where the loss near the weights is about largest."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.values import NonNegativeFloat


@dataclass(kw_only=True)
class SAMConfig:
    """`sam.*`: sharpness-aware minimization, at twice the cost of a step. Every process climbs along the gradient of
    all processes' images, as one process would, or of its own (m-sharpness), as in the official code; in a loss that
    gathers, along its own images' part of it, and then the images of differently moved networks are compared."""

    rho: NonNegativeFloat = 0.05  # radius of the neighborhood; adaptive ones are about ten times as large, 0.5 to 2
    adaptive: bool = False  # ASAM: a radius relative to each weight's size
    m_sharpness: bool = False  # each process climbs for itself, so that the result depends on their number


@contextmanager
def climbed(parameters: Iterable[nn.Parameter], rho: float, *, adaptive: bool = False) -> Iterator[None]:
    """Inside, the weights stand at w + eps and have no gradients; on exit w is back bit for bit, and the gradients
    computed inside stay (Foret et al. 2021, eq. 2; Kwon et al. 2021).

        SAM   eps = rho g / (|g| + 1e-12)              ASAM  eps = rho |w|^2 g / (| |w| g | + 1e-12), elementwise |w|

    with g the gradients found on entry and one norm over all parameters that have one; the others stay. ASAM as in
    davda54/sam: unlike the authors' code it adds no 0.01 to |w|, and treats biases as weights.

    eps does not depend on the scale of g, so the scaled gradients of fp16 will do. g is this process's: under
    DistributedDataParallel's no_sync each process climbs for itself (m-sharpness; Foret et al., section 4.1).
    """
    moved: list[Tensor] = [p for p in parameters if p.grad is not None]
    if not moved:
        raise ValueError("no parameter has a gradient to climb along: call backward before climbed")
    saved = [p.detach().clone() for p in moved]
    with torch.no_grad():
        steps = [p.grad for p in moved if p.grad is not None]  # overwritten: nobody needs them again
        for g in steps:  # fp16's overflow must not reach the weights, for losses may remember what pass 2 makes of them
            g.nan_to_num_(0.0, 0.0, 0.0)
        if adaptive:
            sizes = torch._foreach_abs(moved)
            torch._foreach_mul_(steps, sizes)
        norm = torch.stack(torch._foreach_norm(steps)).norm()
        if adaptive:
            torch._foreach_mul_(steps, sizes)
        torch._foreach_mul_(steps, rho / (norm + 1e-12))
        torch._foreach_add_(moved, steps)
    for p in moved:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, saved)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in train mode goes on to normalize by the batch, but neither its running statistics nor its
    count of batches move: a step's images pass twice and count once, and those of w + eps belong to no network."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
