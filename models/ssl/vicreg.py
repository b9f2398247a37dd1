"""VICReg (Bardes, Ponce & LeCun 2022, "Variance-invariance-covariance regularization"; official main_vicreg.py)."""

from typing import Literal

import torch
from torch import Tensor, nn

from losses.vicreg import vicreg
from models.heads import head_widths, mlp
from models.ssl.method import MANY, Encoder, SSLMethod, each_view
from runtime.errors import UserError
from runtime.values import NonNegativeFloat, Width, WidthOrZero


class VICReg(SSLMethod):
    """Views of an image agree, each dimension of the embedding varies over images, and no two vary together.

    In the official code the backbone's residual blocks start as identities (`backbone.zero_init_residual=true`).

    Args:
        invariance: coefficient of the distance between the views.
        variance: coefficient of the term that keeps each dimension's deviation at 1.
        covariance: coefficient of the term that decorrelates the dimensions.
        form: `official`, or `solo`, whose variance term counts twice; see losses/vicreg.py.
        head: `mlp`, three layers, or `linear`.
        hidden: width of its hidden layers; 8192 for ImageNet.
        out: width of the embedding that the loss sees; 8192 for ImageNet.
    """

    takes = (2, MANY, "byol")
    least_images = 2
    advice = "every image has one embedding; raise method.variance"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        invariance: NonNegativeFloat = 25.0,
        variance: NonNegativeFloat = 25.0,
        covariance: NonNegativeFloat = 1.0,
        form: Literal["official", "solo"] = "official",
        head: Literal["mlp", "linear"] = "mlp",
        hidden: WidthOrZero = 8192,
        out: Width = 8192,
    ):
        super().__init__()
        if form not in ("official", "solo"):
            raise UserError(f"method.form={form!r} is unknown; one of: official, solo")
        self.options = {"invariance": invariance, "variance": variance, "covariance": covariance, "form": form}
        self.chance = 0.99 * variance * (2 if form == "solo" else 1)  # 1 - sqrt(1e-4) for a constant embedding
        widths = head_widths(backbone.num_features, head, hidden, out, layers=3)
        self.online = Encoder(backbone, mlp(widths, bias=True))

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return (each_view(self.online, views),)

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        (z,) = embeddings  # (B, V, D)
        loss, terms = vicreg(z, **self.options)
        return loss, terms | {"embeddings": z.detach(), "chance_loss": torch.tensor(self.chance)}
