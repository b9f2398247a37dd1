"""Which images show the same: exact copies, and resized, re-encoded, flipped or turned ones.

Two steps. The difference hash (dHash; as in FiftyOne's leaky_splits.py, but of rows and columns) says in 128 bits which
of 8 x 9 and 9 x 8 cells are darker than their neighbor; copies differ in few bits. On surfaces this alone is far too
generous: of NEU steel's 1,003,236 pairs 22,885 differ in at most 5 of the usual 64 bits, and one is a duplicate. So the
16 x 16 gray values must be nearly the same, too.

Letters: N images; 8 orientations, the first is upright.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.geometry import Geometry
from data.images import thumbnail

SIDE = 144  # pixels that everything is computed from; cells of 16 x 18 and 9 x 9 of them
BITS, CELLS = 128, 16  # of the hash, and the side of the grid of gray cells
MOST_BITS = 16  # that copies differ in; 9 was the most among 200 copies of NEU steel
MOST_LEVELS = 2.5  # root mean square difference of gray cells, 0 to 255; 0.8 was the most there, 1.6 of 60 x 90 pixels
ROWS, COLUMNS = 1024, 8192  # compared at once
TURNS = (  # in the order of `_orientations`
    *("upright", "flipped left to right", "rotated by 90°", "rotated by 90° and flipped"),
    *("rotated by 180°", "flipped top to bottom", "rotated by 270°", "rotated by 270° and flipped"),
)
ROUNDING = 16  # above the error of a squared distance in float32, of numbers up to 4 million


class Print(NamedTuple):
    """Of one image: two grids that its hashes come from, float32 (8, 9) and (9, 8), and gray cells, uint8 (16, 16)."""

    wide: np.ndarray
    high: np.ndarray
    cells: np.ndarray


@dataclass
class Fingerprints:
    """What images are compared by.

    Attributes:
        hashes: packed bits of each orientation, uint8 (N, 8, 16).
        cells: mean gray values, uint8 (N, 16, 16).
    """

    hashes: Tensor
    cells: Tensor

    @classmethod
    def of(cls, prints: list[Print]) -> "Fingerprints":
        """Of what `fingerprint` says of each image, at least one."""
        wide, high, cells = (np.stack(part) for part in zip(*prints))
        hashes = []
        for turned, other in zip(_orientations(wide, high), _orientations(high, wide)):
            bits = [turned[..., :-1] < turned[..., 1:], other[..., :-1, :] < other[..., 1:, :]]  # (N, 8, 8) each
            hashes.append(np.packbits(np.stack(bits, 1).reshape(len(cells), BITS), axis=1))
        return cls(torch.from_numpy(np.stack(hashes, 1)), torch.from_numpy(cells))

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: Tensor) -> "Fingerprints":
        return Fingerprints(self.hashes[rows], self.cells[rows])

    def invariants(self) -> Tensor:
        """The part of the gray cells that no flip or rotation changes, as near as they are or nearer: float32 (N, 36).

        Means of the cells that an orientation can swap, times the root of their number: an orthogonal projection.
        """
        edge = torch.arange(CELLS).minimum(CELLS - 1 - torch.arange(CELLS))  # distance from the border
        key = torch.minimum(edge[:, None], edge) * CELLS + torch.maximum(edge[:, None], edge)
        projection = F.one_hot(key.flatten().unique(return_inverse=True)[1]).float()  # (256, 36)
        return (self.cells.flatten(1).float() - 128) @ (projection / projection.sum(0).sqrt())

    def signs(self, orientation: int) -> Tensor:
        """Bits as -1 and 1: float32 (N, 128)."""
        bits = np.unpackbits(self.hashes[:, orientation].numpy(), axis=1)
        return torch.from_numpy(bits).float() * 2 - 1


def fingerprint(path: str | Path, geometry: int | Geometry) -> Print:
    """Mean gray values of an image's cells, in three grids; geometry: for the range of deep files.

    Raises:
        UserError: the image cannot be read.
    """
    return print_of(thumbnail(path, SIDE, geometry))


def print_of(gray: np.ndarray) -> Print:
    """The same of an image that is decoded already: uint8 (SIDE, SIDE), gray and squashed."""
    gray = gray.astype(np.float32)
    return Print(_means(gray, 8, 9), _means(gray, 9, 8), np.rint(_means(gray, 16, 16)).astype(np.uint8))


def nearest(queries: Fingerprints, others: Fingerprints | None = None) -> tuple[Tensor, Tensor]:
    """For each query the most similar one of the others that shows the same: its position, int64, -1 if there is none,
    and the root mean square difference of their gray cells, float64, inf if there is none.

    Without others the queries are compared among themselves. Orientations are tried where `invariants`, which no flip
    or rotation changes, are near; only those of about the same mean gray are compared at all. Both lose nothing.
    """
    alone, others = others is None, queries if others is None else others
    own, theirs = queries.invariants(), others.invariants()
    levels, order = others.cells.double().mean((1, 2)).sort(stable=True)
    gray = queries.cells.double().mean((1, 2))
    position, distance = torch.full((len(queries),), -1), torch.full((len(queries),), torch.inf, dtype=torch.float64)
    for rows in gray.argsort(stable=True).split(ROWS):
        low, high = gray[rows].aminmax()
        first = int(torch.searchsorted(levels, low - MOST_LEVELS))
        last = int(torch.searchsorted(levels, high + MOST_LEVELS, right=True))
        for columns in order[first:last].split(COLUMNS):
            squares = own[rows].square().sum(1)[:, None] + theirs[columns].square().sum(1)
            close = squares - 2 * own[rows] @ theirs[columns].T <= CELLS**2 * MOST_LEVELS**2 + ROUNDING
            if alone:
                close &= rows[:, None] != columns
            a, b = close.any(1), close.any(0)
            if a.any():
                _compare(queries, others, rows[a], columns[b], close[a][:, b], position, distance)
    return position, distance


def turned(prints: Fingerprints, i: int, others: Fingerprints, j: int) -> str:
    """How image i became image j of the others, in words; upright where several orientations fit alike."""
    squares = [
        (one.double() - others.cells[j]).square().sum() for one in _orientations(prints.cells[i], prints.cells[i])
    ]
    return TURNS[int(torch.stack(squares).argmin())]


def distinct(prints: Fingerprints, worth: Tensor) -> Tensor:
    """Positions, ascending, of images no two of which show the same; of those that do, the one of most worth is kept,
    of equal ones the first.

    Each image is joined to its nearest, and of all that hang together one is kept; then again among the kept ones.
    """
    best = torch.argsort(worth, descending=True, stable=True)
    all_bytes = torch.cat([prints.hashes.flatten(1), prints.cells.flatten(1)], 1)  # (N, 384)
    _, at = np.unique(all_bytes[best].numpy(), axis=0, return_index=True)
    kept = best[torch.from_numpy(at)].sort().values  # of thousands of equal ones, one is compared
    while True:
        position, _ = nearest(prints[kept])
        paired = (position >= 0).nonzero()[:, 0]
        if not len(paired):
            return kept
        leader = torch.arange(len(kept))
        while True:  # each image takes over the smaller number of its own and its nearest's leader, until all agree
            low = torch.minimum(leader[paired], leader[position[paired]])
            new = leader.scatter_reduce(0, paired, low, "amin").scatter_reduce(0, position[paired], low, "amin")
            if new.equal(leader):
                break
            leader = new
        best = torch.argsort(worth[kept], descending=True, stable=True)
        _, at = np.unique(leader[best].numpy(), return_index=True)
        kept = kept[best[torch.from_numpy(at)]].sort().values


def _compare(
    queries: Fingerprints,
    others: Fingerprints,
    rows: Tensor,
    columns: Tensor,
    close: Tensor,
    position: Tensor,
    distance: Tensor,
) -> None:
    """Write into `position` and `distance` of the rows which of the columns are nearer than what is there.

    close: the pairs in question, bool (rows, columns).
    """
    some, signs, cells = queries[rows], others[columns].signs(0), others.cells[columns].flatten(1).double()
    for orientation, turned in enumerate(_orientations(some.cells, some.cells)):
        x = turned.flatten(1).double()
        squares = x.square().sum(1)[:, None] + cells.square().sum(1) - 2 * x @ cells.T  # of integers: exact
        alike = close & (some.signs(orientation) @ signs.T >= BITS - 2 * MOST_BITS)
        least, at = (squares.sqrt() / CELLS).masked_fill(~alike, torch.inf).min(1)
        better = (least <= MOST_LEVELS) & (least < distance[rows])
        position[rows[better]], distance[rows[better]] = columns[at[better]], least[better]


def _orientations(upright, turned) -> list:
    """`upright` (..., h, w) in the eight flips and rotations, all (..., h, w); odd quarter turns are those of `turned`
    (..., w, h)."""
    rotate, flip = (torch.rot90, torch.flip) if isinstance(upright, Tensor) else (np.rot90, np.flip)
    found = []
    for quarters in range(4):
        one = rotate(turned if quarters % 2 else upright, quarters, (-2, -1))
        found += [one, flip(one, (-1,))]
    return found


def _means(gray: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Of each of rows x columns cells, (SIDE, SIDE) -> (rows, columns)."""
    return gray.reshape(rows, SIDE // rows, columns, SIDE // columns).mean((1, 3))
