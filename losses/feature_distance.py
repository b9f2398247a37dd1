"""Distance of a student's feature maps from its teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.precision import at_least_float32


@at_least_float32
def flattened_cosine(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """1 - cosine similarity of whole feature maps, one value per layer, (L,); their sum is RD4AD's loss.

    loss_l = mean over images b of 1 - <t_bl, s_bl> / (|t_bl| |s_bl|), with t_bl, s_bl the maps flattened to C H W.

    Deng & Li 2022, "Anomaly detection via reverse distillation from one-class embedding", as in the official main.py.
    The paper's eqs. 1-2 take the cosine at every position and average; the authors' code, and so every number they
    report, takes one cosine per image and layer, which weighs positions by their feature norms.
    Gradients flow into both arguments; detach the teacher's. Computed in at least float32 with
    autocast off. A mean over this process's images: equal batches on all ranks make DDP's average the global mean.

    Args:
        teacher, student: L maps each, pairwise (B, C_l, H_l, W_l).
    Raises:
        ValueError: the two lists differ in length or a pair in shape.
    """
    shapes = [[tuple(feature.shape) for feature in features] for features in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"teacher's maps {shapes[0]} and student's maps {shapes[1]} differ")
    losses = [1 - F.cosine_similarity(t.flatten(1), s.flatten(1)).mean() for t, s in zip(teacher, student)]
    return torch.stack(losses)
