"""Gather and reduce: two processes with different numbers of different rows, gradients included."""

import pytest
import torch
from torch import nn

from runtime import distributed
from runtime.errors import UserError
from tests.processes import run_processes


def together(rank, world_size):  # noqa: ARG001
    x = (torch.arange(6.0).reshape(3, 2) + 10 * rank).requires_grad_()
    gathered = distributed.gather(x)
    # every rank weighs the rows differently, so a backward that does not sum over ranks shows
    (gathered * (1 + rank)).sum().backward()
    norm = nn.BatchNorm1d(2)
    norm(10 * rank + torch.randn(5, 2))
    distributed.share_buffers(norm)
    with distributed.alone(), distributed.alone():
        lonely = distributed.gather(x.detach())
        lonely = [lonely, distributed.all_reduce_sum(lonely), distributed.rank(), distributed.world_size()]
    return {
        "alone": lonely,
        "buffers": dict(norm.named_buffers()),
        "gathered": gathered.detach(),
        "grad": x.grad,
        "rows": distributed.gather_rows(torch.full((rank * 2, 3), rank)),
        "sum": distributed.all_reduce_sum(torch.tensor(float(rank + 1))),
        "mean": distributed.all_reduce_mean(torch.tensor(float(rank + 1))),
        "who": (distributed.rank(), distributed.world_size(), distributed.is_main()),
    }


def test_two_processes():
    results = run_processes(together, 2)
    expected = torch.cat([torch.arange(6.0).reshape(3, 2) + 10 * rank for rank in range(2)])
    for rank, result in enumerate(results):
        assert torch.equal(result["gathered"], expected)
        assert torch.equal(result["grad"], torch.full((3, 2), 3.0))  # 1 + 2: from both ranks
        assert torch.equal(result["rows"], torch.full((2, 3), 1))
        assert (result["sum"], result["mean"]) == (3.0, 1.5)
        assert result["who"] == (rank, 2, rank == 0)  # after `alone`
        gathered, total, *who = result["alone"]
        assert torch.equal(gathered, expected[3 * rank : 3 * rank + 3]) and torch.equal(total, gathered)
        assert who == [0, 1]
        assert result["buffers"]["num_batches_tracked"] == 1
        assert torch.equal(result["buffers"]["running_mean"], results[0]["buffers"]["running_mean"])
    assert results[0]["buffers"]["running_mean"].abs().max() < 0.5  # rank 0's, not the mean of both


def test_one_process_is_the_identity():
    x = torch.randn(3, 2)
    assert distributed.gather(x) is x and distributed.gather_rows(x) is x and distributed.all_reduce_sum(x) is x
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_devices_that_do_not_do(monkeypatch):
    for device in ("mps", "meta", "gpu"):
        with pytest.raises(UserError, match=f"device={device} does not exist here"):
            distributed.setup(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="use device=cuda, which gives each its own"):
        distributed.setup("cuda:1")
