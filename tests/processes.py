"""Functions in several gloo processes, as under torchrun, and scripts as a person starts them.

Each process is new, but forked from one that has imported torch and the scripts (a forkserver): 0.1 s instead of 6 s.
"""

import faulthandler
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TOP = Path(__file__).parent.parent
PRELOADED = ["tests.images", "train_ssl", "train_anomaly", "train_classifier", "eval", "predict", "sweep"]
PRELOADED += ["sklearn.metrics", "scipy.stats"]


def _start_server() -> None:
    """Unless it runs already; from the repository's folder, which Python puts on the server's path."""
    forkserver.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TOP)
        forkserver.ensure_running()


def _worker(rank: int, world_size: int, folder: str, function, args, environment: dict) -> None:
    faulthandler.enable()  # an abort says where
    _take(environment)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *args), os.path.join(folder, f"{rank}.pt"))
    while not all(os.path.exists(os.path.join(folder, f"{r}.pt")) for r in range(world_size)):
        time.sleep(0.01)  # a peer may still be in a collective
    os._exit(0)  # without gloo's teardown: a process ended by SIGABRT once, and teardown is the suspect, not more


def _take(environment: dict) -> None:
    """The environment of who asked; the server has that of its own start."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)


def run_processes(function, world_size: int, *args) -> list:
    """[function(rank, world_size, *args) for each rank], each in its own process; `function` is a module's own."""
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        args = (world_size, folder, function, args, dict(os.environ))
        mp.start_processes(_worker, args, nprocs=world_size, start_method="forkserver")
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


def _script(words: list[str], environment: dict, out: str, top: Path) -> None:
    for number, path in enumerate((out, f"{out}.err"), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _take(environment)
    os.chdir(top)
    if top != TOP:  # the server has loaded the modules of TOP, and the path is the parent's
        ours = {path.stem for path in TOP.iterdir() if path.is_dir() or path.suffix == ".py"}
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.path[:] = [str(top), *(path for path in sys.path if path != str(TOP))]
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:  # what a process does at its exit, which multiprocessing's do not
        sys.modules["runtime.files"].unlock()


def start_script(words: list[str], out: Path, environment: dict | None = None, top: Path = TOP) -> BaseProcess:
    """`python words` from the folder of the repository or a copy of it, not waited for; it prints into the files `out`
    and `out`.err."""
    _start_server()
    args = words, os.environ | (environment or {}), str(out), top
    process = multiprocessing.get_context("forkserver").Process(target=_script, args=args)
    process.start()
    return process


def environments_of(processes: int) -> tuple[list[dict], dist.TCPStore | None]:
    """Of each process, as torchrun's; and its store, which has to outlive them."""
    if processes == 1:
        return [{}], None
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # of a free port
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_USE_AGENT_STORE": True}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{key: str(value) for key, value in rank.items()} for rank in ranks], store


def script(words: list[str], *, processes: int = 1, top: Path = TOP) -> dict:
    """Run a script, or several processes of it as torchrun does; the JSON of its last line on stdout."""
    environments, _store = environments_of(processes)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        running = {p.sentinel: p for p in (start_script(words, out, each, top) for each in environments)}
        status = 0
        while running:
            for sentinel in connection.wait(running):
                process = running.pop(sentinel)
                process.join()
                status = status or process.exitcode
            if status:  # the others wait for it
                for process in running.values():
                    process.kill()
        assert status == 0, Path(f"{out}.err").read_text()
        return json.loads(out.read_text().splitlines()[-1])


def kill_script(words: list[str], metrics: Path, step: int) -> None:
    """Start a script and kill it as soon as its metrics show `step`."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_script(words, Path(folder) / "out")
        deadline = time.monotonic() + 300
        while process.is_alive() and time.monotonic() < deadline:
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                process.kill()
                break
            time.sleep(0.01)
        process.join()
        assert process.exitcode == -signal.SIGKILL, (Path(folder) / "out.err").read_text()
