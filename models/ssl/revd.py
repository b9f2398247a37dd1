"""Reverse distillation as pretraining, after RD4AD (Deng & Li 2022): the teacher learns, too."""

import torch
from torch import Tensor, nn

from losses.feature_distance import flattened_cosine
from models.backbones.stages import train_stages
from models.reverse_distillation import Student, build_student
from models.ssl.method import MANY, Encoder, SSLMethod


class TeacherStudent(Encoder):
    """The teacher and, as its head, the student that rebuilds the teacher's stages 1-3 from a narrow embedding."""

    def __init__(self, teacher: nn.Module, student: Student):
        bn, decoder = build_student(teacher, student)
        super().__init__(teacher, nn.ModuleDict({"bn": bn, "decoder": decoder}))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) -> stages 1-3 of both, twice [(B, C_i, H_i, W_i)]."""
        stages = self.backbone.forward_stages(x, last=3)
        return stages, self.head["decoder"](self.head["bn"](stages))


class RevD(SSLMethod):
    """A backbone and a student that rebuilds its features are trained together, by RD4AD's loss, without labels.

    The backbone is then kept, to be RD4AD's frozen teacher of a fresh student, or for PatchCore. Gradients of the loss
    reach both, the backbone at a lower learning rate and a lower one still in its early layers: set `optim.layer_decay`
    (0.1 with a ResNet: a tenth at stage 3, a hundredth at stage 2, ...; in a MobileNetV2 each of 14 blocks counts, so
    take 0.7). Stage 4 is not used and stays as it is: the backbone is for detectors that read stages 1 to 3, and the
    kNN metric, which is of stage 4, tells little.

    This is not in the paper, where the teacher is fixed. A backbone whose features are all alike would be rebuilt
    best: `embedding/std` falls to 0 then; lower `optim.layer_decay` or stop earlier. Views are images
    of their own: one is enough (augment=none).

    Args:
        backbone: the teacher, a CNN whose stages 1-3 halve each other.
        student: `auto`, the teacher's own kind (a ResNet-18 for what is no ResNet), or the name of a ResNet whose
            blocks and depths it gets.

    Raises:
        UserError: a backbone or a student that does not do.
    """

    projects = False
    takes = (1, MANY, "none")

    def __init__(self, backbone: nn.Module, *, student: Student = "auto"):
        super().__init__()
        self.online = TeacherStudent(backbone, student)
        train_stages(backbone, last=3)

    def embed(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        teacher, student = self.online(torch.cat(views))  # stages of (V B, 3, H, W)
        return *teacher, *student

    def criterion(self, embeddings: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        teacher, student = embeddings[:3], embeddings[3:]
        losses = flattened_cosine(teacher, student)  # (3,)
        stats = {f"loss_stage{number}": loss for number, loss in enumerate(losses.detach(), 1)}
        return losses.sum(), stats | {"embeddings": teacher[-1].detach().mean((2, 3))[:, None]}  # (V B, 1, C)
