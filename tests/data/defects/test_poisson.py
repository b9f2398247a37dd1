"""The sine solver against a dense linear solve, and rectangles of several sizes in one batch against each alone."""

import numpy as np
import pytest
import torch

from data.defects.poisson import laplacian, mixed_divergence, sines, solve


def dense(target: np.ndarray, divergence: np.ndarray) -> np.ndarray:
    """(h, w) float64: one equation per pixel, by Gaussian elimination."""
    height, width = target.shape
    matrix, right = np.eye(height * width), target.ravel().copy()
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            row = y * width + x
            matrix[row, row] = -4
            matrix[row, [row - 1, row + 1, row - width, row + width]] = 1
            right[row] = divergence[y, x]
    return np.linalg.solve(matrix, right).reshape(height, width)


@pytest.mark.parametrize("shape", [(3, 3), (3, 9), (4, 4), (12, 7), (21, 30), (32, 32)])
def test_equals_a_dense_solve(shape):
    target, divergence = (torch.rand(2, 3, *shape, dtype=torch.float64) * 255 for _ in range(2))
    expected = np.stack([[dense(*pair) for pair in zip(*item)] for item in zip(target.numpy(), divergence.numpy())])
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(solve(target, divergence).numpy() - expected).max() <= 1e-6
    single = solve(target.float(), divergence.float())
    assert single.dtype == torch.float32 and np.abs(single.numpy() - expected).max() <= 1e-4 * scale


def test_solves_the_equation_on_a_large_patch():
    target, divergence = torch.rand(1, 1, 200, 256, dtype=torch.float64), torch.randn(1, 1, 200, 256).double()
    found = solve(target, divergence)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(laplacian(found)[inside], divergence[inside], atol=1e-9, rtol=0)
    assert torch.equal(found[..., 0, :], target[..., 0, :]) and torch.equal(found[..., -1], target[..., -1])


def test_rectangles_of_all_sizes_share_a_batch():
    extents = torch.tensor([[3, 3], [20, 17], [2, 9], [1, 1], [11, 4], [7, 17]])
    target, divergence = (torch.rand(6, 2, 20, 17, dtype=torch.float64) for _ in range(2))
    found = solve(target, divergence, extents)
    for one, goal, flow, (h, w) in zip(found, target, divergence, extents.tolist()):
        expected = goal.clone()
        if min(h, w) >= 3:
            expected[:, :h, :w] = torch.from_numpy(
                np.stack([dense(*pair) for pair in zip(goal[:, :h, :w].numpy(), flow[:, :h, :w].numpy())])
            )
        torch.testing.assert_close(one, expected, atol=1e-9, rtol=0)


def test_the_targets_own_gradients_give_the_target_back():
    target = torch.rand(2, 3, 15, 12, dtype=torch.float64)
    torch.testing.assert_close(solve(target, laplacian(target)), target, atol=1e-12, rtol=0)
    torch.testing.assert_close(mixed_divergence(torch.zeros_like(target), target), laplacian(target))
    torch.testing.assert_close(mixed_divergence(3 * target, target), laplacian(3 * target))


def test_mixed_divergence_takes_the_stronger_difference_of_each_edge():
    source, target = torch.rand(9, 8, dtype=torch.float64).numpy(), torch.rand(9, 8, dtype=torch.float64).numpy()
    ours = mixed_divergence(torch.from_numpy(source)[None, None], torch.from_numpy(target)[None, None])[0, 0]
    for y in range(1, 8):
        for x in range(1, 7):
            total = 0.0
            for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                steps = [image[y + dy, x + dx] - image[y, x] for image in (source, target)]
                total += steps[0] if abs(steps[0]) > abs(steps[1]) else steps[1]
            assert abs(total - float(ours[y, x])) < 1e-12
    assert not ours[0].any() and not ours[:, -1].any()


@pytest.mark.parametrize("inner", [1, 2, 7, 63])
def test_sines_are_their_own_inverse(inner):
    matrix, values = sines(torch.tensor([inner]), 66, torch.float64)
    part = matrix[0, 1 : inner + 1, 1 : inner + 1]
    torch.testing.assert_close(part @ part, torch.eye(inner, dtype=torch.float64), atol=1e-12, rtol=0)
    second = 2 * torch.eye(inner, dtype=torch.float64)
    second -= torch.diag(torch.ones(inner - 1).double(), 1) + torch.diag(torch.ones(inner - 1).double(), -1)
    torch.testing.assert_close(part @ second @ part, values[0, 1 : inner + 1].diag(), atol=1e-12, rtol=0)
    assert not matrix[0, 0].any() and not matrix[0, inner + 1 :].any()
