"""LARS in its three forms against lists of floats, over steps of changing rate; going on from a state_dict."""

import io
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runtime.config import build
from runtime.errors import UserError
from training.lars import LARS
from training.optim import OptimConfig

FORMS = [("official", False), ("tensorflow", False), ("solo", False), ("solo", True)]
LRS = [0.0, 0.03, 0.5, 0.2, 0.001, 0.1]  # a warm-up from 0, a peak, a decay
SHAPES = {"conv": (4, 3, 2, 2), "linear": (3, 5), "born_zero": (2, 2), "bias": (5,), "scalar": (), "late": (2, 3),
          "unused": (3, 2)}  # fmt: skip


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def by_hand(p, grads, form, clip_lr, wd, momentum, eta, matrix):
    """One parameter as a list of floats through all steps; a gradient of None is no step."""
    buffer = [0.0] * len(p)
    for g, lr in zip(grads, LRS):
        if g is None:
            continue
        rate = 1.0
        if matrix and form == "solo":
            if norm(p) != 0 and norm(g) != 0:
                rate = eta * norm(p) / (norm(g) + norm(p) * wd + 1e-8)
                if clip_lr:
                    rate = min(rate / lr, 1.0) if lr else 1.0
                g = [a + wd * b for a, b in zip(g, p)]
        elif matrix:
            g = [a + wd * b for a, b in zip(g, p)]
            if norm(p) > 0 and norm(g) > 0:
                rate = eta * norm(p) / norm(g)
        if form == "tensorflow":
            buffer = [momentum * v + lr * rate * a for v, a in zip(buffer, g)]
            p = [a - v for a, v in zip(p, buffer)]
        else:
            buffer = [momentum * v + rate * a for v, a in zip(buffer, g)]
            p = [a - lr * v for a, v in zip(p, buffer)]
    return p


def made(seed=0):
    """{name: start}, {name: gradients of the steps}: zero weights, zero and missing gradients among them."""
    torch.manual_seed(seed)
    start = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    start["born_zero"].zero_()
    grads = {name: [torch.randn_like(p) for _ in LRS] for name, p in start.items()}
    grads["conv"][2].zero_()
    grads["born_zero"][0].zero_()
    grads["late"][:2] = [None, None]
    grads["unused"] = [None] * len(LRS)
    return start, grads


def walk(optimizer, params, grads, steps):
    for step in steps:
        for name, p in params.items():
            p.grad = None if grads[name][step] is None else grads[name][step].clone()
        for group in optimizer.param_groups:
            group["lr"] = LRS[step]
        optimizer.step()


@pytest.mark.parametrize("eta", [1e-3, 0.3])  # the larger one is clipped in some steps and not in others
@pytest.mark.parametrize(("form", "clip_lr"), FORMS)
def test_forms_against_floats(form, clip_lr, eta):
    start, grads = made()
    params = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    params["conv"].data = params["conv"].data.to(memory_format=torch.channels_last)
    optimizer = LARS(params.values(), weight_decay=0.05, momentum=0.8, eta=eta, form=form, clip_lr=clip_lr)
    walk(optimizer, params, grads, range(len(LRS)))
    for name, p in params.items():
        lists = [None if g is None else g.flatten().tolist() for g in grads[name]]
        expected = by_hand(start[name].flatten().tolist(), lists, form, clip_lr, 0.05, 0.8, eta, p.ndim > 1)
        expected = torch.tensor(expected, dtype=torch.float64).view(p.shape)
        torch.testing.assert_close(p.data, expected, rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(params["unused"].data, start["unused"]) and params["unused"] not in optimizer.state


def test_defaults_are_the_official_constants():
    optimizer = LARS([nn.Parameter(torch.ones(2, 2))])
    assert optimizer.defaults == {
        "lr": 0.0, "weight_decay": 0.0, "momentum": 0.9, "eta": 1e-3, "form": "official", "clip_lr": False
    }  # fmt: skip


def test_rate_inside_the_buffer_matters_only_when_it_changes():
    start, grads = made()
    ends = {}
    for form in ("official", "tensorflow"):
        for changing in (False, True):
            p = nn.Parameter(start["linear"].clone())
            optimizer = LARS([p], lr=0.2, eta=0.1, form=form)
            for step, g in enumerate(grads["linear"]):
                p.grad = g.clone()
                optimizer.param_groups[0]["lr"] = 0.2 / (1 + step * changing)
                optimizer.step()
            ends[form, changing] = p.data
    torch.testing.assert_close(ends["official", False], ends["tensorflow", False], rtol=1e-12, atol=1e-14)
    assert (ends["official", True] - ends["tensorflow", True]).abs().max() > 1e-3


@pytest.mark.parametrize(("form", "clip_lr"), FORMS)
def test_goes_on_from_a_state_dict_bit_for_bit(form, clip_lr):
    start, grads = made()
    whole = {name: nn.Parameter(p.float()) for name, p in start.items()}
    grads = {name: [None if g is None else g.float() for g in steps] for name, steps in grads.items()}
    options = {"weight_decay": 0.05, "form": form, "clip_lr": clip_lr}
    optimizer = LARS(whole.values(), **options)
    walk(optimizer, whole, grads, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    parts = {name: nn.Parameter(p.detach().clone()) for name, p in whole.items()}
    resumed = LARS(parts.values(), **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    walk(optimizer, whole, grads, range(3, len(LRS)))
    walk(resumed, parts, grads, range(3, len(LRS)))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(("form", "clip_lr"), FORMS)
def test_reads_no_value_on_the_host(form, clip_lr):
    """A fake tensor has no values: whatever asks for one raises, as it would wait for a CUDA device."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (4,), ())]
        for p in params:
            p.grad = torch.ones_like(p)
        LARS(params, lr=0.1, weight_decay=0.1, form=form, clip_lr=clip_lr).step()


def test_groups_without_gradients_and_empty_tensors_do_not_matter():
    p, empty = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(0, 3))
    optimizer = LARS([{"params": [p]}, {"params": [empty]}], lr=1.0)
    optimizer.step()
    assert torch.equal(p.data, torch.ones(2, 2))
    p.grad, empty.grad = torch.ones(2, 2), torch.ones(0, 3)
    optimizer.step()
    torch.testing.assert_close(p.data, torch.full((2, 2), 0.999))


def test_options_of_the_config_and_wrong_ones():
    """Both through the config, which names the key, and by the class."""
    chosen = build(OptimConfig, {"name": "lars", "lr": 1, "eta": "0.02", "form": "solo", "clip_lr": "true"}, "optim.")
    assert chosen.options == {"momentum": 0.9, "eta": 0.02, "form": "solo", "clip_lr": True}
    with pytest.raises(UserError, match=r"optim\.form='bolts' is unknown; one of: official, tensorflow, solo"):
        build(OptimConfig, {"name": "lars", "lr": 1, "form": "bolts"}, "optim.")
    with pytest.raises(UserError, match=r"optim\.form='bolts' is unknown; one of: official, tensorflow, solo"):
        LARS([nn.Parameter(torch.ones(1))], form="bolts")
    with pytest.raises(UserError, match=r"clip_lr=true is for optim\.form=solo: remove it, optim.form is tensorflow"):
        LARS([nn.Parameter(torch.ones(1))], form="tensorflow", clip_lr=True)
