"""Run a function in several gloo processes, as torchrun would, and collect what each returns."""

import faulthandler
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world_size: int, folder: str, function, args) -> None:
    faulthandler.enable()  # an abort says where
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), os.path.join(folder, f"{rank}.pt"))
    while not all(os.path.exists(os.path.join(folder, f"{r}.pt")) for r in range(world_size)):
        time.sleep(0.01)  # a peer may still be in a collective
    os._exit(0)  # without gloo's teardown: a process ended by SIGABRT once, and teardown is the suspect, not more


def run_processes(function, world_size: int, *args) -> list:
    """[function(rank, world_size, *args) for each rank], each in its own process; `function` is a module's own."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world_size, folder, function, args), nprocs=world_size)
        return [torch.load(os.path.join(folder, f"{r}.pt"), weights_only=False) for r in range(world_size)]


def assert_processes_equal_one(function, world_size: int) -> None:
    """The mean over ranks of each loss, and each rank's averaged gradient, are those of one process to 1e-12.

    function(rank, world_size) -> [(loss, gradient) of each case], of the rank's part of the same images.
    """
    expected, results = function(0, 1), run_processes(function, world_size)
    assert expected and all(len(result) == len(expected) for result in results)
    for (loss, gradient), *shards in zip(expected, *results):
        torch.testing.assert_close(sum(value for value, _ in shards) / world_size, loss, rtol=0, atol=1e-12)
        for _, grad in shards:
            torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)
