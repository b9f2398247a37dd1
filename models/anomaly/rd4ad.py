"""RD4AD (Deng & Li 2022, "Anomaly detection via reverse distillation from one-class embedding")."""

import torch.nn.functional as F
from torch import Tensor, nn

from losses.feature_distance import flattened_cosine
from models.anomaly.detector import Detector, Findings
from models.anomaly.maps import ImageScore, image_score, peak, smooth_inside, upsample
from models.reverse_distillation import Student, build_student
from runtime.errors import UserError


class RD4AD(Detector):
    """A decoder learns to rebuild a frozen teacher's features from a narrow embedding; where it fails is anomalous.

    Networks, initialization, loss and score of the official code. `bn` and `decoder` carry its parameter names, so that
    `detector.weights=<an official checkpoint> epochs=0` tests one. One difference: the teacher is detached, which
    changes no number (the official one computes gradients that it never applies).
    The official recipe: 256 x 256 images, batch 16, Adam with learning rate 5e-3 and betas (0.5, 0.999), 200 epochs.

    Args:
        backbone: the teacher, a CNN whose stages 1-3 halve each other; it is frozen and stays in eval mode.
        student: `auto`, the teacher's own kind as in the official code (a ResNet-18 for what is no ResNet), or the name
            of a ResNet whose blocks and depths it gets; its channels are always the teacher's.
        image_score: what of an image's map is its score; the paper's is `max`.

    Raises:
        UserError: a backbone or a student that does not do, or, at the first batch, images whose side is no multiple
            of 32 (ImageNet stem).
    """

    by_gradient = True

    def __init__(self, backbone: nn.Module, *, student: Student = "auto", image_score: ImageScore = "max"):
        super().__init__(backbone, (1, 2, 3))
        self.image_score = image_score
        self.bn, self.decoder = build_student(backbone, student)

    def load_trained(self, state: dict, path: str) -> list[str]:
        """Also an official checkpoint, {"bn": ..., "decoder": ...}: the teacher is then the given backbone. What `bn`
        calls memory, in files of the time before the release, the official test leaves out as well."""
        unused = []
        if all(isinstance(state.get(part), dict) for part in ("bn", "decoder")):
            parts = {"backbone": self.backbone.state_dict(), "bn": state["bn"], "decoder": state["decoder"]}
            state = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
            unused = [name for name in state if name.startswith("bn.") and "memory" in name]
            state = {name: value for name, value in state.items() if name not in unused}
        return super().load_trained(state, path) + unused

    def networks(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Stages 1-3 of the teacher and the student's version of them, twice [(B, C_i, H_i, W_i)] in float32."""
        teacher = self.features(images)
        student = [feature.float() for feature in self.decoder(self.bn(teacher))]
        if student[0].shape != teacher[0].shape:
            raise UserError(
                f"rd4ad halves images 5 times and doubles them back, which {tuple(images.shape[-2:])} does not bear: "
                "set data.size to a multiple of 32 (of 8 with stem=cifar)"
            )
        return teacher, student

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on normalized (B, 3, S, S) normal images: flattened cosine summed over stages 1-3; stats name each."""
        losses = flattened_cosine(*self.networks(images))  # (3,)
        return losses.sum(), {f"loss_stage{stage}": loss for stage, loss in zip(self.stages, losses.detach())}

    def measure(
        self,
        outputs: tuple[list[Tensor], list[Tensor]],
        size: tuple[int, int],
        valid: Tensor | None = None,
        leave_out: None = None,  # noqa: ARG002
    ) -> Findings:
        # 3 x (B, H_i, W_i)
        distances = [1 - F.cosine_similarity(teacher, student) for teacher, student in zip(*outputs)]
        maps = sum(upsample(distance, size, align_corners=True) for distance in distances)  # (B, H, W)
        maps = smooth_inside(maps, valid)  # what convolutions saw of padding is in the features
        return Findings(image_score(maps, valid, self.image_score), maps, peak(maps, valid))
