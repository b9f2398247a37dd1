"""Warps against a plain loop, the transformer against its formula and the official layers, the 22 support views."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.anomaly.regad_networks import N_VIEWS, SpatialTransformer, inverse, support_views, warp


def reflected(place: float, size: int) -> float:
    """A coordinate in pixels, folded back at the outer edges -1/2 and size - 1/2, then kept between pixel centres."""
    place = (place + 0.5) % (2 * size)
    return min(max(min(place, 2 * size - place) - 0.5, 0), size - 1)


def warp_by_loop(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """x (C, H, W), theta (2, 3) on coordinates from -1 to 1 between the outer edges."""
    _, height, width = x.shape
    out = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            u, v = theta @ [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1, 1]
            column, row = reflected((u + 1) * width / 2 - 0.5, width), reflected((v + 1) * height / 2 - 0.5, height)
            top, left = int(row), int(column)
            down, right = row - top, column - left
            below, beside = min(top + 1, height - 1), min(left + 1, width - 1)
            out[:, i, j] = (1 - down) * ((1 - right) * x[:, top, left] + right * x[:, top, beside])
            out[:, i, j] += down * ((1 - right) * x[:, below, left] + right * x[:, below, beside])
    return out


@pytest.mark.parametrize("size", [(6, 9), (1, 4), (5, 5)])
def test_warp_is_the_loop(size):
    x, theta = torch.randn(4, 3, *size, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    expected = np.stack([warp_by_loop(a, t) for a, t in zip(x.numpy(), theta.numpy())])
    np.testing.assert_allclose(warp(x, theta).numpy(), expected, atol=1e-12)
    assert warp(x.float(), theta.float()).dtype == torch.float32


def test_warp_is_exact_in_every_precision():
    """In half precision the grid itself would be off by pixels."""
    x, theta = torch.randn(2, 3, 56, 56), torch.tensor([[1.0, 0.0, 0.01], [0.0, 1.0, 0.0]])
    expected = warp(x, theta)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(warp(x, theta), expected)
        torch.testing.assert_close(warp(x.bfloat16(), theta), expected, atol=0.02, rtol=0.02)


def transformer(side: int = 4) -> SpatialTransformer:
    """In float64 and eval mode, with weights and BatchNorm statistics that do something."""
    torch.manual_seed(1)
    module = SpatialTransformer(8, side).double().eval()
    nn.init.normal_(module.fc[2].weight, std=0.03)
    for norm in (module.conv[1], module.conv[5]):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    return module


def test_forward_is_the_formula():
    module, x = transformer(), torch.randn(3, 8, 14, 14, dtype=torch.float64)
    warped, theta = module(x)
    state, seen = module.state_dict(), x
    for conv, norm in (("conv.0", "conv.1"), ("conv.4", "conv.5")):
        seen = F.conv2d(seen, state[f"{conv}.weight"], padding=1)
        mean, var = (state[f"{norm}.running_{kind}"][:, None, None] for kind in ("mean", "var"))
        seen = ((seen - mean) / (var + 1e-5).sqrt()).clamp(min=0)  # weights 1 and biases 0
        padded = F.pad(seen, (1, 1, 1, 1), value=-torch.inf)
        height, width = ((n + 1) // 2 for n in seen.shape[2:])
        cells = [padded[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] for i in range(3) for j in range(3)]
        least = [min(c.shape[2] for c in cells), min(c.shape[3] for c in cells)]
        seen = torch.stack([c[:, :, : least[0], : least[1]] for c in cells]).amax(0)
    assert seen.shape == (3, 16, 4, 4)
    hidden = (seen.flatten(1) @ state["fc.0.weight"].T + state["fc.0.bias"]).clamp(min=0)
    numbers = (hidden @ state["fc.2.weight"].T + state["fc.2.bias"]).numpy()
    assert np.abs(numbers - [0, 1, 1]).max() > 0.05  # away from the identity
    for b, (angle, along, across) in enumerate(numbers):
        expected = np.array(
            [[math.cos(angle) * along, -math.sin(angle), 0], [math.sin(angle), math.cos(angle) * across, 0]]
        )
        np.testing.assert_allclose(theta[b].detach().numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(warped[b].detach().numpy(), warp_by_loop(x[b].numpy(), expected), atol=1e-10)


@pytest.mark.parametrize(("channels", "side", "maps"), [(64, 14, 56), (128, 7, 28), (256, 4, 14)])
def test_it_has_the_official_layers_and_starts_as_the_identity(channels, side, maps):
    module = SpatialTransformer(channels, side)
    convolutions = 64 * channels * 9 + 2 * 64 + 16 * 64 * 9 + 2 * 16
    linear = (16 * side * side + 1) * 1024 + 1025 * 3
    assert sum(p.numel() for p in module.parameters()) == convolutions + linear
    names = ["conv.0.weight", "conv.1.weight", "conv.1.bias", "conv.4.weight", "conv.5.weight", "conv.5.bias"]
    names += ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    assert [name for name, _ in module.named_parameters()] == names
    x = torch.randn(2, channels, maps, maps)
    assert module.conv(x).shape == (2, 16, side, side)  # so pooling changes nothing at 224 x 224
    warped, theta = module(x)
    assert torch.equal(theta, torch.eye(2, 3).expand(2, 2, 3))
    torch.testing.assert_close(warped, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (3, 20), (2, 2)])
def test_maps_of_other_sizes_are_pooled(size):
    module, x = transformer(side=7).train(), torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    warped, _ = module(x)
    warped.square().sum().backward()
    assert warped.shape == x.shape and all(p.grad.abs().sum() > 0 for p in module.fc.parameters())


def test_angle_and_scales_are_exact_in_every_precision():
    module, x = transformer().float(), torch.randn(4, 8, 14, 14)
    nn.init.zeros_(module.fc[2].weight)
    nn.init.constant_(module.fc[2].bias, 1.0013)
    with torch.autocast("cpu", torch.bfloat16):
        _, theta = module(x)
    assert theta.dtype == torch.float32
    torch.testing.assert_close(theta[0, 1, 0].item(), math.sin(1.0013), atol=1e-6, rtol=0)


def test_inverse_is_that_of_the_square_matrix():
    theta = F.pad(torch.randn(5, 2, 2, dtype=torch.float64), (0, 1))
    square = np.concatenate([theta.numpy(), np.tile([[[0, 0, 1]]], (5, 1, 1))], axis=1)
    np.testing.assert_allclose(inverse(theta).numpy(), np.linalg.inv(square)[:, :2], atol=1e-10)
    assert not inverse(torch.zeros(1, 2, 3)).isfinite().all()  # and no exception


def test_support_views_are_the_official_ones():
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    views = [view.numpy() for view in support_views(images)]
    assert len(views) == N_VIEWS == 22 and all(view.shape == (2, 3, 12, 12) for view in views)
    expected = [images.numpy()]

    def looped(theta: list) -> np.ndarray:
        return np.stack([warp_by_loop(image, np.array(theta)) for image in images.numpy()])

    for angle in np.array([-1 / 4, -3 / 16, -1 / 8, -1 / 16, 1 / 16, 1 / 8, 3 / 16, 1 / 4]) * np.pi:
        expected.append(looped([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]))
    for a, b in ((2, 2), (-2, 2), (-2, -2), (2, -2), (1, 1), (-1, 1), (-1, -1), (1, -1)):
        expected.append(looped([[1, 0, a / 10], [0, 1, b / 10]]))
    expected.append(images.numpy()[..., ::-1])
    grey = images.numpy().transpose(0, 2, 3, 1) @ [0.299, 0.587, 0.114]
    expected.append(np.stack([grey] * 3, 1))
    for i, (ours, theirs) in enumerate(zip(views, expected)):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 if i == 18 else 1e-6, err_msg=str(i))
    quarters = {1: views[19], 2: views[20], 3: views[21]}
    for count, view in quarters.items():
        np.testing.assert_allclose(view, torch.rot90(images, count, (2, 3)).numpy(), atol=1e-6)


def test_support_views_of_images_that_are_not_square():
    views = list(support_views(torch.rand(1, 3, 8, 14)))
    assert all(view.shape == (1, 3, 8, 14) and view.min() >= 0 and view.max() <= 1 for view in views)


def test_gradients_of_a_warp():
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([[[0.83, -0.21, 0.02], [0.17, 0.91, -0.03]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(warp, (x, theta), atol=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_warp_to_nowhere_is_nan_and_spares_the_others(broken):
    """With NaN in its grid the backward of torch's grid_sample ends the process."""
    x = torch.rand(3, 2, 8, 8, requires_grad=True)
    theta = torch.eye(2, 3).repeat(3, 1, 1)
    theta[1, 0, 1] = broken
    theta.requires_grad_()
    out = warp(x, theta)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], x[[0, 2]])
    out.sum().backward()
    assert x.grad[[0, 2]].isfinite().all() and theta.grad[[0, 2]].isfinite().all()
