"""Mean and covariance of any number of observations, in memory that does not grow with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Moments:
    """The number of observations, the mean of each of `width` values, and the products of their deviations from it.

    Blocks are combined by the pairwise update of Chan, Golub and LeVeque (1983), which keeps the digits that a
    difference of large sums would lose.
    """

    def __init__(self, width: int):
        import numpy as np

        self.count = 0
        self.mean = np.zeros(width)
        self.products = np.zeros((width, width))  # divided by count, this is the covariance

    def add(self, block: np.ndarray) -> None:
        """Add observations, float64 [n, width]."""
        mean, count = block.mean(axis=0), self.count + len(block)
        apart = mean - self.mean
        centred = block - mean
        self.products += centred.T @ centred
        self.products += apart[:, None] * apart * (self.count * len(block) / count)
        self.mean += apart * (len(block) / count)
        self.count = count
