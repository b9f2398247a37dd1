"""Flattened cosine distance and its gradient against a plain float64 loop."""

import pytest
import torch

from losses.feature_distance import flattened_cosine


def plain(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
    """Image by image, with nothing but sums of products."""
    layers = []
    for t, s in zip(teacher, student):
        total = 0
        for image in range(len(t)):
            dot = (t[image] * s[image]).sum()
            total = total + 1 - dot / ((t[image] ** 2).sum().sqrt() * (s[image] ** 2).sum().sqrt())
        layers.append(total / len(t))
    return torch.stack(layers)


def maps(dtype: torch.dtype = torch.float32, batch: int = 3) -> list[torch.Tensor]:
    return [torch.randn(batch, c, h, w, dtype=dtype) for c, h, w in ((4, 8, 6), (7, 4, 3), (9, 1, 1))]


@pytest.mark.parametrize("batch", [1, 5])
def test_value_and_gradient_equal_the_plain_loop(batch):
    teacher, student = maps(torch.float64, batch), [x.requires_grad_() for x in maps(torch.float64, batch)]
    ours, loop = flattened_cosine(teacher, student), plain(teacher, student)
    assert ours.shape == (3,) and torch.allclose(ours, loop, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sum(), student), torch.autograd.grad(loop.sum(), student)):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_float32_gradient_is_that_of_float64():
    teacher, student = maps(), [x.requires_grad_() for x in maps()]
    gradients = torch.autograd.grad(flattened_cosine(teacher, student).sum(), student)
    exact = [x.detach().double().requires_grad_() for x in student]
    expected = torch.autograd.grad(plain([x.double() for x in teacher], exact).sum(), exact)
    for a, b in zip(gradients, expected):
        assert torch.allclose(a.double(), b, rtol=0, atol=1e-6)


def test_it_is_one_cosine_per_image_not_per_position():
    teacher = [torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])]  # (1, 2, 1, 2): both positions point along channel 0
    student = [torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])]  # the first position is wrong, the second right
    assert torch.allclose(flattened_cosine(teacher, student), torch.tensor([1 - 3 / 20**0.5]))  # per position: 0.5


def test_same_opposite_and_orthogonal():
    x = maps()
    assert flattened_cosine(x, [3 * each for each in x]).abs().max() < 1e-6
    assert torch.allclose(flattened_cosine(x, [-each for each in x]), torch.full((3,), 2.0))
    flat = torch.zeros(1, 1, 2, 2)
    left, right = flat.clone(), flat.clone()
    left[..., 0], right[..., 1] = 1, 1
    assert torch.equal(flattened_cosine([left], [right]), torch.ones(1))


def test_half_precision_and_autocast_are_computed_in_float32():
    teacher, student = maps(), maps()
    expected = flattened_cosine(teacher, student)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flattened_cosine(teacher, student), expected)
    half = [x.bfloat16() for x in teacher], [x.bfloat16() for x in student]
    assert flattened_cosine(*half).dtype == torch.float32
    assert torch.equal(flattened_cosine(*half), flattened_cosine(*[[x.float() for x in side] for side in half]))


def test_channels_last_changes_nothing():
    teacher, student = maps(), maps()
    last = [x.to(memory_format=torch.channels_last) for x in student]
    assert torch.allclose(flattened_cosine(teacher, last), flattened_cosine(teacher, student), atol=1e-6)


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(3, 9, 1, 1\)"):
        flattened_cosine(maps(), maps()[:2])
    with pytest.raises(ValueError, match="differ"):
        flattened_cosine(maps(), maps(batch=1))
