"""DINO (Caron et al. 2021, "Emerging properties in self-supervised vision transformers"; official main_dino.py)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from losses.dino import DINOLoss
from models.heads import DINOHead
from models.ssl.method import MANY, Encoder, SSLMethod, frozen_copy, multi_crop
from runtime.values import Few, NonNegativeInt, PositiveFloat, UnitInterval, Width
from training.schedule import linear_then_constant


class DINO(SSLMethod):
    """The student matches, from any crop, what its own moving average makes of the two global crops.

    Args:
        prototypes: K, outputs of the head; 65536 for ImageNet, 4096 or fewer for small sets.
        layers: of the head's MLP.
        hidden: width of the head's hidden layers.
        bottleneck: width of the normalized vector before the prototypes.
        norm_last_layer: keep the prototypes at unit length (steadier; False can gain a little for ViT-S).
        head_batch_norm: BatchNorm in the head; official for the ResNet-50 release only.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, after the warm-up; above 0.07 training is unstable.
        warmup_teacher_temperature: where the teacher's temperature begins; from there it is linear.
        warmup_teacher_epochs: epochs until it is teacher_temperature; 0: from the start.
        center_momentum: of the moving average of the teacher's outputs that is subtracted from them.
        freeze_last_layer: epochs during which the prototypes stay as they are; raise it if the loss does not fall.
    """

    kept = "target"
    takes = (2, MANY, "dino")
    in_epochs = ("warmup_teacher_epochs", "freeze_last_layer")
    advice = "lower teacher_temperature or its warm-up's start, or raise freeze_last_layer"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        prototypes: Width = 65536,
        layers: Few = 3,
        hidden: Width = 2048,
        bottleneck: Width = 256,
        norm_last_layer: bool = True,
        head_batch_norm: bool = False,
        student_temperature: PositiveFloat = 0.1,
        teacher_temperature: PositiveFloat = 0.04,
        warmup_teacher_temperature: PositiveFloat = 0.04,
        warmup_teacher_epochs: NonNegativeInt = 0,
        center_momentum: UnitInterval = 0.9,
        freeze_last_layer: NonNegativeInt = 1,
    ):
        super().__init__()
        self.temperatures = {
            "start": warmup_teacher_temperature,
            "end": teacher_temperature,
            "length": warmup_teacher_epochs,
        }
        # A tensor, so that a compiled forward is not compiled anew when it changes
        self.register_buffer("teacher_temperature", torch.tensor(0.0), persistent=False)
        self.freeze_last_layer = freeze_last_layer
        head = DINOHead(
            backbone.num_features,
            prototypes,
            layers=layers,
            hidden=hidden,
            bottleneck=bottleneck,
            use_bn=head_batch_norm,
            norm_last_layer=norm_last_layer,
        )
        self.online = Encoder(backbone, head)
        self.target = frozen_copy(self.online)  # stays in train mode: its BatchNorm uses its own batch statistics
        self.loss = DINOLoss(prototypes, student_temperature=student_temperature, center_momentum=center_momentum)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.teacher_temperature.fill_(linear_then_constant(epoch, **self.temperatures))

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            teacher = multi_crop(self.target, views[:2])  # (B, 2, K)
        return multi_crop(self.online, views), teacher  # (B, V, K)

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        student, teacher = embeddings
        loss, entropy = self.loss(student, teacher, self.teacher_temperature)
        uniform = math.log(teacher.shape[-1])
        stats = {
            "teacher_entropy_share": entropy / uniform,  # 1: uniform, 0: one prototype
            "prototypes_used": prototype_usage(teacher - self.loss.center.to(teacher.dtype)),  # no float32 copy of all
            "teacher_temperature": self.teacher_temperature,
            "chance_loss": torch.tensor(uniform),
            "embeddings": teacher.detach(),
        }
        return loss, stats

    def frozen(self) -> Iterable[nn.Parameter]:
        return self.online.head.last_layer.parameters() if self.epoch < self.freeze_last_layer else ()

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        self.loss.update()


@torch.no_grad()
def prototype_usage(teacher: Tensor) -> Tensor:
    """How evenly the images spread over the prototypes: exp(entropy) of the distribution of their largest centered
    logits (B, 2, K), over the most it could be, min(K, 2 B). 1: all different; near 0: one for all."""
    counts = torch.zeros(teacher.shape[-1], device=teacher.device)
    chosen = teacher.argmax(-1).flatten()  # (2 B,)
    share = counts.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype)) / len(chosen)  # (K,)
    return torch.special.entr(share).sum().exp() / min(len(share), len(chosen))
