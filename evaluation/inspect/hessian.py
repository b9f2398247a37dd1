"""The Hessian's largest eigenvalues and their directions, by products with vectors alone."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluation.inspect.landscape import Direction, filter_norm, learned
from evaluation.inspect.run_loss import RunLoss
from runtime.errors import UserError

TOLERANCE = 1e-3  # of an eigenvalue, relative
MOST_RESTARTS = 100


def hessian_times(loss: RunLoss) -> Callable[[list[Tensor]], list[Tensor]]:
    """The function v -> H v, H the second derivative of the mean loss over all images by the learned weights: the
    derivative of the gradient's product with v (Pearlmutter 1994). Vectors are lists in the order of `learned`;
    statistics of BatchNorm are constants. Attention is computed in plain operations, as torch's fused ones have no
    second derivative.
    """
    weights = [parameter for parameter in loss.network.parameters() if parameter.requires_grad]
    count = sum(len(labels) for _, labels in loss.batches)

    def times(vector: list[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in weights]
        for batch in loss.batches:
            share = len(batch[1]) / count
            with sdpa_kernel(SDPBackend.MATH):
                value = loss.of(batch) * share
            slopes = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
            products = [(slope * v).sum() for slope, v in zip(slopes, vector) if slope.requires_grad]
            if products:
                parts = torch.autograd.grad(sum(products), weights, materialize_grads=True)
                for part, whole in zip(parts, total):
                    whole += part
        return total

    return times


def require_second_derivative(loss: RunLoss) -> None:
    """UserError for a loss with a hand-written gradient, as DINO's: the product would silently lack its derivative."""
    waiting, met = [loss.of(loss.batches[0]).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise UserError(
                f"the loss of {loss.name} has no second derivative here, only a hand-written first one: use "
                "directions=random and eigenvalues=0"
            )
        met.add(node)
        waiting += [following for following, _ in node.next_functions]


def leading(loss: RunLoss, count: int, seed: int) -> tuple[list[float], list[Direction]]:
    """The largest eigenvalues of the Hessian, descending, and their eigenvectors, each as long as a random direction of
    `evaluation.inspect.landscape`, so that a shift of 1 is as far in both.

    Lanczos iterations with restarts (ARPACK's), from a seeded vector. If the loss `reestimates`, once before that.

    Raises:
        UserError: no convergence, fewer weights than that, or a loss without second derivative.
    """
    require_second_derivative(loss)
    if loss.reestimates:
        loss.reestimate()
    times, weights = hessian_times(loss), learned(loss.network)
    sizes = [weight.numel() for weight in weights.values()]
    length, example = sum(sizes), next(iter(weights.values()))
    if count >= length:
        raise UserError(f"{count} eigenvalues of {length} weights: ask for fewer")

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(vector.reshape(-1)).to(example).split(sizes)
        found = times([part.view(weight.shape) for part, weight in zip(parts, weights.values())])
        return torch.cat([part.reshape(-1) for part in found]).cpu().numpy()

    dtype = np.float64 if example.dtype == torch.float64 else np.float32
    start = torch.randn(length, generator=torch.Generator().manual_seed(seed)).numpy().astype(dtype)
    operator = LinearOperator((length, length), matvec=product, dtype=dtype)
    try:
        about = {"v0": start, "tol": TOLERANCE, "maxiter": MOST_RESTARTS, "ncv": min(length, max(20, 2 * count + 1))}
        values, vectors = eigsh(operator, count, which="LA", **about)
    except ArpackError as error:
        raise UserError(f"no {count} largest eigenvalues of {loss.name}: {error}; ask for fewer") from None
    scale, order = filter_norm(weights), np.argsort(-values)
    directions = []
    for i in order:
        parts = torch.from_numpy(np.ascontiguousarray(vectors[:, i])).to(example).split(sizes)
        directions.append({name: scale * part.view(w.shape) for (name, w), part in zip(weights.items(), parts)})
    return values[order].tolist(), directions
