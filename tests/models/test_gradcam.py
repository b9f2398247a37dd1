"""Grad-CAM against the equations written out, with derivatives by finite differences, one image at a time."""

import numpy as np
import torch
from torch import Tensor

from models.gradcam import grad_cam


def target(activations: Tensor) -> Tensor:
    """Something that no two places and channels enter alike: (B, C, h, w) -> (B,)."""
    weights = torch.linspace(-1, 1, activations[0].numel(), dtype=activations.dtype).view_as(activations[0])
    return (weights * activations).sum((1, 2, 3)).tanh() + (activations * weights.flip(0)).square().sum((1, 2, 3))


def by_equations(activations: Tensor, step: float = 1e-5) -> np.ndarray:
    """Equations 1 and 2 for one image (C, h, w) in float64."""
    channels, height, width = activations.shape
    heat = np.zeros((height, width))
    for c in range(channels):
        derivatives = []
        for y in range(height):
            for x in range(width):
                ends = [activations.clone(), activations.clone()]
                ends[0][c, y, x] += step
                ends[1][c, y, x] -= step
                high, low = (float(target(end[None])[0]) for end in ends)
                derivatives.append((high - low) / (2 * step))
        heat += np.mean(derivatives) * activations[c].numpy()
    return np.maximum(heat, 0)


def test_maps_are_the_equations_of_every_image_by_itself():
    values = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    activations = values.clone().requires_grad_()
    maps = grad_cam(activations, target(activations))
    expected = np.stack([by_equations(each) for each in values])
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-8)
    assert not maps.requires_grad and activations.grad is None
    for i in range(5):
        alone = values[i : i + 1].clone().requires_grad_()
        torch.testing.assert_close(grad_cam(alone, target(alone)), maps[i : i + 1], rtol=0, atol=1e-12)


def test_no_images_and_one_place():
    none = torch.empty(0, 4, 3, 2).requires_grad_()
    assert grad_cam(none, none.square().sum((1, 2, 3))).shape == (0, 3, 2)
    one = torch.full((2, 1, 1, 1), 3.0).requires_grad_()
    assert grad_cam(one, one.sum((1, 2, 3))).tolist() == [[[3.0]], [[3.0]]]
    assert grad_cam(one, -one.sum((1, 2, 3))).tolist() == [[[0.0]], [[0.0]]]  # it lowers the target
