"""How much memory is free, for code that decides where to keep things, and amounts of memory in words."""

import os
from pathlib import Path

import torch


def free_memory(place: torch.device) -> int:
    """Free bytes for this process: of a GPU, or its share of the RAM that is free within the container's limit.

    What the file cache holds counts as free, since the system gives it back. Without Linux's files: all of the RAM.
    """
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        free = int(_fields("/proc/meminfo")["MemAvailable:"]) * 1024
    if os.path.exists("/sys/fs/cgroup/memory.max"):
        limit, used = Path("/sys/fs/cgroup/memory.max").read_text().strip(), _fields("/sys/fs/cgroup/memory.stat")
        if limit != "max":
            free = min(free, int(limit) - int(used["anon"]) - int(used["shmem"]))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gib(size: float) -> str:
    """Bytes, as `1.25 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def _fields(path: str) -> dict[str, str]:
    """The first two words of each line."""
    return dict(line.split()[:2] for line in Path(path).read_text().splitlines())
