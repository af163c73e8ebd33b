"""The k best vectors for each query: candidates by rough scores, and their exact comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamicrag.search.inner_products import inner_products

if TYPE_CHECKING:
    import torch

# Rough scores are checked in groups of this size. Single scores are compared only if the group's maximum may be among
# the best.
GROUP = 32
# Maximum number of candidates waiting for exact comparison, per requested document.
WAITING = 4
# The first bound is the k-th best of fewer than this many scores per requested document, the maxima of larger groups.
ENOUGH = 16
# Error of a product that is too small for float32 and becomes zero, for all products of a score.
UNDERFLOW = 2.0**-110


class Candidates:
    """The k best vectors so far for each query, and the candidates that were not yet compared exactly.

    Queries are scaled by powers of two to a length of at most 1. Rough scores and their bounds are those of scaled
    queries.
    """

    def __init__(self, queries: torch.Tensor, dtype: torch.dtype, k: int):
        import torch

        n, width = queries.shape
        self.scores = torch.full((n, k), -torch.inf, device=queries.device)
        self.positions = torch.full((n, k), -1, dtype=torch.int64, device=queries.device)
        self._exact, self._dtype = queries.double(), dtype
        exponents = queries.abs().amax(dim=1).frexp().exponent + (width.bit_length() + 1) // 2
        self._scale = torch.ldexp(torch.ones(n, device=queries.device), -exponents.clamp(-100, 120))
        self._queries = queries * self._scale[:, None]
        self._least = self.scores[:, -1]  # lower bound: scores below it are not among the best
        self._waiting: list[tuple[torch.Tensor, ...]] = []  # query, row in the block, lower and upper bound of the score
        self._count = 0

    def enter(self, vectors: torch.Tensor, offset: int, factor: float) -> torch.Tensor:
        """Start a block whose rounded vectors are smaller by `factor`. Return the rounded queries, [width, n]."""
        self._vectors, self._offset = vectors, offset
        rough = (self._queries * factor).to(self._dtype)
        lengths = self._queries.norm(dim=1)
        lost = (rough.float() / factor - self._queries).norm(dim=1)
        summation = 2 * len(rough.T) * 2.0**-24  # error of a sum in float32, in any order
        # The bound of Cauchy-Schwarz is linear in the two bounds of the vectors.
        self._errors = lost + summation * (lengths + lost), lengths
        return rough.T

    def consider(self, rough: torch.Tensor, start: int, bounds: torch.Tensor) -> None:
        """Collect candidates from the rough scores [tile, n] of the vectors that start at row `start`.

        `bounds` are the largest norm of such a vector and the largest norm of its rounding error.
        """

        k = self.scores.shape[1]
        error = bounds[0] * self._errors[0] + bounds[1] * self._errors[1] + UNDERFLOW
        whole = len(rough) - len(rough) % GROUP
        for rows, group in ((rough[:whole], GROUP), (rough[whole:], 1)):
            if len(rows):
                self._collect(rows.view(-1, group, len(error)), start, error)
            start += len(rows)
        if self._count > WAITING * k * len(error):
            self._sift()
            if self._count > WAITING * k * len(error) // 2:
                self.settle()

    def _collect(self, grouped: torch.Tensor, start: int, error: torch.Tensor) -> None:
        """Collect candidates from rough scores [groups, size, n]."""
        import torch

        k = self.scores.shape[1]
        # Bits are compared, four times as fast. If a group has numbers above zero, this gives the largest one.
        bits = torch.int16 if grouped.dtype == torch.bfloat16 else torch.int32
        maxima = grouped.view(bits).amax(dim=1).view(grouped.dtype)
        if self._least[0].isinf() and k <= len(maxima) * grouped.shape[1]:  # the k-th best of different vectors is a bound
            different = maxima if k <= len(maxima) else grouped.view(-1, len(error))
            while len(different) >= ENOUGH * k:
                different = torch.maximum(*different[: len(different) // 2 * 2].view(2, -1, len(error)))
            self._least = self._between(different.T.contiguous().topk(k).values[:, -1].float(), error)[0]
        # Rounded like the scores, which preserves their order, so that no candidate is lost.
        least = (self._least - error).to(grouped.dtype)
        if least.min() <= 0:
            maxima = grouped.amax(dim=1)
        group, query = (maxima >= least).nonzero(as_tuple=True)
        members = grouped[group, :, query]
        hit, inside = (members >= least[query][:, None]).nonzero(as_tuple=True)
        if len(hit):
            query, row = query[hit], group[hit] * grouped.shape[1] + inside + start
            self._waiting.append((query, row, *self._between(members[hit, inside].float(), error[query])))
            self._count += len(hit)

    def leave(self) -> None:
        """End the block."""
        self.settle()
        del self._vectors

    def settle(self) -> None:
        """Compare the waiting candidates exactly and keep the k best."""
        import torch

        if not self._waiting:
            return
        query, row, *_ = self._sift()
        exact = inner_products(self._vectors, row, self._exact, query)
        # New candidates come after those already kept, so a stable sort leaves equal scores in the order of the
        # vectors.
        scores = torch.cat([self.scores, self._by_query(query, exact, -torch.inf)], dim=1)
        positions = torch.cat([self.positions, self._by_query(query, row + self._offset, -1)], dim=1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        k = self.scores.shape[1]
        self.scores = scores[:, :k].contiguous()
        self.positions = positions.gather(1, order[:, :k])
        self._least = torch.maximum(self._least, self.scores[:, -1] * self._scale)
        self._waiting, self._count = [], 0

    def _sift(self) -> tuple[torch.Tensor, ...]:
        """Raise the lower bound by the guaranteed scores of the waiting candidates, and drop candidates below it."""
        import torch

        query, row, lower, upper = map(torch.cat, zip(*self._waiting, strict=True))
        order = (query * len(self._vectors) + row).argsort()
        query, row, lower, upper = query[order], row[order], lower[order], upper[order]
        at_least = torch.cat([self.scores * self._scale[:, None], self._by_query(query, lower, -torch.inf)], dim=1)
        self._least = torch.maximum(self._least, at_least.topk(self.scores.shape[1]).values[:, -1])
        keep = upper >= self._least[query]
        self._waiting = [(query[keep], row[keep], lower[keep], upper[keep])]
        self._count = len(self._waiting[0][0])
        return self._waiting[0]

    def _between(self, rough: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bounds of the exact score. The rough score has the given error and was then rounded to nearest."""
        import torch

        error = error + torch.finfo(self._dtype).eps / 2 * rough.abs()
        return rough - error, rough + error

    def _by_query(self, query: torch.Tensor, values: torch.Tensor, filler: float) -> torch.Tensor:
        """Arrange values [m], sorted by query, as a table [n, maximum per query], filled with `filler`."""
        import torch

        counts = torch.bincount(query, minlength=len(self.scores))
        column = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        table = values.new_full((len(self.scores), int(counts.max())), filler)
        table[query, column] = values
        return table
