"""PsCo (Jang, Lee & Shin 2023, "Unsupervised meta-learning via few-shot pseudo-supervised contrastive learning")."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from losses.info_nce import queue_nce
from losses.psco import psco
from models.heads import head_widths, mlp
from models.ssl.method import Encoder, SSLMethod, frozen_copy
from models.ssl.queue import Queue
from runtime.distributed import world_size
from runtime.errors import UserError
from runtime.values import Few, PositiveFloat, PositiveInt, Width, WidthOrZero


class PsCo(SSLMethod):
    """MoCo with a queue, plus few-shot tasks made of it: a query belongs to the rows of the queue that are most like
    its key.

    Networks and losses of the official models.py (PsCoMoCo): query from the first, strongly augmented view, key from
    the second, weak one. In the official code batch norms are synchronized (`sync_bn=true`), the target's running
    statistics are copies of the online network's (here its own, which nothing reads in training), `ema` is 0.99
    throughout, and a ResNet's residual blocks start as identities (`backbone.zero_init_residual=true`).

    Args:
        temperature: of MoCo's term.
        task_temperature: of the few-shot term.
        queue: its length, well below the number of images: else an image's shots are its own earlier keys.
        shots: rows of the queue for each image; 4 for mini-ImageNet, 1 for Omniglot.
        iterations: of Sinkhorn.
        head: `mlp` or `linear`, of the projector.
        hidden: width of the hidden layers of projector and predictor; 0 takes the number of features, in the
            predictor `out`.
        out: width of the embedding that the loss sees.
        predictor: a predictor behind the projector, as in the official commands.
    """

    takes = (2, 2, "psco")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: PositiveFloat = 0.2,
        task_temperature: PositiveFloat = 1.0,
        queue: Width = 16384,
        shots: PositiveInt = 4,
        iterations: Few = 3,
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 4096,
        out: Width = 256,
        predictor: bool = True,
    ):
        super().__init__()
        if shots > queue:
            raise UserError(f"method.shots={shots} must be at most method.queue={queue}")
        self.temperature = temperature
        self.task = {"shots": shots, "temperature": task_temperature, "iterations": iterations}
        widths = head_widths(backbone.num_features, head, hidden, out)
        self.online = Encoder(backbone, mlp(widths, last_norm=True))
        self.predictor = mlp([out, hidden or out, out]) if predictor else nn.Identity()
        self.target = frozen_copy(self.online)
        self.queue = Queue(queue, out)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        strong, weak = views
        queries = self.predictor(self.online(strong))  # (B, D)
        with torch.no_grad():
            keys = self.target(weak)  # (B, D)
        return queries, keys

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        queries, keys = embeddings
        task, rows = psco(queries, keys, self.queue.rows, **self.task)
        contrast = queue_nce(queries, keys, self.queue.rows, self.temperature)
        self.queue.hold(keys)
        stats = {
            "task_loss": task.detach(),
            "moco_loss": contrast.detach(),
            "distinct_shots": _share_unique(rows),
            "chance_loss": torch.tensor(math.log(rows.numel() * world_size()) + math.log(1 + len(self.queue.rows))),
            "embeddings": torch.stack([queries.detach(), keys.to(queries.dtype)], dim=1),  # (B, 2, D)
        }
        return task + contrast, stats

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        self.queue.push()


def _share_unique(rows: Tensor) -> Tensor:
    """How many of the rows are different ones: 1 if no two images share a shot. Without a host sync."""
    ordered = rows.flatten().sort().values
    return (1 + (ordered[1:] != ordered[:-1]).sum()) / len(ordered)
