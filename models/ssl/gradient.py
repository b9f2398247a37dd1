"""The gradient of one step, whose images come in one batch, or in several batches with one loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.ssl.queue import Queue
from runtime.distributed import unsynchronized
from training.sam import frozen_statistics


class Embed(nn.Module):
    """The part of a method (or of SPD around one) that a step of several batches passes once for each of them."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        self.method.check_views(len(views))
        return self.method.embed(views)


def backward(
    model: nn.Module, method: nn.Module, batches: list[tuple], make_views: Callable, scaler, autocast, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the method's loss of a step's images to the parameters; -> (loss, stats).

    Args:
        model: the method, or for several batches `Embed` of it; perhaps compiled and distributed.
        method: the method, or SPD around it.
        batches: of the step, each (images (B, 3, S, S) uint8, labels (B,), ids (B,)).
        make_views: (images, ids) -> V x (B, 3, h, w); called again with the same batch it gives the same views.
        scaler, autocast: as of training.optim.mixed_precision.
        seed: of the random numbers that the forward pass draws, for dropout for example.
    """
    if len(batches) > 1:
        return accumulate(model, method, batches, make_views, scaler, autocast, seed)
    images, labels, ids = batches[0]
    torch.manual_seed(seed)
    with autocast():
        loss, stats = model(make_views(images, ids), labels)
    scaler.scale(loss).backward()
    return loss, stats


def accumulate(
    model: nn.Module, method: nn.Module, batches: list[tuple], make_views: Callable, scaler, autocast, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`backward` for several batches with one loss of all their images.

    The mean of the batches' losses, the usual accumulation, is another loss for a contrastive method: an image would
    have the negatives of its own batch only. Here all batches are embedded without gradient, the loss and its gradient
    with respect to the embeddings are taken over all of them, and each batch passes again, to carry its part of that
    gradient to the parameters (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited
    setup", algorithm 1). The price is a second forward pass, and a second time the views, which are those of one batch
    at a time. Batch norms, too, see one batch at a time, and their statistics move in the second pass alone.
    """
    for module in method.modules():
        if isinstance(module, Queue):
            module.batches = len(batches)
    parts = []
    with torch.no_grad(), frozen_statistics(method):
        for number, (images, _, ids) in enumerate(batches):
            torch.manual_seed(seed + number)
            with autocast():
                parts.append(getattr(model, "module", model)(make_views(images, ids)))  # DDP has no gradient to expect
    together = tuple(torch.cat(part).requires_grad_() for part in zip(*parts))  # (A B, ...)
    with autocast():
        loss, stats = method.criterion(together, torch.cat([labels for _, labels, _ in batches]))
    scaler.scale(loss).backward()
    shares = [
        [None] * len(batches) if whole.grad is None else whole.grad.split([len(part[i]) for part in parts])
        for i, whole in enumerate(together)
    ]  # of each embedding: its gradient in each batch
    for number, ((images, _, ids), gradients) in enumerate(zip(batches, zip(*shares))):
        torch.manual_seed(seed + number)
        with unsynchronized(model, number < len(batches) - 1):
            with autocast():
                embeddings = model(make_views(images, ids))
            pairs = [(e, g) for e, g in zip(embeddings, gradients) if e.requires_grad and g is not None]
            torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
    return loss, {name: value.detach() for name, value in stats.items()}
