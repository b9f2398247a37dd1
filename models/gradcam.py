"""Grad-CAM (Selvaraju et al. 2017, "Visual explanations from deep networks via gradient-based localization")."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_cam(activations: Tensor, targets: Tensor) -> Tensor:
    """`grad_cams` of one layer's activations (B, C, h, w): (B, h, w)."""
    return grad_cams([activations], targets)[0]


def grad_cams(layers: list[Tensor], targets: Tensor) -> list[Tensor]:
    """Where each layer's activations raise each image's target (equations 1 and 2): (B, h, w), 0 where they lower it.

        alpha_c = mean over h, w of d target / d A_c,  map = ReLU(sum over c of alpha_c A_c)

    One backward pass serves all images: nothing of a target may depend on another image's activations, so the
    network has to be in eval mode.

    Args:
        layers: A of each, (B, C, h, w), part of the graph that leads to the targets. targets: (B,).
    """
    maps = []
    for activations, gradients in zip(layers, torch.autograd.grad(targets.sum(), layers)):
        weights = gradients.mean((2, 3))  # alpha, (B, C)
        maps.append(F.relu((weights[:, :, None, None] * activations.detach()).sum(1)))  # (B, h, w)
    return maps
