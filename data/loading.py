"""Batches of a dataset: the order of an epoch, its split over processes, images decoded once and kept, copies ahead.

Letters: N items, B batch of this process, W processes, h and w an image's height and width.
"""

from collections.abc import Iterable, Iterator
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.cache_file import open_columns
from data.images import in_threads
from data.worker_processes import START, obey, watched
from runtime.distributed import rank, world_size
from runtime.errors import UserError
from runtime.memory import free_memory, gib
from runtime.text import say_once

Cache = Literal["auto", "device", "ram", "file", "none"]


class Loader:
    """Batches `(images, [masks,] labels, indices)`, each the dataset's tuple collated.

    images uint8 (B, 3, h, w), masks bool (B, h, w) and labels int64 (B,) lie on `device`; indices int64 (B,), the
    positions in the dataset, on the CPU.

    **Order.** With `shuffle` the permutation of (seed, epoch), else as they stand. Items k*G to (k+1)*G of it, G = B*W,
    are global batch k, and rank r has its r-th contiguous part: W processes with B/W see one process's batches of B.

    **Balanced.** With `balanced` and `shuffle` an epoch of N items has N / C of each of C classes, one more of some
    where that is no whole number. A class's items come in random order, all of them once before any comes again.

    **By label.** With `by_label` a batch is of one label: the order is cut into batches label by label, and with
    `shuffle` the batches come in an order drawn anew each epoch. Each label's last batch may be smaller; with
    `drop_last` only those are left out that have fewer than 2 items, or fewer than W.

    **The end.** With `drop_last` an incomplete global batch is left out. Without, ranks share it as evenly as possible,
    the first ones having one item more, and a rank with nothing to do has one batch less, never an empty one. So every
    item is seen exactly once over all ranks, but collectives belong after the loop, not into it. To restore the order:

        rows, indices = gather_rows(torch.cat(rows)), gather_rows(torch.cat(indices))  # in rank order
        rows = rows[indices.argsort()]                                                 # in dataset order

    **Cache.** `device` and `ram` decode an item once, in threads, when an epoch first asks for it; then a batch is an
    index. Loaders of one dataset object share what is decoded. `file` keeps it on the disk, for all processes of this
    machine and for later runs (`data.cache_file`). `none` decodes every time, in `workers` processes.
    `auto` takes the device (if CUDA) when the whole set needs under a quarter of its free memory, else RAM when under
    half of what is free (for each process of this machine), else none. Batches are the same in all cases.

    Args:
        batch_size: B, for each process.
        indices: take only these items of the dataset, for example one side of `holdout`.

    Raises:
        UserError: with `drop_last` and no batch left; a cache that cannot fit; a broken image.
    """

    def __init__(
        self,
        dataset,
        batch_size: int,
        device: torch.device | str,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        by_label: bool = False,
        balanced: bool = False,
        indices: Tensor | None = None,
        cache: Cache = "auto",
        workers: int = 0,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: a batch needs at least one image a process")
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self.shuffle, self.seed, self.drop_last, self.by_label = shuffle, seed, drop_last, by_label
        self.indices = torch.arange(len(dataset)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        self.cache, self.workers, self.balanced = cache, workers, balanced

    def __len__(self) -> int:
        """Batches in an epoch of this process."""
        return len(self._batches(None))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of this process in the given epoch, from number `first_batch` on."""
        batches = self._batches(epoch)[first_batch:]
        if not batches:
            return
        store = _store(self.dataset, self.device, self.cache)
        if store is None:
            yield from prefetch(self._decode(batches), self.device)
            return
        store.fill(self.dataset, torch.cat(batches))
        if store.labels.device.type == "cpu":
            pin = self.device.type == "cuda"  # a copy from pinned memory does not stop the step
            yield from prefetch((store.take(indices, pin) for indices in batches), self.device)
        else:
            yield from (store.take(indices) for indices in batches)

    def _batches(self, epoch: int | None) -> list[Tensor]:
        """This rank's part of each global batch of the epoch: positions in the dataset. None: without shuffling."""
        order, together, shuffle = self.indices, self.batch_size * world_size(), self.shuffle and epoch is not None
        if shuffle:
            # torch's CPU generator uses 32 bits of its seed, so (seed, epoch) is hashed into 32
            mixed = int(np.random.SeedSequence(self.seed, spawn_key=(epoch,)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(mixed)
            if self.balanced:
                order = _equally_many(order, self.dataset.labels[order], generator)
            order = order[torch.randperm(len(order), generator=generator)]
        if self.by_label:
            labels = self.dataset.labels[order]
            batches = [batch for label in labels.unique() for batch in order[labels == label].split(together)]
            if shuffle:
                batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        else:
            batches = order.split(together)
        if self.drop_last:
            least = max(2, world_size()) if self.by_label else together
            batches = [batch for batch in batches if len(batch) >= least]
            if not batches:
                raise UserError(self._too_few(least))
        parts = [batch.tensor_split(world_size())[rank()] for batch in batches]
        return [part for part in parts if len(part)]

    def _too_few(self, least: int) -> str:
        if self.by_label:
            return f"no batch of one class has {least} images: raise batch_size, or add images to the classes"
        return (
            f"{len(self.indices)} images make no full batch of batch_size {self.batch_size} x {world_size()} "
            f"processes = {least}: set batch_size to at most {len(self.indices) // world_size()}, or add images"
        )

    def _decode(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Batches on the CPU, decoded now by the workers (by this process when there are none)."""
        decoded = DataLoader(
            _Batches(self.dataset, batches),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one, and the cache would change the run
            multiprocessing_context=START if self.workers else None,
            worker_init_fn=obey,
        )
        for batch in watched(decoded):
            if isinstance(batch, UserError | MemoryError):
                raise batch
            yield (_three_channels(batch[0]), *batch[1:])


def _equally_many(items: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many items as there are, equally many of each class."""
    classes = labels.unique()
    classes = classes[torch.randperm(len(classes), generator=generator)]  # who has one more
    chosen = []
    for label, part in zip(classes, torch.arange(len(items)).tensor_split(len(classes))):
        members = items[labels == label]
        rounds = -(-len(part) // len(members))
        again = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        chosen.append(torch.cat(again)[: len(part)])
    return torch.cat(chosen)


class _Batches(torch.utils.data.Dataset):
    """Item k is batch k, collated; a broken image's `UserError` is returned, as DataLoader would rewrite its text."""

    def __init__(self, dataset, batches: list[Tensor]):
        self.dataset, self.batches = dataset, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> list[Tensor] | UserError | MemoryError:
        try:
            items = [_slim(self.dataset[i]) for i in self.batches[k].tolist()]
        except (UserError, MemoryError) as error:
            return error
        return [torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*items)]


class _Store:
    """The decoded images (and masks) of one dataset in one memory, filled as epochs ask for them; of gray images one
    channel."""

    def __init__(self, dataset, example: tuple[Tensor, ...], where: torch.device | Literal["file"]):
        if where == "file":
            where = torch.device("cpu")
            self.filled, self.columns, self.sync = open_columns(dataset, example)
        else:
            self.columns = [torch.empty((len(dataset), *x.shape), dtype=x.dtype, device=where) for x in example]
            self.filled, self.sync = torch.zeros(len(dataset), dtype=torch.uint8), lambda: None
        self.labels = dataset.labels.to(where)

    def fill(self, dataset, wanted: Tensor) -> None:
        """Decode those of the wanted items that are not here yet."""
        missing, written = wanted[self.filled[wanted] == 0].unique().tolist(), []
        for item, i in zip(in_threads(dataset.__getitem__, missing, "decoding"), missing):
            for column, value in zip(self.columns, _slim(item)):
                column[i] = value
            written.append(i)
            if len(written) == 256 or i == missing[-1]:
                self.sync()
                self.filled[written] = 1
                written = []

    def take(self, indices: Tensor, pin: bool = False) -> tuple[Tensor, ...]:
        """Rows of images, [masks,] and labels in the store's memory, or pinned in RAM; and the indices on the CPU."""
        where, rows = self.labels.device, indices
        if where.type == "cuda":
            rows = indices.pin_memory().to(where, non_blocking=True)
        batch = []
        for column in [*self.columns, self.labels]:
            out = torch.empty((len(rows), *column.shape[1:]), dtype=column.dtype, device=where, pin_memory=pin)
            batch.append(torch.index_select(column, 0, rows, out=out))
        return (_three_channels(batch[0]), *batch[1:], indices)


def _slim(item: tuple) -> tuple:
    """A dataset's item; of an image whose three channels are one in memory, this one: (1, H, W)."""
    image = item[0]
    return (image[:1], *item[1:]) if image.ndim == 3 and image.stride(0) == 0 else item


def _three_channels(images: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 3, H, W), a view; others as they are."""
    return images.expand(-1, 3, -1, -1) if images.ndim == 4 and images.shape[1] == 1 else images


_STORES: WeakKeyDictionary = WeakKeyDictionary()  # dataset -> {memory or "file": _Store}; goes with the dataset


def _store(dataset, device: torch.device, cache: Cache) -> _Store | None:
    """The dataset's store in the memory that `cache` names or that fits, made when new; None: decode every time."""
    if cache == "none":
        return None
    ram = torch.device("cpu")
    places = {"device": [device], "ram": [ram], "file": ["file"], "auto": [device, ram]}[cache]
    stores = _STORES.setdefault(dataset, {})
    for place in places:
        if place in stores:
            return stores[place]
    example = tuple(x for x in _slim(dataset[0]) if isinstance(x, Tensor))  # image[, mask]
    needed = len(dataset) * sum(x.nbytes for x in example)
    for place in places:
        if place == "file":
            stores[place] = _Store(dataset, example, place)
            return stores[place]
        free = free_memory(place)
        share = 1 if cache != "auto" else 1 / 2 if place == ram else 1 / 4
        if needed < free * share:
            stores[place] = _Store(dataset, example, place)
            return stores[place]
    if cache != "auto":
        raise UserError(
            f"data.cache={cache} needs {gib(needed)} for {len(dataset)} images, "
            f"{gib(free)} are free on {place}: use data.cache=none with data.workers, or a smaller data.size"
        )
    say_once(
        f"decoding anew in each epoch: {len(dataset)} images need {gib(needed)}, and {gib(free)} of memory are free; "
        "data.cache=file keeps them on the disk"
    )
    return None


def prefetch(batches: Iterable[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches in their order with all but the last tensor (the indices) copied to the device, one batch ahead.

    On the CPU the batches as they are. On CUDA batch k + 1 is asked for, and its copy started on a stream of its own,
    before batch k is handed over: so an error of batch k + 1 comes one step early. Copies run beside the step only
    from pinned memory, which torch does not use again before they are done.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ready = torch.cuda.Stream(device), None
    for batch in batches:
        if ready is not None:
            _await(ready, stream, device)  # before the next copy starts, so that nobody waits for that one
        with torch.cuda.stream(stream):
            following = (*(column.to(device, non_blocking=True) for column in batch[:-1]), batch[-1])
        if ready is not None:
            yield ready
        ready = following
    if ready is not None:
        _await(ready, stream, device)
        yield ready


def _await(batch: tuple[Tensor, ...], stream: torch.cuda.Stream, device: torch.device) -> None:
    """What the caller's stream does from now on waits for the copies, and their memory, which is `stream`'s, is given
    away only after what the caller's stream did with it."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for column in batch[:-1]:
        column.record_stream(current)
