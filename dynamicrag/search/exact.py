"""Exact search for the k vectors of largest inner product: the result of brute force, several times faster.

Every vector is first compared in bfloat16 if the hardware supports it, otherwise in float32. bfloat16 has the range of
float32, so nothing overflows, and Cauchy-Schwarz bounds the rounding error of this comparison:

    |q.v - q'.v'| <= |q - q'| |v'| + |q| |v - v'|        q', v' the rounded query and vector.

The bound gives all vectors that may be among the k best. Only these, a few per requested document, are compared again
in float64. Scores are the float64 inner products rounded to float32; equal scores are in the order of the vectors. The
result therefore does not depend on batches, blocks, shards or the device.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from dynamicrag.search.candidates import Candidates
from dynamicrag.search.inner_products import as_tensor, best_first
from dynamicrag.search.rounding import factor, measure, round_vectors
from dynamicrag.stage import log

if TYPE_CHECKING:
    import numpy as np
    import torch

# Vectors per matrix multiplication. They share one bound of the rounding error.
UNIT_VECTORS = {"cpu": 4096, "cuda": 16384}
# Maximum number of scores whose candidates are collected at a time. They fit into a CPU's cache, and keep a GPU busy.
TILE_SCORES = {"cpu": 1 << 23, "cuda": 1 << 28}
# All candidates of a block are settled at its end.
BLOCK_VECTORS = 1 << 20
# Bytes of GPU memory that are reserved for scores and for a block that is not kept on the GPU.
GPU_RESERVE = 6 << 30


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
        if len(self._parts) == 1:  # not in a thread, which would have a second team of OpenMP threads on the same cores
            return self._parts[0].search(queries, k)
        with ThreadPoolExecutor(len(self._parts)) as pool:
            results = list(pool.map(lambda part: part.search(queries, k), self._parts))
        scores, positions = (np.concatenate(arrays, axis=1) for arrays in zip(*results, strict=True))
        return best_first(scores, positions, k)


@dataclass
class _Block:
    """Up to BLOCK_VECTORS vectors; the first one has the number `offset`.

    `bounds` has those of `measure` for each unit of vectors, [units, 2]. The first search measures them.
    """

    vectors: torch.Tensor
    offset: int
    bounds: torch.Tensor  # allocated first: results between freed vectors would fragment the memory
    measured: int = 0  # units


class _Part:
    """The blocks of one device, in ascending order."""

    def __init__(self, device: str):
        import torch

        from dynamicrag.models.device import pick_dtype

        self.device, self.blocks = device, []
        self.dtype = pick_dtype("auto", device)
        self.unit, self.tile_scores = (sizes[device.split(":")[0]] for sizes in (UNIT_VECTORS, TILE_SCORES))
        # The error bound assumes sums in float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def add(self, vectors: np.ndarray, offset: int) -> None:
        import torch

        mapped = as_tensor(vectors)
        if self.device == "cpu" or torch.cuda.mem_get_info(self.device)[0] > GPU_RESERVE + mapped.nbytes:
            mapped = mapped.to(self.device)
        elif all(block.vectors.device.type != "cpu" for block in self.blocks):
            log.warning("%s: its memory is full; vectors from number %d on are copied to it in every pass", self.device, offset)
        bounds = torch.empty(-(-len(mapped) // self.unit), 2, device=self.device)
        self.blocks.append(_Block(mapped, offset, bounds))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        n, width = queries.shape
        with torch.inference_mode():
            candidates = Candidates(torch.from_numpy(queries).to(self.device), self.dtype, k)
            rough = torch.empty(self.unit, width, dtype=self.dtype, device=self.device)
            size = max(self.tile_scores // n // self.unit, 1) * self.unit
            scores = torch.empty(min(size, BLOCK_VECTORS), n, dtype=self.dtype, device=self.device)
            for block in self.blocks:
                vectors = block.vectors.to(self.device)
                rough_queries = candidates.enter(vectors, block.offset, factor(vectors.dtype, self.dtype))
                for start in range(0, len(vectors), size):
                    tile = vectors[start : start + size]
                    of_tile = scores[: len(tile)]
                    for number, unit in enumerate(tile.split(self.unit)):
                        rounded = self._round(block, unit, start // self.unit + number, rough)
                        torch.mm(rounded, rough_queries, out=of_tile[number * self.unit :][: len(unit)])
                    bounds = block.bounds[start // self.unit : (start + size) // self.unit]
                    candidates.consider(of_tile, start, bounds.amax(dim=0))
                candidates.leave()
                del vectors, tile, unit  # frees the memory for the next block if this one was sent to the GPU
            return candidates.scores.cpu().numpy(), candidates.positions.cpu().numpy()

    def _round(self, block: _Block, vectors: torch.Tensor, number: int, buffer: torch.Tensor) -> torch.Tensor:
        """Return the vectors of a unit in low precision, made in the buffer."""
        rounded = round_vectors(vectors, buffer[: len(vectors)])
        if number == block.measured:
            block.bounds[number] = measure(vectors, rounded, block.offset + number * self.unit)
            block.measured += 1
        return rounded
