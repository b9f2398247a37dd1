"""Several batches with one loss: the gradients of one large batch, for every method, alone, with SPD, on processes."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from models.backbones.resnet import ResNet18
from models.ssl import SSL_METHODS
from models.ssl.gradient import Embed, accumulate, backward
from models.ssl.method import MANY
from models.ssl.queue import Queue
from models.ssl.spd import SPD
from runtime.distributed import data_parallel
from tests.models.ssl.test_methods import CASES, LABELS, build, views
from tests.processes import run_processes
from training.sam import frozen_statistics

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def raw_images(name):
    torch.manual_seed(6)
    more = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(3)] if "spd" in name else []
    return views(name.removesuffix(" with spd")) + more


def objective(name):
    method = build(name.removesuffix(" with spd"))
    return method, SPD(method, 0.3) if "spd" in name else method


def rows_of(views):
    return lambda _, ids: [view[ids] for view in views]


def whole(name):
    method, target = objective(name)
    for _ in range(2):
        method.zero_grad()
        loss, _ = target(raw_images(name), LABELS)
        loss.backward()
        method.after_step(1.0)
    return loss.detach(), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}, method


def in_parts(rank, world_size, name, parts=2):
    """The same with the process's images in `parts` batches."""
    method, target = objective(name)
    model = data_parallel(Embed(target))
    size = 8 // world_size // parts
    rows = torch.arange(8)[rank * 8 // world_size : (rank + 1) * 8 // world_size].split(size)
    batches = [(None, LABELS[ids], ids) for ids in rows]
    for _ in range(2):
        method.zero_grad()
        loss, stats = backward(model, target, batches, rows_of(raw_images(name)), NO_SCALER, nullcontext, seed=1)
        assert not any(value.requires_grad for value in stats.values())
        method.after_step(1.0)
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


QUEUES = ["moco_v2", "moco_v2 symmetric", "psco", "simclr with a bank", "supcon with a bank"]


def steps_as_the_loader_deals_them(rank, world_size, parts):
    """Loss and gradients of five steps of other images, and the queue's rows after them; 8 images per step.

    Each batch is a run of the step's images, dealt over the processes (Loader), and every queue's length is no
    multiple of a step's rows: some of a step's are overwritten before others.
    """
    seen = {}
    for name in QUEUES:
        method = build(name)
        rows = 16 if method.takes[1] is MANY or "symmetric" in name else 8  # all views of an image, or one
        for attribute in ("queue", "bank"):
            if isinstance(getattr(method, attribute, None), Queue):
                torch.manual_seed(3)
                queue = Queue(rows + 5, 8).double()
                setattr(method, attribute, queue)
        model = data_parallel(Embed(method) if parts > 1 else method)
        batches = [batch.tensor_split(world_size)[rank] for batch in torch.arange(8).split(8 // parts)]
        found = []
        for step in range(5):
            torch.manual_seed(100 + step)
            images = [torch.randn(8, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
            work = [(None, LABELS[ids], ids) for ids in batches]
            method.zero_grad()
            loss, _ = backward(model, method, work, rows_of(images), NO_SCALER, nullcontext, seed=1)
            found.append((loss.detach(), [p.grad.clone() for p in method.parameters() if p.grad is not None]))
            method.after_step(1.0)
        seen[name] = found, queue.rows
    return seen


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_processes_and_batches_overwrite_the_same_rows_of_a_queue(parts):
    expected = steps_as_the_loader_deals_them(0, 1, 1)
    results = [steps_as_the_loader_deals_them(0, 1, parts), *run_processes(steps_as_the_loader_deals_them, 2, parts)]
    for name, (found, rows) in expected.items():
        for step, (loss, grads) in enumerate(found):
            alone, *both = (result[name][0][step][0] for result in results)
            torch.testing.assert_close(alone, loss, rtol=0, atol=1e-10)
            torch.testing.assert_close(sum(both) / 2, loss, rtol=0, atol=1e-10, msg=f"{name}, step {step}")
            for result in results:
                for ours, grad in zip(result[name][0][step][1], grads, strict=True):
                    torch.testing.assert_close(ours, grad, rtol=0, atol=1e-10)
        for result in results:
            torch.testing.assert_close(result[name][1], rows, rtol=0, atol=1e-10)


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
    images = list(torch.randn(2, 8, 3, 8, 8))
    batches = [(None, LABELS[ids], ids) for ids in torch.arange(8).split(4)]
    step = (Embed(method), method, batches, rows_of(images), NO_SCALER, nullcontext)
    backward(*step, seed=0)
    torch.manual_seed(0)
    other = SSL_METHODS["byol"](ResNet18(stem="cifar"), hidden=8, out=4)
    for _, labels, ids in batches:
        other([view[ids] for view in images], labels)
    for (key, buffer), expected in zip(method.named_buffers(), other.buffers()):
        assert torch.equal(buffer, expected), key
    assert method.online.backbone.bn1.num_batches_tracked == 4  # two views of two batches
    with frozen_statistics(method):  # as in SAM's second pass
        backward(*step, seed=0)
    for buffer, expected in zip(method.buffers(), other.buffers()):
        assert torch.equal(buffer, expected)


class Dropped(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv1, self.drop = nn.Conv2d(3, 6, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.conv1(x).square().mean(dim=(2, 3)))


@pytest.mark.parametrize("compiled", [False, True])
def test_both_passes_draw_the_same_random_numbers(compiled):
    """With other draws in the second pass the gradient would be that of no loss: compare with one pass of one seed."""
    torch.manual_seed(2)
    method, images = SSL_METHODS["simclr"](Dropped(), out=4, head="linear").double(), views("simclr")
    model = torch.compile(Embed(method), backend="aot_eager") if compiled else Embed(method)
    accumulate(model, method, [(None, LABELS, None)], lambda *_: images, NO_SCALER, nullcontext, seed=5)
    grads = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    torch.manual_seed(5)
    method(images, LABELS)[0].backward()
    for p, grad in zip(method.parameters(), grads):
        torch.testing.assert_close(grad, p.grad, rtol=0, atol=1e-12)
