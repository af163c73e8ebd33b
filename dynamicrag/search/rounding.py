"""Low precision: rounded vectors and queries, and bounds of their rounding errors.

bfloat16 has the range of float32, so nothing overflows. A conversion of float16 would take twice as long as this: its bits
after the sign, shifted by three places, are the bits of a bfloat16, the number divided by 2 ** 112 and without the last three bits
of its fraction. The rounded queries contain the missing factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamicrag.search.inner_products import NotFiniteError

if TYPE_CHECKING:
    import torch

SHIFT, KEPT = 3, -0x7001  # a shift copies the sign to the three bits after it; the mask removes them
# The missing factor. Without their last bits numbers are smaller by 0.2 % on average; the factor corrects the mean.
MISSING = 2.0**112 * (1 + 7 / 3072)
SUBNORMAL = 1.1754942e-38  # the largest number that some processors take as zero
MEASURED = 512  # vectors measured at a time on a CPU, so that they stay in its cache


def factor(stored: torch.dtype, rough: torch.dtype) -> float:
    """Return the factor by which rounded vectors are smaller than the stored vectors."""
    import torch

    return MISSING if (stored, rough) == (torch.float16, torch.bfloat16) else 1.0


def round_vectors(vectors: torch.Tensor, rough: torch.Tensor) -> torch.Tensor:
    """Write the rounded vectors, divided by `factor`, to `rough`, and return it."""
    import torch

    if factor(vectors.dtype, rough.dtype) == 1:
        return rough.copy_(vectors)
    torch.bitwise_right_shift(vectors.view(torch.int16), SHIFT, out=rough.view(torch.int16)).bitwise_and_(KEPT)
    return rough


def measure(vectors: torch.Tensor, rough: torch.Tensor, number: int) -> torch.Tensor:
    """Return the largest norm of a vector, rounded or not, and the largest norm of a rounding error, [2].

    `number` is the number of the first vector. Raises NotFiniteError.
    """
    import torch

    step = len(vectors) if vectors.is_cuda else MEASURED
    buffers = torch.empty(2, step, vectors.shape[1], device=vectors.device)
    bounds = torch.zeros(2, device=vectors.device)
    for start in range(0, len(vectors), step):
        some = vectors[start : start + step]
        exact, seen = buffers[:, : len(some)]
        lengths = torch.linalg.vector_norm(exact.copy_(some), dim=1)
        if not lengths.isfinite().all():
            raise NotFiniteError(number + start + int(lengths.isfinite().logical_not().nonzero()[0]))
        torch.ops.aten.hardshrink.out(seen.copy_(rough[start : start + step]), SUBNORMAL, out=seen)
        lost = torch.linalg.vector_norm(exact.sub_(seen, alpha=factor(vectors.dtype, rough.dtype)), dim=1).max()
        bounds = bounds.maximum(torch.stack([lengths.max() + lost, lost]))
    return bounds
