"""Exact search for the k vectors of largest inner product: the result of brute force, several times faster.

Every vector is first compared in bfloat16 if the hardware supports it, otherwise in float32. bfloat16 has the range of
float32, so nothing overflows, and Cauchy-Schwarz bounds the rounding error of this comparison:

    |q.v - q'.v'| <= |q - q'| |v| + |q'| |v - v'|        q', v' the rounded query and vector.

The bound gives all vectors that may be among the k best. Only these, a few per requested document, are compared again
in float64. Scores are the float64 inner products rounded to float32; equal scores are in the order of the vectors. The
result therefore does not depend on batches, blocks, shards or the device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from dynamicrag.search.inner_products import NotFiniteError, as_tensor, best_first, inner_products
from dynamicrag.stage import log

if TYPE_CHECKING:
    import numpy as np
    import torch

# Vectors per matrix multiplication. The scores of a tile fit into a CPU's cache, and keep a GPU busy.
TILE_VECTORS = {"cpu": 4096, "cuda": 65536}
# Maximum number of scores in memory: a gigabyte.
MAX_SCORES = 1 << 29
# Scores are checked in groups of this size. Single scores are compared only if the group's maximum may be among the
# best.
GROUP = 64
# Vectors that share one bound of the rounding error. All candidates of a block are settled at its end.
BLOCK_VECTORS = 1 << 20
# Bytes of GPU memory that are reserved for scores and for a block that is not kept on the GPU.
GPU_RESERVE = 6 << 30
# Maximum number of candidates waiting for exact comparison, per requested document.
WAITING = 8


class ExactIndex:
    """Inner-product search over every vector, on a CPU or distributed over GPUs.

    On the CPU the vectors are memory-mapped, so that the workers on a machine share one copy. On GPUs they are kept in
    GPU memory in their own precision; blocks are assigned to the GPUs in turn.
    """

    def __init__(self, arrays: list[np.ndarray], devices: tuple[str, ...] = ("cpu",)):
        """`arrays` are float16 or float32, [n, width] each. Positions count through all of them."""
        self.count = sum(map(len, arrays))
        self._parts = [_Part(device) for device in devices]
        parts = cycle(self._parts)
        size = BLOCK_VECTORS if len(devices) == 1 else max(min(BLOCK_VECTORS, self.count // (8 * len(devices))), 1)
        offset = 0
        for array in arrays:
            for start in range(0, len(array), size):
                next(parts).add(array[start : start + size], offset + start)
            offset += len(array)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best vectors for each query, best first: scores float32 and positions int64, both [n, k].

        `queries` is float32 [n, width]. If there are fewer than k vectors, k is their number. Raises NotFiniteError.
        """
        import numpy as np

        k = min(k, self.count)
        with ThreadPoolExecutor(len(self._parts)) as pool:
            results = list(pool.map(lambda part: part.search(queries, k), self._parts))
        if len(results) == 1:
            return results[0]
        scores, positions = (np.concatenate(arrays, axis=1) for arrays in zip(*results, strict=True))
        return best_first(scores, positions, k)


@dataclass
class _Block:
    """Up to BLOCK_VECTORS vectors; the first one has the number `offset`."""

    vectors: torch.Tensor
    offset: int
    bounds: tuple[float, float] | None = None  # the largest norm of a vector, and of the rounding error of a vector


class _Part:
    """The blocks of one device, in ascending order."""

    def __init__(self, device: str):
        import torch

        from dynamicrag.models.device import pick_dtype

        self.device, self.blocks = device, []
        self.dtype = pick_dtype("auto", device)
        self.tile = TILE_VECTORS[device.split(":")[0]]
        # The error bound assumes sums in float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def add(self, vectors: np.ndarray, offset: int) -> None:
        import torch

        mapped = as_tensor(vectors)
        if self.device == "cpu" or torch.cuda.mem_get_info(self.device)[0] > GPU_RESERVE + mapped.nbytes:
            mapped = mapped.to(self.device)
        elif all(block.vectors.device.type != "cpu" for block in self.blocks):
            log.warning("%s: its memory is full; vectors from number %d on are copied to it in every pass", self.device, offset)
        self.blocks.append(_Block(mapped, offset))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.inference_mode():
            best = _Best(torch.from_numpy(queries).to(self.device), self.dtype, k)
            tile_size = min(self.tile, max(MAX_SCORES // len(queries) // GROUP, 1) * GROUP)
            size = (tile_size, queries.shape[1])
            exact, rough = (torch.empty(size, dtype=dtype, device=self.device) for dtype in (torch.float32, self.dtype))
            scores = torch.empty(len(queries) * tile_size, dtype=self.dtype, device=self.device)
            for stored in self.blocks:
                block = _Block(stored.vectors.to(self.device), stored.offset)
                if stored.bounds is None:
                    stored.bounds = self._measure(block, exact, rough)
                best.enter(block, stored.bounds)
                for start in range(0, len(block.vectors), tile_size):
                    tile = self._round(block, start, exact, rough)
                    into = scores[: len(queries) * len(tile)].view(len(queries), len(tile))
                    best.consider(torch.mm(best.rough, tile.T, out=into), start)
                best.settle()
                del block, best._block  # frees the memory for the next block if this one was sent to the GPU
            return best.scores.cpu().numpy(), best.positions.cpu().numpy()

    def _round(self, block: _Block, start: int, exact: torch.Tensor, rough: torch.Tensor) -> torch.Tensor:
        """Return a tile of the block in low precision, through two buffers.

        Direct conversion of float16 to bfloat16 is slower.
        """
        tile = block.vectors[start : start + len(exact)]
        return rough[: len(tile)].copy_(exact[: len(tile)].copy_(tile))

    def _measure(self, block: _Block, exact: torch.Tensor, rough: torch.Tensor) -> tuple[float, float]:
        length = lost = 0.0
        for start in range(0, len(block.vectors), len(exact)):
            rounded = self._round(block, start, exact, rough)
            tile = exact[: len(rounded)]
            lengths = tile.norm(dim=1)
            if not lengths.isfinite().all():
                raise NotFiniteError(block.offset + start + int(lengths.isfinite().logical_not().nonzero()[0]))
            length = max(length, lengths.max().item())
            lost = max(lost, tile.sub_(rounded).norm(dim=1).max().item())
        return length, lost


class _Best:
    """The k best vectors so far for each query, and the candidates that were not yet compared exactly."""

    def __init__(self, queries: torch.Tensor, dtype: torch.dtype, k: int):
        import torch

        self.exact, self.rough = queries.double(), queries.to(dtype)
        self.scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
        self.positions = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
        self.least = self.scores[:, -1]  # lower bound: scores below it are not among the best
        self._rough_length = self.rough.float().norm(dim=1)
        self._lost_length = (queries - self.rough.float()).norm(dim=1)
        self._waiting: list[tuple[torch.Tensor, ...]] = []  # query, row in the block, rough score
        self._count = 0

    def enter(self, block: _Block, bounds: tuple[float, float]) -> None:
        """Start a block with these bounds: later candidates belong to it."""
        longest, lost = bounds
        summation = 2 * self.exact.shape[1] * 2.0**-24  # error of a sum in float32, in any order
        self._error = self._lost_length * longest + self._rough_length * (lost + summation * longest)
        self._block = block

    def consider(self, rough: torch.Tensor, start: int) -> None:
        """Collect candidates from the rough scores [n, tile] of the vectors that start at row `start`."""
        n, size = rough.shape
        k = self.scores.shape[1]
        if self.least[0].isinf() and k <= size:  # first tile: its k-th best score is the bound
            self.least = self._at_least(rough.topk(k).values[:, -1].float(), self._error)
        # Rounded like the scores, which preserves their order, so that no candidate is lost.
        least = (self.least - self._error).to(rough.dtype)[:, None]
        if size % GROUP:
            query, row = (rough >= least).nonzero(as_tuple=True)
        else:
            grouped = rough.view(n, GROUP, -1)
            query, group = (grouped.amax(dim=1) >= least).nonzero(as_tuple=True)
            hit, inside = (grouped[query, :, group] >= least[query]).nonzero(as_tuple=True)
            query, row = query[hit], inside * (size // GROUP) + group[hit]
        if len(query):
            self._waiting.append((query, row + start, rough[query, row].float()))
            self._count += len(query)
            if self._count > WAITING * k * n:
                self._sift()
                if self._count > WAITING * k * n // 2:
                    self.settle()

    def _sift(self) -> tuple[torch.Tensor, ...]:
        """Raise the lower bound by the guaranteed scores of the waiting candidates, and drop candidates below it."""
        import torch

        query, row, rough = map(torch.cat, zip(*self._waiting, strict=True))
        order = (query * len(self._block.vectors) + row).argsort()
        query, row, rough = query[order], row[order], rough[order]
        error = self._error[query]
        at_least = torch.cat([self.scores, self._by_query(query, self._at_least(rough, error), -torch.inf)], dim=1)
        self.least = at_least.topk(self.scores.shape[1]).values[:, -1]
        keep = -self._at_least(-rough, error) >= self.least[query]
        self._waiting = [(query[keep], row[keep], rough[keep])]
        self._count = len(self._waiting[0][0])
        return self._waiting[0]

    def _at_least(self, rough: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """Return a lower bound of the exact score. The rough score has the given error and was then rounded."""
        import torch

        return rough - error - torch.finfo(self.rough.dtype).eps * rough.abs()

    def _by_query(self, query: torch.Tensor, values: torch.Tensor, filler: float) -> torch.Tensor:
        """Arrange values [m], sorted by query, as a table [n, maximum per query], filled with `filler`."""
        import torch

        counts = torch.bincount(query, minlength=len(self.scores))
        column = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        table = values.new_full((len(self.scores), int(counts.max())), filler)
        table[query, column] = values
        return table

    def settle(self) -> None:
        """Compare the waiting candidates exactly and keep the k best."""
        import torch

        if not self._waiting:
            return
        query, row, _ = self._sift()
        exact = inner_products(self._block.vectors, row, self.exact, query)
        # New candidates come after those already kept, so a stable sort leaves equal scores in the order of the
        # vectors.
        scores = torch.cat([self.scores, self._by_query(query, exact, -torch.inf)], dim=1)
        positions = torch.cat([self.positions, self._by_query(query, row + self._block.offset, -1)], dim=1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores = scores[:, : self.scores.shape[1]].contiguous()
        self.positions = positions.gather(1, order[:, : self.scores.shape[1]])
        self.least = torch.maximum(self.least, self.scores[:, -1])
        self._waiting, self._count = [], 0
