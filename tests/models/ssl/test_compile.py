"""torch.compile: every method gives what it gives without, queues and centers too, and is compiled once."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.models.ssl.test_methods import CASES, LABELS, build, views


def steps(model, method, name, number=4):
    """Losses and gradients of several steps, each in another epoch."""
    out = []
    for epoch in range(number):
        method.set_epoch(epoch)
        method.zero_grad()
        loss, _ = model(views(name), LABELS)
        loss.backward()
        method.after_step(1.0)
        out += [loss.detach(), method.online.backbone.conv1.weight.grad.clone()]
    return out + [buffer.clone() for buffer in method.buffers()]


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_method_is_the_method_and_stays_compiled(name):
    torch._dynamo.reset()
    plain = build(name)
    expected = steps(plain, plain, name)
    method, counter = build(name), CompileCounter()
    model = torch.compile(method, backend=counter)
    steps(model, method, name, 2)
    compiled = counter.frame_count
    assert 0 < compiled < 40
    method = build(name)
    model._orig_mod.load_state_dict(method.state_dict())
    ours = steps(model, model._orig_mod, name)
    assert counter.frame_count <= compiled + 1  # a queue that now holds something, at most
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
