"""The nearest neighbors once more, in operations whose shapes do not depend on values: what torch.export can trace.

`search.nearest` evaluates whatever its bounds cannot rule out, as many pairs as there are. Here each query has a fixed
number of candidates, a few more than are asked for: those that a float32 product ranks first. Their distances are
float64 differences as there, so results differ only where more candidates than are spare lie within the product's
rounding of the nearest one, and then by no more than that rounding.
"""

import torch
from torch import Tensor

SPARE = 3  # candidates beyond those asked for
BLOCK = 2**13  # entries whose products with all queries exist at once


def traced_nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`search.nearest.nearest_squared` of queries (Q, D) in bank (M, D) without its checks: squared distances (Q, k)
    float64, ascending, ties to the lowest index, and indices (Q, k). NaN and inf come out as such."""
    queries, bank = queries.float(), bank.float()
    centre = bank.mean(0)  # amid the points products lose fewer digits
    x, first, bounds, indices = queries - centre, 0, [], []
    for some in bank.split(BLOCK):
        y = some - centre
        low = torch.addmm(y.square().sum(1), x, y.mT, alpha=-2)  # (Q, m): |x - y|^2 - |x|^2
        least, at = low.topk(min(k + SPARE, len(some)), dim=1, largest=False)
        bounds.append(least)
        indices.append(at + first)
        first += len(some)
    candidates = torch.cat(indices, 1)  # (Q, blocks (k + SPARE))
    at = torch.cat(bounds, 1).topk(min(k + SPARE, len(bank)), dim=1, largest=False).indices
    candidates = candidates.gather(1, at).sort(dim=1).values  # (Q, k + SPARE)
    pairs = [(queries.double() - bank[j].double()).square().sum(1) for j in candidates.unbind(1)]  # [(Q,)]
    squared, order = torch.stack(pairs, 1).sort(dim=1, stable=True)
    return squared[:, :k], candidates.gather(1, order)[:, :k]
