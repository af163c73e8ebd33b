"""Exact comparison of candidates: inner products in float64, rounded to float32, and their order.

These scores are final, whether a candidate was proposed by a low-precision comparison or by a compressed index.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

# Candidates per step. On a CPU their float64 vectors fit into the cache (3 MB at 768 dimensions); a GPU needs more (100
# MB).
RESCORED = {"cpu": 512, "cuda": 16384}


class NotFiniteError(ValueError):
    """A vector with NaN, infinity, or a norm beyond float32. `position` is its number."""

    def __init__(self, position: int):
        super().__init__(f"vector {position} is not finite")
        self.position = position


def best_first(scores: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best scores of each row and their positions; equal scores are ordered by position."""
    import numpy as np

    order = np.lexsort((positions, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)


def rescore(arrays: list[np.ndarray], queries: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best candidates of an approximate index by their exact scores; `positions` is [n, any], -1 for none.

    The result has the form of ExactIndex.search. With fewer than k candidates, the last positions are -1. Raises
    NotFiniteError.
    """
    import numpy as np
    import torch

    scores = np.full(positions.shape, -np.inf, dtype=np.float32)
    exact = torch.from_numpy(queries).double()
    offset = 0
    for array in arrays:
        query, column = np.nonzero((positions >= offset) & (positions < offset + len(array)))
        row = torch.from_numpy(positions[query, column] - offset)
        scores[query, column] = inner_products(as_tensor(array), row, exact, torch.from_numpy(query)).numpy()
        offset += len(array)
    wrong = ~np.isfinite(scores) & (positions >= 0)
    if wrong.any():
        raise NotFiniteError(int(positions[wrong][0]))
    scores, positions = best_first(scores, np.where(positions < 0, offset, positions), k)
    return scores, np.where(positions == offset, -1, positions)


def inner_products(vectors: torch.Tensor, row: torch.Tensor, exact: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return vectors[row] . exact[query], summed in float64, as float32; `row` and `query` have the same length."""
    import torch

    # Allocated once: results between freed vectors would fragment the memory.
    scores = torch.empty(len(row), device=vectors.device)
    size = min(RESCORED[vectors.device.type], len(row))
    stored = torch.empty(size, vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    products, factors = torch.empty(2, size, vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for of_some, rows, queries in zip(scores.split(size), row.split(size), query.split(size), strict=True):
        buffers = stored[: len(rows)], products[: len(rows)], factors[: len(rows)]
        torch.index_select(vectors, 0, rows, out=buffers[0])  # copies rows; an index would copy single numbers
        torch.index_select(exact, 0, queries, out=buffers[2])
        of_some.copy_(buffers[1].copy_(buffers[0]).mul_(buffers[2]).sum(dim=1))
    return scores


def as_tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the tensor is only read
        return torch.from_numpy(array)
