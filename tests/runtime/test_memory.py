"""Free memory of this machine, shared by its processes."""

import torch

from runtime.memory import free_memory


def test_free_memory_is_a_share_for_each_local_process(monkeypatch):
    whole = free_memory(torch.device("cpu"))
    assert 2**20 < whole < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert free_memory(torch.device("cpu")) < whole / 100
