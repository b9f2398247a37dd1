"""Memory that is free, amounts of it in words, copies to the device, and tensors that are larger than the RAM."""

import math
import mmap
import os
import resource
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError


def free_memory(place: torch.device) -> int:
    """Free bytes for this process: of a GPU, or its share of the RAM that is free within the container's limit, and no
    more than its own limit (ulimit -v) leaves.

    What the file cache holds counts as free, since the system gives it back. Without Linux's files: all of the RAM.
    """
    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        free = int(_fields("/proc/meminfo")["MemAvailable:"]) * 1024
    if (limit := _container_limit()) is not None:
        used = _fields("/sys/fs/cgroup/memory.stat")
        free = min(free, limit - int(used["anon"]) - int(used["shmem"]))
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY and os.path.exists("/proc/self/statm"):
        free = min(free, own - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(free, 0)


def total_memory() -> int:
    """Bytes of RAM that this process can ever have: as `free_memory`, with nothing in use. Equal for all ranks."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (limit := _container_limit()) is not None:
        total = min(total, limit)
    total //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    return total if own == resource.RLIM_INFINITY else min(total, own)


def _container_limit() -> int | None:
    if not os.path.exists("/sys/fs/cgroup/memory.max"):
        return None
    limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    return None if limit == "max" else int(limit)


def gib(size: float) -> str:
    """Bytes, as `1.25 GiB`."""
    return f"{size / 2**30:.2f} GiB"


def send(numbers: Tensor, device: torch.device) -> Tensor:
    """Start the copy of a CPU tensor to `device` and return at once: only from pinned memory need the host not wait."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)


def _fields(path: str) -> dict[str, str]:
    """The first two words of each line."""
    return dict(line.split()[:2] for line in Path(path).read_text().splitlines())


class Workspace:
    """Gives out CPU tensors: in RAM as long as those still alive take no more than `limit` bytes, else in a file.

    A tensor in a file is read and written like any other, and the system keeps of it in RAM what is free there; so go
    through it in pieces. Its file has no name, lies in the folder for temporary files (TMPDIR, else /tmp), and goes
    with the tensor, also when the process is killed.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0  # bytes

    @classmethod
    def from_gib(cls, limit: float | None) -> "Workspace":
        """limit: GiB of RAM for this process; None: half of what is free now. Raises UserError below 0."""
        if limit is None:
            return cls(free_memory(torch.device("cpu")) // 2)
        if not limit >= 0:
            raise UserError(f"memory_limit={limit}: GiB of RAM, at least 0 (0 puts all into files), or null for a half")
        return cls(int(limit * 2**30))

    def place(self, nbytes: int) -> str:
        """Where a tensor of this size would go now: "RAM" or "file"."""
        return "RAM" if self.used + nbytes <= self.limit else "file"

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor, its entries arbitrary. Raises UserError when the folder for temporary files has no room."""
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        if self.place(nbytes) == "RAM":
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # as malloc does for large ones
            self.used += nbytes
            weakref.finalize(memory, self._give_back, nbytes)
        else:
            memory = _map_file(nbytes)
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)  # it and its views keep `memory` alive

    def _give_back(self, nbytes: int) -> None:
        self.used -= nbytes


def _map_file(nbytes: int) -> mmap.mmap:
    """The memory of a temporary file whose space on the disk is reserved: writing to it cannot fail later (SIGBUS)."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name from the start; the map outlives the descriptor
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:  # macOS
                file.truncate(nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise UserError(
            f"{gib(nbytes)} needed in {folder}, {gib(shutil.disk_usage(folder).free)} free "
            f"({error.strerror}): set TMPDIR to a folder on a larger disk, or raise memory_limit"
        ) from None
