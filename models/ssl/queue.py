"""A first-in-first-out memory of embeddings: MoCo's queue, and the memory bank of the other contrastive methods."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.distributed import gather, world_size
from runtime.errors import UserError
from runtime.precision import at_least_float32

SUITABLE = {  # lightly-train's: up to so many training images, a queue of this length
    50: 16,
    100: 32,
    250: 64,
    500: 128,
    1000: 256,
    2000: 512,
    4000: 1024,
    10_000: 2048,
    20_000: 4096,
    40_000: 8192,
    60_000: 16384,
    200_000: 32768,
}


def suitable_length(images: int) -> int:
    """Length of a queue for a training set of so many images: a large queue on a small set is unstable."""
    return next((length for most, length in SUITABLE.items() if images <= most), 65536)


class Queue(nn.Module):
    """The last `length` embeddings of all processes, of unit length; at first random ones (official moco/builder.py).

    `hold` keeps a step's embeddings aside, gathered, and `push` writes them over the oldest rows: the loop calls it
    once after the optimizer's step, so that a loss evaluated twice (SAM) meets one and the same queue. The first
    embeddings of a step are kept: SAM's second ones are those of weights that no step keeps. Any length that
    is at least a step's number of embeddings will do; in the official code it is a multiple of it.

    Attributes:
        rows: (K, D). labels: (K,) int64, -1 where none was given.
        batches: that a step's images come in, each dealt over the processes. Rows are kept in the order of the
            images, so that the same ones are overwritten however many processes and batches there are.
    """

    batches = 1

    def __init__(self, length: int, features: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(length, features), dim=1))
        self.register_buffer("labels", torch.full((length,), -1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))
        self.held: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def hold(self, embeddings: Tensor, labels: Tensor | None = None) -> None:
        """embeddings (N, D), normalized here, and labels (N,) of this process, batch by batch."""
        if self.held is not None:
            return
        if labels is None:
            labels = torch.full((len(embeddings),), -1, device=embeddings.device)
        rows = self._gather(at_least_float32(F.normalize)(embeddings.detach().to(self.rows.dtype), dim=1))  # (W N, D)
        self.require_room(len(rows))
        self.held = rows, self._gather(labels)

    def require_room(self, embeddings: int) -> None:
        """Refuse a step that makes more embeddings than the queue holds."""
        if embeddings > len(self.rows):
            raise UserError(
                f"a step makes {embeddings} embeddings and the queue holds {len(self.rows)}: make it longer, or "
                "batch_size smaller"
            )

    def _gather(self, x: Tensor) -> Tensor:
        """(N, ...) of this process -> (W N, ...) of all: batch by batch, and within one by rank."""
        return gather(x).unflatten(0, (world_size(), self.batches, -1)).transpose(0, 1).flatten(0, 2)

    @torch.no_grad()
    def push(self) -> None:
        if self.held is None:
            return
        rows, labels = self.held
        positions = (self.oldest + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows.index_copy_(0, positions, rows)
        self.labels.index_copy_(0, positions, labels)
        self.oldest.copy_((self.oldest + len(rows)) % len(self.rows))
        self.held = None
