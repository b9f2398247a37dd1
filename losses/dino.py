"""DINO's loss: cross-entropy between sharpened, centered teacher and student outputs, a few images at a time."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from runtime.distributed import all_reduce_sum, world_size

# Student logits in float32 at a time: 8 MiB, and work takes five such tensors; the bfloat16 logits of a batch of 64 are
# 80 MiB (V = 10, K = 65536). Smaller chunks are no slower on a CPU, but on a GPU
# they mean more kernels, each too short to be worth its launch.
CHUNK = 2**21
# The stored n p - q lies between -2 and 2. Times 2^14 it fits float16, which ends at 65504, and stays above 0 down to
# 4e-12; unscaled only down to 6e-8, where 1 / K is 1.5e-5. Wider types do not need it.
HEADROOM = 2.0**14


class DINOLoss(nn.Module):
    """Self-distillation with no labels (Caron et al. 2021, eq. 1-4; official main_dino.py DINOLoss).

        loss = mean over pairs (i, v), v != i, of mean over B of  -sum_k q_ik log p_vk
        q_i = softmax((teacher_i - center) / teacher_temperature),  p_v = softmax(student_v / student_temperature)

    Views 0 and 1 are the global crops that the teacher sees as well; there are 2 (V - 1) pairs. The center moves when
    the training loop calls `update`, once after the optimizer's step: center <- m center + (1 - m) mean of the raw
    teacher outputs over images, global views and ranks. A collapsed network shows loss = ln K.

    Computed in at least float32 with autocast off, in chunks of images: log p, p and q of a large batch never
    exist at once. The gradient is computed with the loss, as fused cross-entropy kernels do,

        d loss / d student_v = (n_v p_v - sum of q_i, i != v) / (2 (V - 1) B student_temperature),  n_v = #{i != v}

    and waits in the student's type for the backward pass, which multiplies it by the incoming gradient, so a narrow
    type rounds it twice. It cannot be differentiated again. torch.compile breaks its graph here and runs `forward` as
    it is.
    """

    center: Tensor  # (1, K)

    def __init__(self, prototypes: int, *, student_temperature: float = 0.1, center_momentum: float = 0.9):
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, prototypes))
        self._batch_mean: Tensor | None = None  # (K,), left by the last forward in training mode for `update`

    @torch.compiler.disable  # compiled, the loop would be unrolled, and all chunks might be in memory at once
    def forward(self, student: Tensor, teacher: Tensor, teacher_temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            student: (B, V, K) raw outputs, global views first; may be a transposed (V, B, K). B equal on all ranks.
            teacher: (B, 2, K) raw outputs of the global views; no gradient flows into it.
            teacher_temperature: of this epoch; a 0-d tensor if it changes under torch.compile, which recompiles for
                every new number.

        Returns:
            The scalar loss, and the mean entropy of the teacher's q in nats (ln K: uniform, 0: one prototype).
        """
        batch, views, prototypes = student.shape if student.ndim == 3 else (0, 0, 0)
        if batch < 1 or views < 2 or prototypes != self.center.shape[1] or teacher.shape != (batch, 2, prototypes):
            raise ValueError(
                f"DINOLoss needs (B, V, K) and (B, 2, K) with B > 0, V > 1, K = {self.center.shape[1]}, "
                f"not {tuple(student.shape)} {tuple(teacher.shape)}"
            )
        differentiable = student.requires_grad and torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
            center = self.center.to(dtype)
            losses, entropies = torch.empty(2, batch, dtype=dtype, device=student.device)
            total = torch.zeros(prototypes, dtype=dtype, device=student.device)
            gradient = torch.empty_like(student) if differentiable else None  # with the student's strides
            for rows in _chunks(student):
                raw = teacher[rows].to(dtype)  # (b, 2, K)
                total += raw.sum(dim=(0, 1))
                log_q = F.log_softmax((raw - center) / teacher_temperature, dim=-1)
                q = log_q.exp()
                entropies[rows] = -(q * log_q).sum(dim=-1).mean(dim=1)
                # The sum of q_i over i != v; by a matrix product it could be rounded to TF32
                targets = torch.cat([q.flip(1), q.sum(dim=1, keepdim=True).expand(-1, views - 2, -1)], dim=1)
                log_p = F.log_softmax(student[rows].to(dtype) / self.student_temperature, dim=-1)  # (b, V, K)
                losses[rows] = -(targets * log_p).sum(dim=(1, 2))
                if gradient is not None:
                    p = log_p.exp_()
                    p[:, 2:] *= 2  # n_v
                    gradient[rows] = p.sub_(targets).mul_(HEADROOM)
            pairs = 2 * (views - 1)
            loss, entropy = losses.mean() / pairs, entropies.mean()
            if self.training:
                self._batch_mean = all_reduce_sum(total) / (2 * batch * world_size())
        if differentiable:
            loss = _WithGradient.apply(student, loss, gradient, 1 / (pairs * batch * self.student_temperature))
        return loss, entropy

    @torch.no_grad()
    def update(self) -> None:
        """Move the center by the batch of the last forward in training mode, at most once for each."""
        if self._batch_mean is not None:
            self.center.lerp_(self._batch_mean.to(self.center.dtype)[None], 1 - self.center_momentum)
            self._batch_mean = None


class _WithGradient(torch.autograd.Function):
    """The loss as a function of the student (B, V, K), whose gradient is factor * gradient / HEADROOM."""

    @staticmethod
    def forward(ctx, student: Tensor, loss: Tensor, gradient: Tensor, factor: float) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient)
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = incoming * (ctx.factor / HEADROOM)  # 0-d, at least float32: it can be smaller than float16 can hold
        result = torch.empty_like(gradient)
        for rows in _chunks(gradient):
            result[rows] = gradient[rows].to(scale.dtype) * scale
        return result, None, None, None


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of (B, V, K) along B: as many images as CHUNK numbers hold, at least one."""
    images = max(1, CHUNK // (x.shape[1] * x.shape[2]))
    return (slice(start, start + images) for start in range(0, len(x), images))
