"""Workspace: where tensors lie, what comes back when they go, and how much memory a large one takes."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import runtime.memory
from runtime.errors import UserError
from runtime.memory import Workspace

TOP = Path(__file__).parents[2]


def in_file(tensor):
    """Whether the tensor's first byte lies in a mapped file without a name (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return "(deleted)" in line
    raise AssertionError("not mapped")


def test_ram_first_then_files_and_ram_again_when_it_is_given_back():
    work = Workspace(1000)
    assert work.place(1000) == "RAM" and work.place(1001) == "file"
    a = work.empty(10, 20)  # 800 bytes
    assert work.used == 800 and work.place(200) == "RAM" and work.place(201) == "file"
    b = work.empty(51, dtype=torch.float64)
    assert work.used == 800 and not in_file(a) and in_file(b)
    view = a[3:, 1]
    del a
    assert work.used == 800  # a view needs the memory
    view.fill_(1)
    del view
    assert work.used == 0 and not in_file(work.empty(250))


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_behaves_like_any_tensor(limit, dtype):
    values = (10 * torch.randn(30, 7)).to(dtype)
    out = Workspace(limit).empty(30, 7, dtype=dtype)
    assert out.shape == (30, 7) and out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
    out.copy_(values)
    assert torch.equal(out, values) and torch.equal(out[::2, 3].clone(), values[::2, 3])
    assert torch.equal(out.double() @ out.double().T, values.double() @ values.double().T)


def test_nothing_and_scalars():
    work = Workspace(0)
    assert work.empty(0, 5).shape == (0, 5) and work.empty(3, 0, dtype=torch.int64).dtype == torch.int64
    assert work.empty().fill_(3).item() == 3


def test_files_lie_in_tmpdir_without_a_name_and_free_their_space(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = Workspace(0).empty(1000).fill_(2)
    assert not list(tmp_path.iterdir())
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text() and tensor.sum() == 2000
    del tensor
    assert str(tmp_path) not in maps.read_text()


def test_the_limit_in_gib(monkeypatch):
    monkeypatch.setattr(runtime.memory, "free_memory", lambda place: 1000 if place.type == "cpu" else 0)
    assert Workspace.from_gib(None).limit == 500
    assert Workspace.from_gib(1.5).limit == 3 * 2**29 and Workspace.from_gib(0).limit == 0
    for limit in (-1, float("nan")):
        with pytest.raises(UserError, match=r"memory_limit=.*at least 0"):
            Workspace.from_gib(limit)


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=rf"2\.00 GiB needed in {tmp_path}, .* GiB free \(No space.*\): set TMPDIR"):
        Workspace(0).empty(2**29)


def run(code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=TOP, env=environment, capture_output=True, text=True)


def test_a_file_size_limit_is_told_too():
    done = run(
        "import resource, runtime.memory as m\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "m.Workspace(0).empty(2**18)\n"
        "m.Workspace(0).empty(2**18 + 1)"
    )
    assert "UserError: 0.00 GiB needed in" in done.stderr and "File too large" in done.stderr


@pytest.mark.slow
def test_memory_stays_small_while_a_large_tensor_is_filled_and_read():
    done = run(
        "import re, torch, runtime.memory as m\n"
        "from pathlib import Path\n"
        "mib = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "work = m.Workspace(2**24)\n"
        "before, most = mib(), 0\n"
        "x = work.empty(2**19, 256)  # 512 MiB\n"
        "for i, part in enumerate(x.split(2**14)):\n"
        "    part.copy_(torch.full_like(part, i)); most = max(most, mib())\n"
        "total = sum(float(part.sum(dtype=torch.float64)) for part in x.split(2**14))\n"
        "print(max(most, mib()) - before, total == 2**22 * sum(range(32)), work.used)"
    )
    grown, right, used = done.stdout.split()
    assert int(grown) < 256 and right == "True" and used == "0", done.stdout  # the allocator alone may keep 128 MiB


@pytest.mark.slow
def test_the_greedy_search_reads_a_mapped_tensor_in_pieces():
    done = run(
        "import re, threading, time, torch, runtime.memory as m\n"
        "from pathlib import Path\n"
        "from search.coreset import greedy_coreset\n"
        "def watch():\n"
        "    while True:\n"
        "        found = re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())\n"
        "        seen.append(int(found[1]) // 1024); time.sleep(0.002)\n"
        "seen, work = [], m.Workspace(0)\n"
        "x = work.empty(65536, 1024).zero_()  # 256 MiB, and a copy as large\n"
        "for part in x.split(4096): part[:, :8].normal_()\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "time.sleep(0.1); before = seen[-1]\n"
        "picks = greedy_coreset(x, 20, start=0, pool=256, empty=work.empty).picks\n"
        "print(max(seen) - before, len(picks))"
    )
    assert done.stdout, done.stderr
    grown, picked = done.stdout.split()
    assert int(grown) < 160 and picked == "20", done.stdout
