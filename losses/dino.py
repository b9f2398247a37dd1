"""DINO's loss: cross-entropy between sharpened, centred teacher outputs and student outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import all_reduce_sum, world_size


class DINOLoss(nn.Module):
    """Self-distillation with no labels (Caron et al. 2021, eq. 1-4; official main_dino.py DINOLoss).

        loss = mean over pairs (i, v), v != i, of mean over B of  -sum_k q_ik log p_vk
        q_i = softmax((teacher_i - center) / teacher_temperature),  p_v = softmax(student_v / student_temperature)

    Views 0 and 1 are the global crops that the teacher sees as well; there are 2 (V - 1) pairs. After the loss the
    centre moves: center <- m center + (1 - m) mean of the raw teacher outputs over pictures, global views and ranks.
    A collapsed network shows loss = ln K. Computed in at least float32 with autocast off.
    """

    def __init__(self, prototypes: int, *, student_temperature: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temperature: float) -> tuple[Tensor, Tensor]:
        """
        Args:
            student: (V, B, K) raw outputs, global views first.
            teacher: (2, B, K) raw outputs of the global views; no gradient flows into it.
            teacher_temperature: of this epoch.

        Returns:
            The scalar loss, and the mean entropy of the teacher's q in nats (ln K: uniform, 0: one prototype).
        """
        if student.ndim != 3 or teacher.shape != (2, *student.shape[1:]) or len(student) < 2:
            raise ValueError(
                f"DINOLoss needs (V, B, K) and (2, B, K), not {tuple(student.shape)} {tuple(teacher.shape)}"
            )
        views, batch, _ = student.shape
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            teacher = teacher.detach().to(dtype)
            q = F.softmax((teacher - self.center) / teacher_temperature, dim=-1)  # (2, B, K)
            log_p = F.log_softmax(student.to(dtype) / self.student_temperature, dim=-1)  # (V, B, K)
            pairs = -torch.einsum("ibk,vbk->iv", q, log_p) / batch  # (2, V)
            loss = (pairs.sum() - pairs.diagonal().sum()) / (2 * (views - 1))
            entropy = torch.special.entr(q).sum(dim=-1).mean()
            if self.training:
                self._move_center(teacher)
        return loss, entropy

    @torch.no_grad()
    def _move_center(self, teacher: Tensor) -> None:
        total = all_reduce_sum(teacher.sum(dim=(0, 1)))  # (K,)
        mean = total / (teacher.shape[0] * teacher.shape[1] * world_size())
        self.center.lerp_(mean.to(self.center.dtype)[None], 1 - self.center_momentum)
