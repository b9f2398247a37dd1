"""DINO's loss against a loop in float64: pairs, gradient, chunks, center, narrow types, memory, compile, processes."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses.dino
from losses.dino import DINOLoss
from tests.processes import run_processes


def log_softmax(row):
    """Prototype by prototype: [log softmax(row)_k]."""
    top = max(row)
    log_sum = top + torch.log(sum(torch.exp(x - top) for x in row))
    return [x - log_sum for x in row]


def by_loop(student, teacher, center, student_temperature, teacher_temperature):
    """Loss and entropy of float64 (B, V, K) and (B, 2, K), differentiable."""
    batch, views, k = student.shape
    total, entropy, pairs = 0.0, 0.0, 0
    for i in range(2):
        for b in range(batch):
            log_q = log_softmax([(teacher[b, i, j] - center[0, j]) / teacher_temperature for j in range(k)])
            entropy = entropy - sum(torch.exp(x) * x for x in log_q) / (2 * batch)
            for v in range(views):
                if v != i:
                    pairs += 1
                    log_p = log_softmax([student[b, v, j] / student_temperature for j in range(k)])
                    total = total - sum(torch.exp(log_q[j]) * log_p[j] for j in range(k)) / batch
    assert pairs == batch * (2 * views - 2)
    return total / (2 * views - 2), entropy


def whole(student, teacher, temperature, scale=1.0):
    """Plain formula at center 0 in float64: the loss, and the gradient of scale * loss in the student's type."""
    exact = student.detach().double().requires_grad_()
    q, log_p = (teacher.double() / temperature).softmax(2), (exact / 0.1).log_softmax(2)
    pairs = -torch.einsum("bik,bvk->iv", q, log_p) / len(q)
    loss = (pairs.sum() - pairs.diagonal().sum()) / (2 * student.shape[1] - 2)
    return loss.detach(), torch.autograd.grad(scale * loss, exact)[0].to(student.dtype)


@pytest.mark.parametrize("views, batch, k", [(2, 1, 5), (2, 3, 4), (6, 2, 5), (3, 2, 1), (2, 1, 1)])
def test_equals_the_loop(views, batch, k):
    student = torch.randn(batch, views, k, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(batch, 2, k).double()
    loss = DINOLoss(k).double()
    loss.center.copy_(torch.randn(k))
    value, entropy = loss(student, teacher, 0.4)
    expected, expected_entropy = by_loop(student, teacher, loss.center, 0.1, 0.4)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(3 * x, student)[0] for x in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_uniform_outputs_cost_ln_k():
    loss, entropy = DINOLoss(4096)(torch.zeros(2, 4, 4096), torch.zeros(2, 2, 4096), 0.04)
    assert loss.item() == pytest.approx(math.log(4096), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(4096), rel=1e-6)


def test_invariances():
    """Order of images, of prototypes, of local crops; a constant added to any output; the teacher's two views."""
    student, teacher, center = torch.randn(5, 4, 7).double(), torch.randn(5, 2, 7).double(), torch.randn(1, 7).double()

    def value(s, t, c=center):
        loss = DINOLoss(7).double()
        loss.center.copy_(c)
        return torch.stack(loss(s, t, 0.04))

    expected, images, prototypes = value(student, teacher), torch.randperm(5), torch.randperm(7)
    for other in (
        value(student[images], teacher[images]),
        value(student[..., prototypes], teacher[..., prototypes], center[:, prototypes]),
        value(student[:, [0, 1, 3, 2]], teacher),
        value(student[:, [1, 0, 2, 3]], teacher.flip(1)),
        value(student + torch.randn(5, 4, 1), teacher + torch.randn(5, 2, 1), center + 3),
        value(student, teacher + center, 2 * center),
    ):
        torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(value(student[:, [2, 1, 0, 3]], teacher), expected)  # a global crop is no local one


def test_only_the_student_has_gradients_and_only_once():
    student = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    loss = DINOLoss(4).double()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 0.07)[0], student)
    value, entropy = loss(student, teacher, 0.07)
    assert not entropy.requires_grad
    first, second = (torch.autograd.grad(value, [student, teacher], retain_graph=True, allow_unused=True) for _ in "12")
    assert torch.equal(first[0], second[0]) and first[1] is None
    (gradient,) = torch.autograd.grad(value.square(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("chunk", [1, 2 * 3 * 7, 4 * 3 * 7 + 1, 5 * 3 * 7])  # 1, 2, 4, 5 of 5 images
def test_chunks_and_layout_change_nothing(monkeypatch, chunk):
    flat, pair = torch.randn(3, 5, 7).double(), torch.randn(2, 5, 7).double()  # (V, B, K), (2, B, K)
    results = []
    for size, student, teacher in (
        (2**21, flat.transpose(0, 1).contiguous(), pair.transpose(0, 1).contiguous()),
        (chunk, flat.transpose(0, 1), pair.transpose(0, 1)),
    ):
        monkeypatch.setattr(losses.dino, "CHUNK", size)
        loss = DINOLoss(7).double()
        student.requires_grad_()
        value, entropy = loss(student, teacher, torch.tensor(0.04, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.stride() == student.stride()  # what goes back through the transpose is contiguous again
        loss.update()
        results.append((value, entropy, gradient, loss.center))
    torch.testing.assert_close(*results, rtol=0, atol=1e-14)
    assert torch.equal(student, flat.transpose(0, 1)) and torch.equal(teacher, pair.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 100, 60000])
def test_narrow_types_stay_exact_and_finite(dtype, size):
    student = size * torch.tensor([-1.0, 1.0])[torch.randint(2, (32, 4, 64))]
    student[0, :, 1:] = -size  # p = 1 at prototype 0, which the teacher leaves to others: the largest gradient
    teacher = size * torch.randn(32, 2, 64).clamp(-1, 1)
    teacher[0, :, 0] = -size
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value, _ = DINOLoss(64)(student, teacher, 0.04)
    value.backward()
    expected, gradient = whole(student, teacher, 0.04)
    assert value.dtype == torch.float32 and student.grad.dtype == dtype and student.grad.isfinite().all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_float16_keeps_small_probabilities():
    student = torch.zeros(1, 2, 256).half()
    student[..., 0] = 1.4  # the others have p = 8e-7, teacher 0 at prototype 0 leaves them nothing
    teacher = torch.zeros(1, 2, 256).half()
    teacher[..., 0] = 5
    student.requires_grad_()
    value, _ = DINOLoss(256)(student, teacher, 0.04)
    (65536 * value).backward()  # as GradScaler does
    torch.testing.assert_close(student.grad, whole(student, teacher, 0.04, 65536)[1], rtol=2e-3, atol=0)


def test_autocast_changes_nothing():
    student, teacher = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = DINOLoss(8)(student, teacher, 0.04)
    torch.testing.assert_close(inside, DINOLoss(8)(student, teacher, 0.04), rtol=0, atol=0)


class Record(TorchDispatchMode):
    """Names of all operations, and the most numbers in a float32 tensor that one returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.largest = max(self.largest, x.numel())
        return result


def test_no_large_float32_tensor_and_no_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(losses.dino, "CHUNK", 1000)  # 5 of 16 images of 4 x 50
    student, teacher = torch.randn(4, 16, 50).bfloat16().transpose(0, 1), torch.randn(16, 2, 50).bfloat16()
    loss, temperature = DINOLoss(50), torch.tensor(0.04)
    with Record() as record:
        value, _ = loss(student.requires_grad_(), teacher, temperature)
        value.backward()
        loss.update()
    assert record.largest == 1000
    assert not record.names & {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
    with Record() as record:
        torch.log_softmax(student.float(), 2)
    assert record.largest == 3200  # it would be seen


def test_no_gradient_where_none_is_needed():
    student, teacher = torch.randn(4, 3, 8), torch.randn(4, 2, 8)
    with Record() as record:
        assert not DINOLoss(8)(student, teacher, 0.04)[0].requires_grad
        with torch.no_grad():
            assert not DINOLoss(8)(student.requires_grad_(), teacher, 0.04)[0].requires_grad
    assert not record.names & {"empty_like", "exp_"}


def test_update_moves_the_center_once_by_the_last_forward():
    loss, teacher = DINOLoss(4, center_momentum=0.8).double(), torch.randn(3, 2, 4).double()
    start = torch.randn(1, 4).double()
    loss.center.copy_(start)
    loss.update()
    for scale in (5, 1):  # the second one, SAM's, counts
        loss(torch.randn(3, 6, 4).double(), scale * teacher, 0.04)
    loss.eval()(torch.randn(3, 6, 4).double(), 9 * teacher, 0.04)
    assert torch.equal(loss.center, start) and list(loss.state_dict()) == ["center"]
    resumed = DINOLoss(4, center_momentum=0.8).double()
    resumed.load_state_dict(loss.state_dict())
    resumed.update()
    assert torch.equal(resumed.center, start)
    for _ in range(2):
        loss.update()
        expected = 0.8 * start + 0.2 * teacher.mean(dim=(0, 1))
        torch.testing.assert_close(loss.center, expected, rtol=0, atol=1e-14)


def test_compiled_is_the_same_and_temperatures_do_not_recompile():
    loss, weight, graphs = DINOLoss(8), torch.randn(6, 8, requires_grad=True), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    def step(x, temperature):
        value, entropy = loss(
            (x @ weight).unflatten(0, (3, 4)).transpose(0, 1), x[:8].view(4, 2, 6) @ weight, temperature
        )
        return 2 * value, entropy

    x, counts = torch.randn(12, 6), []
    compiled = torch.compile(step, backend=backend)
    for temperature in (0.04, 0.05, 0.07):
        ours, expected = (run(x, torch.tensor(temperature)) for run in (compiled, step))
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        gradients = [torch.autograd.grad(result[0], weight)[0] for result in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
        counts.append(len(graphs))
        loss.update()
    assert counts[0] > 0 and counts == [counts[0]] * 3
    assert not any("log_softmax" in graph for graph in graphs)  # the loop over chunks stays out
    torch._dynamo.reset()


@pytest.mark.parametrize("student, teacher", [((3, 1, 4), (3, 2, 4)), ((3, 5, 4), (2, 3, 4)), ((3, 5, 6), (3, 2, 6))])
def test_wrong_shapes(student, teacher):
    with pytest.raises(ValueError, match=r"\(B, V, K\) and \(B, 2, K\)"):
        DINOLoss(4)(torch.zeros(student), torch.zeros(teacher), 0.04)


def shard(rank, world_size):
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 4, 5).double(), torch.randn(6, 2, 5).double()
    mine = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    student = student[mine].clone().requires_grad_()
    loss = DINOLoss(5).double()
    for _ in range(2):  # the second loss uses the reduced center
        value, _ = loss(student, teacher[mine], 0.04)
        loss.update()
    value.backward()
    return value.detach(), loss.center, student.grad / world_size


def test_two_processes_equal_one():
    value, center, grad = shard(0, 1)
    results = run_processes(shard, 2)
    torch.testing.assert_close(sum(r[0] for r in results) / 2, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), grad, rtol=0, atol=1e-12)
    for _, other, _ in results:
        torch.testing.assert_close(other, center, rtol=0, atol=1e-12)
    assert torch.equal(results[0][1], results[1][1])
