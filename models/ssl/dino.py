"""DINO (Caron et al. 2021, "Emerging properties in self-supervised vision transformers"; official main_dino.py)."""

import math
from itertools import groupby

import torch
from torch import Tensor, nn

from losses.dino import DINOLoss
from models.heads import DINOHead
from models.ssl.method import Encoder, SSLMethod, frozen_copy, spread
from training.errors import UserError
from training.schedule import linear_then_constant


class DINO(SSLMethod):
    """The student matches, from any crop, what its own moving average says about the two global crops.

    Args:
        prototypes: K, outputs of the head; 65536 for ImageNet, 4096 or fewer for small sets.
        hidden, bottleneck: widths of the head's MLP and of the normalised vector before the prototypes.
        norm_last_layer: keep the prototypes at unit length (steadier; False can gain a little for ViT-S).
        head_batch_norm: BatchNorm in the head; official for the ResNet-50 release only.
        teacher_temperature: after the warm-up; above 0.07 training is unstable.
        warmup_teacher_temperature, warmup_teacher_epochs: linear from this value, over this many epochs.
        freeze_last_layer: epochs during which the prototypes stay as they are; raise it if the loss does not fall.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
        head_batch_norm: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_epochs: int = 0,
        center_momentum: float = 0.9,
        freeze_last_layer: int = 1,
    ):
        super().__init__()
        self.temperatures = {
            "start": warmup_teacher_temperature,
            "end": teacher_temperature,
            "length": warmup_teacher_epochs,
        }
        self.freeze_last_layer = freeze_last_layer
        head = DINOHead(
            backbone.num_features,
            prototypes,
            hidden=hidden,
            bottleneck=bottleneck,
            use_bn=head_batch_norm,
            norm_last_layer=norm_last_layer,
        )
        self.online = Encoder(backbone, head)
        self.target = frozen_copy(self.online)  # stays in train mode: its BatchNorm uses its own batch statistics
        self.loss = DINOLoss(prototypes, student_temperature=student_temperature, center_momentum=center_momentum)

    def forward(self, views: list[Tensor], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        if len(views) < 2:
            raise UserError("dino needs two global views, and the augment recipe makes 1: use augment=dino")
        batch = len(views[0])
        with torch.no_grad():
            teacher = multi_crop(self.target, views[:2])  # (2B, K)
        student = multi_crop(self.online, views)  # (V*B, K)
        temperature = linear_then_constant(self.epoch, **self.temperatures)
        loss, entropy = self.loss(
            student.view(len(views), batch, -1),  # (V, B, K)
            teacher.view(2, batch, -1),  # (2, B, K)
            temperature,
        )
        stats = {
            "teacher_entropy_share": entropy / math.log(teacher.shape[1]),  # 1: uniform, 0: one prototype
            "teacher_spread": spread(teacher),
            "teacher_temperature": torch.tensor(temperature),
        }
        return loss, stats

    def cancel_gradients(self) -> None:
        # None and not zero, so that AdamW's weight decay leaves the prototypes alone as well
        if self.epoch < self.freeze_last_layer:
            for parameter in self.online.head.last_layer.parameters():
                parameter.grad = None


def multi_crop(network: Encoder, views: list[Tensor]) -> Tensor:
    """One backbone pass for each run of equally large views, then one head pass over everything: V x (B, 3, h, w) ->
    (V*B, K). BatchNorm therefore sees one resolution at a time (official MultiCropWrapper)."""
    runs = [torch.cat(list(run)) for _, run in groupby(views, key=lambda view: view.shape[-2:])]
    return network.head(torch.cat([network.backbone(run) for run in runs]))
