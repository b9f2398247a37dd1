"""Free memory of this machine, shared by its processes."""

import os
import resource
from pathlib import Path

import torch

from runtime.memory import free_memory, total_memory


def test_free_memory_is_a_share_for_each_local_process(monkeypatch):
    whole = free_memory(torch.device("cpu"))
    assert 2**20 < whole < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert free_memory(torch.device("cpu")) < whole / 100


def test_a_limit_of_the_process_counts():
    """ulimit -v, which is a limit of addresses: what is left of it is free, and there is no more in total."""
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        free = free_memory(torch.device("cpu"))
        os._exit(7 if 2**27 < free <= 2**28 and total_memory() == limit else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_total_is_a_share_and_at_least_what_is_free(monkeypatch):
    whole = total_memory()
    assert free_memory(torch.device("cpu")) <= whole
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert total_memory() == whole // 4
