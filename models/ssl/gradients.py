"""The gradient of one step, whose pictures come in one batch, or in several with one loss."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from training.sam import frozen_statistics


class Embed(nn.Module):
    """The part of a method (or of SPD around one) that a step of several batches passes once for each of them."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return self.method.embed(views)


def backward(
    model: nn.Module, method: nn.Module, views: list[list[Tensor]], labels: list[Tensor], scaler, autocast, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradient of the method's loss of a step's pictures to the parameters; -> (loss, stats).

    Args:
        model: the method, or for several batches `Embed` of it; perhaps compiled and distributed.
        method: the method, or SPD around it.
        views: A batches of V x (B, 3, h, w). labels: A x (B,).
        scaler: torch.amp.GradScaler. autocast: a function that gives the context of the forward pass.
        seed: of random numbers drawn on the way, say by a dropout: the same seed, the same numbers.
    """
    if len(views) > 1:
        return accumulate(model, method, views, labels, scaler, autocast, seed)
    torch.manual_seed(seed)
    with autocast():
        loss, stats = model(views[0], labels[0])
    scaler.scale(loss).backward()
    return loss, stats


def accumulate(
    model: nn.Module, method: nn.Module, views: list[list[Tensor]], labels: list[Tensor], scaler, autocast, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """`backward` for several batches with one loss of all their pictures.

    The mean of the batches' losses, the usual accumulation, is another loss for a contrastive method: a picture would
    have the negatives of its own batch only. Here all batches are embedded without gradient, the loss and its gradient
    with respect to the embeddings are taken over all of them, and each batch passes again, to carry its part of that
    gradient to the parameters (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited
    setup", algorithm 1). The price is a second forward pass. Batch norms see one batch at a time, and their statistics
    move in the second pass alone.
    """
    method.check_views(len(views[0]))
    parts = []
    with torch.no_grad(), frozen_statistics(method):
        for number, batch in enumerate(views):
            torch.manual_seed(seed + number)
            with autocast():
                parts.append(method.embed(batch))
    together = tuple(torch.cat(part).requires_grad_() for part in zip(*parts))  # (A B, ...)
    with autocast():
        loss, stats = method.criterion(together, torch.cat(labels))
    scaler.scale(loss).backward()
    places = [
        [None] * len(views) if whole.grad is None else whole.grad.split([len(part[i]) for part in parts])
        for i, whole in enumerate(together)
    ]  # of each embedding: its gradient in each batch
    for number, (batch, gradients) in enumerate(zip(views, zip(*places))):
        torch.manual_seed(seed + number)
        last = number == len(views) - 1
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            with autocast():
                embeddings = model(batch)
            pairs = [(e, g) for e, g in zip(embeddings, gradients) if e.requires_grad]
            torch.autograd.backward([e for e, _ in pairs], [g for _, g in pairs])
    return loss, stats
