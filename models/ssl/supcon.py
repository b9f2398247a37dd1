"""SupCon (Khosla et al. 2020, "Supervised contrastive learning")."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from losses.supcon import sup_con
from models.heads import head_widths, mlp
from models.ssl.method import MANY, Encoder, SSLMethod, all_views
from models.ssl.queue import Queue
from runtime.distributed import world_size
from runtime.errors import UserError
from runtime.values import NonNegativeFloat, PositiveFloat, Width, WidthOrZero


class SupCon(SSLMethod):
    """All views of all images of a class attract each other, those of other classes repel: SimCLR with labels.

    Head and loss of the official code (github.com/HobbitLong/SupContrast), whose heads have no batch norm. Any number
    of views; two in the official code.

    Args:
        temperature: 0.1 in the official code, for CIFAR-10 and ImageNet.
        base_temperature: the loss is multiplied by temperature / base_temperature, in the official code 0.1 / 0.07.
        form: `out`, the paper's and the official code's, or `in`, which is worse; see losses/supcon.py.
        head: `mlp`, two layers, or `linear`.
        hidden: width of the head's hidden layer; 0 takes the backbone's number of features, as in the official code.
        out: width of the embedding that the loss sees.
        bank: so many earlier views, with their labels, attract and repel, too (a memory bank); 0: none, as in the
            official code.
        gamma: of a focal term, see losses/focal.py; 0: none, as in the official code.

    Raises:
        UserError: another form or head.
    """

    needs_labels = True
    takes = (1, MANY, "simclr")
    least_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: PositiveFloat = 0.1,
        base_temperature: PositiveFloat = 0.07,
        form: Literal["out", "in"] = "out",
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 0,
        out: Width = 128,
        bank: WidthOrZero = 0,
        gamma: NonNegativeFloat = 0.0,
    ):
        super().__init__()
        if form not in ("out", "in"):
            raise UserError(f"method.form={form!r} is unknown; one of: out, in")
        self.temperature = temperature
        self.options = {"base_temperature": base_temperature, "form": form, "gamma": gamma}
        widths = head_widths(backbone.num_features, head, hidden, out)
        self.online = Encoder(backbone, mlp(widths, batch_norm=False, bias=True, last_bias=True))
        self.bank = Queue(bank, out) if bank else None

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return (all_views(self.online, views),)

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (z,) = embeddings  # (B, V, D)
        bank = {} if self.bank is None else {"bank": self.bank.rows, "bank_labels": self.bank.labels}
        loss = sup_con(z, labels, self.temperature, **self.options, **bank)
        others = z.shape[0] * z.shape[1] * world_size() - 1
        if self.bank is not None:
            self.bank.hold(z.flatten(0, 1), labels.repeat_interleave(z.shape[1]))  # (B V, D), (B V,)
            others += len(self.bank.rows)
        stats = {"embeddings": z.detach()}
        if z.shape[1] > 1:  # of one view, an anchor alone in its class costs 0, and how many are depends on the batch
            scale = self.temperature / self.options["base_temperature"]
            chance = scale * (1 - 1 / others) ** self.options["gamma"] * math.log(others)
            stats["chance_loss"] = torch.tensor(chance)
        return loss, stats

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        if self.bank is not None:
            self.bank.push()
