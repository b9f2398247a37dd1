"""at_least_float32: what it promotes, what it leaves alone, and what autocast can still do inside."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.precision import at_least_float32

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@at_least_float32
def product(a, b=None, *, others=()):
    """a b^T, and the dtypes that the function saw."""
    b = a if b is None else b
    return a @ b.T, [a.dtype, b.dtype, *(x.dtype for x in others)]


@pytest.mark.parametrize(
    ("a", "b", "inside"),
    [(HALF, HALF, SINGLE), (HALF, SINGLE, SINGLE), (SINGLE, torch.float16, SINGLE), (HALF, DOUBLE, DOUBLE)],
)
@pytest.mark.parametrize("enabled", [False, True])
def test_one_type_for_all_that_is_float32_at_least(a, b, inside, enabled):
    left, right = torch.randn(3, 5).to(a), torch.randn(4, 5).to(b)
    with torch.autocast("cpu", HALF, enabled=enabled):
        found, seen = product(left, b=right)
        assert (left @ left.T).dtype == (HALF if enabled else a)  # autocast is on again
    assert seen == [inside, inside]
    assert torch.equal(found, left.to(inside) @ right.to(inside).T)


def test_lists_and_tuples_are_promoted_and_other_types_are_left_alone():
    labels, mask = torch.arange(3), torch.ones(2, dtype=torch.bool)
    _, seen = product(torch.ones(2, 2, dtype=HALF), others=[labels, mask, torch.ones(1, dtype=torch.float16)])
    assert seen == [SINGLE, SINGLE, torch.int64, torch.bool, SINGLE]
    nested = at_least_float32(lambda maps, scale: (maps, scale))([(torch.ones(1, dtype=HALF), None), "name"], 2.0)
    assert nested == ([(torch.ones(1), None), "name"], 2.0) and nested[0][0][0].dtype == SINGLE
    same = torch.ones(2)
    assert at_least_float32(lambda x: x)(same) is same  # no copy where there is nothing to promote


def test_gradients_have_the_caller_s_type():
    x = torch.randn(4, 3).to(HALF).requires_grad_()
    with torch.autocast("cpu", HALF):
        at_least_float32(torch.logsumexp)(x, 1).sum().backward()
    assert x.grad.dtype == HALF
    torch.testing.assert_close(x.grad, x.detach().float().softmax(1).to(HALF), rtol=0, atol=0)


def test_methods_and_names_survive():
    class Layer(nn.Linear):
        @at_least_float32
        def forward(self, x):
            """Named."""
            return super().forward(x)

    layer = Layer(3, 2)
    assert Layer.forward.__name__ == "forward" and Layer.forward.__doc__ == "Named."
    with torch.autocast("cpu", HALF):
        assert layer(torch.ones(1, 3, dtype=HALF)).dtype == SINGLE


def test_it_turns_off_the_autocast_of_the_tensors_device(monkeypatch):
    calls, autocast = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: calls.append((args, kwargs)) or autocast("cpu"))
    with FakeTensorMode():
        product(torch.empty(2, 3, device="cuda"))
    assert calls == [(("cuda",), {"enabled": False})]


def test_it_compiles_without_a_graph_break():
    x = torch.randn(3, 5).to(HALF)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        return product(x, others=[x])[0]

    with torch.autocast("cpu", HALF):
        assert torch.equal(compiled(x), product(x)[0])
