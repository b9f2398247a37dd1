"""Several batches with one loss: the gradients of one large batch, for every method, alone, with SPD, on processes."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from models.resnet import ResNet18
from models.ssl import SSL_METHODS
from models.ssl.gradients import Embed, accumulate, backward
from models.ssl.spd import SPD
from tests.models.ssl.test_methods import CASES, LABELS, build, views
from tests.processes import run_processes
from training.sam import frozen_statistics

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def pictures(name):
    torch.manual_seed(6)
    more = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(3)] if "spd" in name else []
    return views(name.removesuffix(" with spd")) + more


def objective(name):
    method = build(name.removesuffix(" with spd"))
    return method, SPD(method, 0.3) if "spd" in name else method


def whole(name):
    method, target = objective(name)
    for _ in range(2):
        method.zero_grad()
        loss, _ = target(pictures(name), LABELS)
        loss.backward()
        method.update()
    return loss.detach(), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}, method


def in_parts(rank, world_size, name, parts=2):
    """The same with the process's pictures in `parts` batches."""
    method, target = objective(name)
    model = Embed(target)
    model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    size = 8 // world_size // parts
    rows = [slice(start, start + size) for start in range(rank * 8 // world_size, (rank + 1) * 8 // world_size, size)]
    batches = [[view[part] for view in pictures(name)] for part in rows]
    for _ in range(2):
        method.zero_grad()
        loss, stats = backward(model, target, batches, [LABELS[part] for part in rows], NO_SCALER, nullcontext, seed=1)
        method.update()
    assert len(stats["embeddings"]) in (8 // world_size, 8 // world_size * len(views(name.removesuffix(" with spd"))))
    return loss.detach(), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}, method


NAMES = [*CASES, "simclr with spd", "dino with spd"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [2, 8])
def test_several_batches_have_the_loss_gradient_and_buffers_of_one(name, parts):
    loss, expected, one = whole(name)
    ours, grads, method = in_parts(0, 1, name, parts)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-10)
    for (key, buffer), other in zip(method.named_buffers(), one.buffers()):
        torch.testing.assert_close(buffer, other, rtol=0, atol=1e-10, msg=key)


def on_processes(rank, world_size):
    return {name: in_parts(rank, world_size, name)[:2] for name in NAMES}


def test_two_processes_of_two_batches_equal_one_of_one():
    results = run_processes(on_processes, 2)
    for name in NAMES:
        loss, expected, _ = whole(name)
        torch.testing.assert_close(sum(r[name][0] for r in results) / 2, loss, rtol=0, atol=1e-10)
        for result in results:
            for key, grad in result[name][1].items():
                torch.testing.assert_close(grad, expected[key], rtol=0, atol=1e-10, msg=f"{name} {key}")


def test_the_mean_of_two_losses_would_be_another_loss():
    _, expected, _ = whole("simclr")
    method = build("simclr")
    for part in (slice(0, 4), slice(4, 8)):
        (method([view[part] for view in views("simclr")], LABELS[part])[0] / 2).backward()
    difference = method.online.backbone.conv1.weight.grad - expected["online.backbone.conv1.weight"]
    assert difference.abs().max() > 1e-3


def test_batch_norms_move_once_a_batch_and_see_each_alone():
    torch.manual_seed(0)
    method = SSL_METHODS["byol"](ResNet18(stem="cifar"), hidden=8, out=4)
    images = torch.randn(2, 8, 3, 8, 8)
    batches = [list(images[:, :4]), list(images[:, 4:])]
    backward(Embed(method), method, batches, [LABELS[:4]] * 2, NO_SCALER, nullcontext, seed=0)
    other = SSL_METHODS["byol"](ResNet18(stem="cifar"), hidden=8, out=4)
    torch.manual_seed(0)
    other.load_state_dict(SSL_METHODS["byol"](ResNet18(stem="cifar"), hidden=8, out=4).state_dict())
    for batch in batches:
        other(batch, LABELS[:4])
    for (key, buffer), expected in zip(method.named_buffers(), other.buffers()):
        assert torch.equal(buffer, expected), key
    assert method.online.backbone.bn1.num_batches_tracked == 4  # two views of two batches
    with frozen_statistics(method):  # as in SAM's second pass
        backward(Embed(method), method, batches, [LABELS[:4]] * 2, NO_SCALER, nullcontext, seed=0)
    for buffer, expected in zip(method.buffers(), other.buffers()):
        assert torch.equal(buffer, expected)


class Dropped(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv1, self.drop = nn.Conv2d(3, 6, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.conv1(x).square().mean(dim=(2, 3)))


def test_both_passes_draw_the_same_random_numbers():
    """With other draws in the second pass the gradient would be that of no loss: compare with one pass of one seed."""
    torch.manual_seed(2)
    method = SSL_METHODS["simclr"](Dropped(), out=4, head="linear").double()
    images = views("simclr")
    accumulate(Embed(method), method, [images], [LABELS], NO_SCALER, nullcontext, seed=5)
    grads = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    torch.manual_seed(5)
    method(images, LABELS)[0].backward()
    for p, grad in zip(method.parameters(), grads):
        torch.testing.assert_close(grad, p.grad, rtol=0, atol=1e-12)
