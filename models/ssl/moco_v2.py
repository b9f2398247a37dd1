"""MoCo v1 and v2 (He et al. 2020, "Momentum contrast"; Chen et al. 2020, "Improved baselines"; official builder.py)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from losses.info_nce import queue_nce
from models.backbones.split_batch_norm import SplitBatchNorm2d
from models.heads import head_widths, mlp
from models.ssl.method import Encoder, SSLMethod, frozen_copy
from models.ssl.queue import Queue
from runtime.distributed import gather, rank, world_size
from runtime.errors import UserError
from runtime.values import NonNegativeFloat, PositiveFloat, PositiveInt, Width, WidthOrZero


class MoCoV2(SSLMethod):
    """A query finds its key, made by the moving average from another view, among a queue of earlier images' keys.

    BatchNorm over one process's images would let a query know its key by the statistics they share. So each process
    makes the keys of other processes' images, shuffled; with one process, batch norms see `splits` parts apart and
    the keys are shuffled among them (official colab/moco_cifar10_demo.ipynb; 8 there).

    The official code moves the average before it makes the keys and here it moves after the step, with the same result:
    set `ema` to the same start and end.

    Args:
        temperature: 0.2 in v2, 0.07 in v1, 0.1 in the CIFAR-10 notebook.
        queue: its length; 65536 for ImageNet, 4096 for CIFAR-10. Well below the number of images, for a queue that
            is longer holds an image's own earlier keys, and it repels itself.
        head: `mlp`, two layers, is v2, `linear` v1.
        hidden: width of the head's hidden layer; 0 takes the backbone's number of features, as in the official code.
        out: width of query and key.
        splits: parts of the batch that 2-D batch norms see apart, in training; 1, the whole batch of a process, guards
            with several processes only.
        symmetric: each view is query and key once, and the losses are added; the notebook's option.
        gamma: of a focal term, see losses/focal.py; 0: none, as in the paper.
    """

    takes = (2, 2, "moco")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: PositiveFloat = 0.2,
        queue: Width = 65536,
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 0,
        out: Width = 128,
        splits: PositiveInt = 1,
        symmetric: bool = False,
        gamma: NonNegativeFloat = 0.0,
    ):
        super().__init__()
        self.temperature, self.symmetric, self.gamma = temperature, symmetric, gamma
        widths = head_widths(backbone.num_features, head, hidden, out)
        encoder = Encoder(backbone, mlp(widths, batch_norm=False, bias=True, last_bias=True))
        self.online = SplitBatchNorm2d.convert(encoder, splits) if splits > 1 else encoder
        if splits > 1 and not any(isinstance(module, SplitBatchNorm2d) for module in encoder.modules()):
            raise UserError(f"method.splits={splits} splits no batch norm: the backbone has none; set it to 1")
        self.target = frozen_copy(self.online)
        self.queue = Queue(queue, out)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        pairs = [views, views[::-1]] if self.symmetric else [views]
        queries = torch.stack([self.online(one) for one, _ in pairs], dim=1)  # (B, P, D)
        with torch.no_grad():
            keys = torch.stack([shuffled(self.target, other) for _, other in pairs], dim=1)  # (B, P, D)
        return queries, keys

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        queries, keys = embeddings
        losses = [
            queue_nce(q, k, self.queue.rows, self.temperature, gamma=self.gamma)
            for q, k in zip(queries.unbind(1), keys.unbind(1))
        ]
        self.queue.hold(keys.flatten(0, 1))  # (B P, D)
        terms = 1 + len(self.queue.rows)
        chance = len(losses) * (1 - 1 / terms) ** self.gamma * math.log(terms)
        pair = torch.stack([queries[:, 0].detach(), keys[:, 0].to(queries.dtype)], dim=1)  # (B, 2, D)
        return sum(losses), {"embeddings": pair, "chance_loss": torch.tensor(chance)}

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        self.queue.push()


def shuffled(network: nn.Module, view: Tensor) -> Tensor:
    """network(view) for view (B, 3, h, w), made in another order and on other processes (official _batch_shuffle_ddp):
    each process draws the same permutation of all images, passes its part, and takes its own images' rows back."""
    everything = gather(view)  # (W B, 3, h, w)
    order = torch.randperm(len(everything), device=view.device)
    if world_size() > 1:
        torch.distributed.broadcast(order, 0)
    mine = slice(rank() * len(view), (rank() + 1) * len(view))
    out = gather(network(everything[order[mine]]))  # (W B, D), row i is image order[i]
    return out[order.argsort()[mine]]
