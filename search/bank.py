"""The memory of PatchCore: patch features that remember their image, spread over processes, searched in blocks."""

import torch
from torch import Tensor, nn

from runtime.distributed import all_reduce_sum, gather_rows, rank, world_size
from runtime.errors import UserError
from search.bounds import require_finite
from search.nearest import Prepared, nearest_squared, prepare

BLOCK = 2**16  # entries searched at a time, at most


class Bank(nn.Module):
    """M entries of D features, in the order in which they were picked. Each process holds some of them.

    With several processes every method is a collective; all call it equally often, with empty tensors if need be, and
    get what one process with all entries would get: the same neighbors, ties to the lowest position.

    Entries are searched in blocks, so that they may lie in a memory-mapped file. What the search needs of a block
    beside the entries, as much memory again, is made once and kept unless all of it is more than `budget` bytes.

    Buffers: entries (M_r, D) of this process, positions (M_r,) ascending, where these stand in the whole bank,
    origins (M, 3), image, row and column of every entry of the whole bank.
    A checkpoint holds the whole bank, whatever the number of processes that wrote or read it.
    """

    def __init__(self, budget: int = 2**33):
        super().__init__()
        self.budget = budget
        self.register_buffer("entries", torch.empty(0, 0))
        self.register_buffer("positions", torch.empty(0, dtype=torch.int64))
        self.register_buffer("origins", torch.empty(0, 3, dtype=torch.int64))
        self._prepared: dict[int, Prepared] = {}  # by the block's first entry
        self._around: Tensor | None = None

    def __len__(self) -> int:
        return len(self.origins)

    def hold(self, entries: Tensor, positions: Tensor, origins: Tensor) -> None:
        """Take these as the bank's content; see the buffers."""
        self.entries, self.positions, self.origins = entries, positions, origins
        self._prepared, self._around = {}, None

    def nearest(self, queries: Tensor, k: int, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest entries of queries (Q, D): squared Euclidean distances (Q, k) float64 and positions (Q, k).

        images (Q,) int64: entries of this training image do not count for the query. Where fewer than k are left,
        the distance is inf and the position M.

        Raises:
            UserError: a query is not finite, or is of the only image in the bank and leaves that out.
        """
        if torch.compiler.is_exporting():
            squared, index = nearest_squared(queries, self.entries, k)
            return squared, self.positions[index]
        everyone = gather_rows(queries)  # (sum of Q, D)
        require_finite(everyone, "patches")
        away = None if images is None else gather_rows(images)
        only = self.origins[0, 0] if len(self) and (self.origins[:, 0] == self.origins[0, 0]).all() else None
        if away is not None and only is not None and (away == only).any():
            raise UserError(
                f"all {len(self)} patches of the bank come from one image, so it cannot be left out: keep more "
                "patches (detector.coreset), or set holdout=0.1 to have the threshold from images held out"
            )
        squared = everyone.new_full((len(everyone), k), torch.inf, dtype=torch.float64)
        positions = torch.full_like(squared, len(self), dtype=torch.int64)
        own = self.origins[self.positions, 0]  # (M_r,) image of each entry here
        step = min(BLOCK, max(2**10, self.budget // (16 * queries.shape[1])))
        for first in range(0, len(self.entries), step):
            some = slice(first, first + step)
            block = self.entries[some].to(everyone.device)
            prepared = self._prepared.get(first) or prepare(block)
            if self.entries.nbytes <= self.budget:
                self._prepared[first] = prepared
            exclude = None if away is None else (away, own[some])
            found, index = nearest_squared(everyone, block, min(k, len(block)), prepared=prepared, exclude=exclude)
            where = self.positions[some][index.clamp(min=0)]
            squared, positions = closest(squared, positions, found, where.masked_fill(index < 0, len(self)), k)
        if world_size() > 1:
            squared, positions = _merge_processes(squared, positions, len(queries), k)
        return squared, positions

    def rows(self, positions: Tensor) -> Tensor:
        """The entries at positions (n, ...) of the whole bank: (n, ..., D)."""
        wanted = gather_rows(positions)
        if world_size() == 1:
            return self.entries[wanted.to(self.entries.device)].to(positions.device)
        flat = wanted.flatten()
        out = self.entries.new_zeros(len(flat), self.entries.shape[1])
        if len(self.entries):
            at = torch.searchsorted(self.positions, flat).clamp(max=len(self.positions) - 1)
            mine = self.positions[at] == flat
            out[mine] = self.entries[at[mine]]
        before = int(gather_rows(positions.new_tensor([len(positions)]))[: rank()].sum())
        out = all_reduce_sum(out).unflatten(0, wanted.shape)  # (sum of n, ..., D)
        return out[before : before + len(positions)]

    def around(self, positions: Tensor, count: int) -> Tensor:
        """The `count` entries nearest to each entry at positions (n,), itself first: (n, count), searched for once.

        While torch.export traces it, all must have been searched for.
        """
        if torch.compiler.is_exporting():
            assert self._around is not None
            return self._around[positions]
        if self._around is None or self._around.shape[1] != count:
            self._around = positions.new_full((len(self), count), -1)
        asked = gather_rows(positions).unique()  # equal on all processes, and so is the table
        missing = asked[self._around[asked, 0] < 0]
        if len(missing):
            share = missing.tensor_split(world_size())[rank()]
            self._around[missing] = gather_rows(self.nearest(self.rows(share), count)[1])
        return self._around[positions]

    def keep(self, numbers: Tensor) -> Tensor:
        """Renumber the training images, `numbers[old]` being the new number, and drop the entries of those at -1.

        Returns the entries of this process that were dropped, (n, D).
        """
        images = numbers[self.origins[:, 0]]  # (M,)
        stays = images >= 0
        if not stays.any():
            raise UserError("every image of the bank is gone from the training set: fit anew, without update")
        new_position = stays.cumsum(0) - 1
        here = stays[self.positions]
        dropped = self.entries[~here]
        origins = torch.cat([images[:, None], self.origins[:, 1:]], 1)[stays]  # (M', 3)
        self.hold(self.entries[here], new_position[self.positions[here]], origins)
        return dropped

    def extend(self, entries: Tensor, positions: Tensor, origins: Tensor) -> None:
        """Append new entries: those of this process, their positions among the new ones, all new origins."""
        self.hold(
            torch.cat([self.entries, entries.to(self.entries)]),
            torch.cat([self.positions, len(self) + positions]),
            torch.cat([self.origins, origins]),
        )

    def _apply(self, fn, recurse: bool = True) -> "Bank":
        self._prepared, self._around = {}, None  # lie where the entries lay
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # noqa: ARG002
        order = gather_rows(self.positions).argsort()
        whole = self.entries if world_size() == 1 else gather_rows(self.entries)[order]
        destination[prefix + "entries"], destination[prefix + "origins"] = whole, self.origins

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        names = [prefix + "entries", prefix + "origins"]
        if not all(name in state_dict for name in names):
            args[2].extend(names)  # missing_keys of nn.Module
            return
        entries, origins = (state_dict[name] for name in names)
        mine = torch.arange(rank(), len(entries), world_size())
        device = self.entries.device
        mine_of_it = entries if world_size() == 1 else entries[mine]
        self.hold(mine_of_it.to(device), mine.to(device), origins.to(device))


def closest(squared: Tensor, positions: Tensor, more: Tensor, where: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k least of (Q, a) and (Q, b) squared distances with their positions, ascending, ties to the lowest one."""
    squared, positions = torch.cat([squared, more], 1), torch.cat([positions, where], 1)  # (Q, a + b)
    positions, order = positions.sort(1)
    squared, by_distance = squared.gather(1, order).sort(dim=1, stable=True)
    return squared[:, :k], positions.gather(1, by_distance)[:, :k]


def _merge_processes(squared: Tensor, positions: Tensor, n_own: int, k: int) -> tuple[Tensor, Tensor]:
    """Every process's answer to all queries, (sum of Q, k) each -> the best of all for this process's, (Q, k)."""
    counts = gather_rows(torch.tensor([n_own], device=squared.device))
    first = int(counts[: rank()].sum())
    all_squared = gather_rows(squared[None])[:, first : first + n_own]  # (W, Q, k)
    all_positions = gather_rows(positions[None])[:, first : first + n_own]
    nothing = squared.new_empty(n_own, 0), positions.new_empty(n_own, 0)
    found = all_squared.transpose(0, 1).flatten(1), all_positions.transpose(0, 1).flatten(1)  # (Q, W k)
    return closest(*nothing, *found, k)
