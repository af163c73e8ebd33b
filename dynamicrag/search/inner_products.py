"""Candidates compared exactly: inner products in float64, rounded to float32, and their order.

Whatever proposed a candidate, a first comparison in low precision or a compressed index, this is what decides.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

# Compared at once: on a CPU their vectors in float64 stay in its cache (3 MB at 768 dimensions); a GPU needs more to be busy (100 MB).
RESCORED = {"cpu": 512, "cuda": 16384}


class NotFiniteError(ValueError):
    """A vector that cannot be compared: NaN, infinity, or longer than float32 can say. `position` is its number."""

    def __init__(self, position: int):
        super().__init__(f"vector {position} is not finite")
        self.position = position


def best_first(scores: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of each row; equal scores by position."""
    import numpy as np

    order = np.lexsort((positions, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)


def rescore(arrays: list[np.ndarray], queries: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the candidates an approximate index found, [n, any] positions (-1 for none), by their exact scores.

    As ExactIndex.search; where there are fewer than k candidates, the last positions are -1. Raises NotFiniteError.
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
    """vectors[row] . exact[query], summed in float64: float32 of the length of row and query."""
    import torch

    scores = torch.empty(len(row), device=vectors.device)  # made first: kept results between freed vectors would spread them over memory
    size = RESCORED[vectors.device.type]
    for of_some, rows, queries in zip(scores.split(size), row.split(size), query.split(size), strict=True):
        of_some.copy_((vectors[rows].double() * exact[queries]).sum(dim=1))
    return scores


def as_tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        return torch.from_numpy(array)
