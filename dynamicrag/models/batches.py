"""Batches of similar length under a token budget, so that little of the compute goes into padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# For a tokenizer: masks and segments follow from the ids, and need not be returned.
IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}
BATCH_TOKENS_HELP = "padded tokens in a batch (2048 on a CPU, 16384 on a GPU)"


def default_batch_tokens(device: str) -> int:
    """A CPU is busy with one long text, and wastes less on padding in small batches; a GPU needs more to be busy."""
    return 2048 if device == "cpu" else 16384


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut positions 0..n-1 into batches of at most `budget` padded tokens (at least one sequence each).

    Longest first: where memory does not suffice, it shows at the start. Equal lengths stay in order, so that the
    batches depend on the lengths alone.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(position)
        else:
            batches.append([position])
    return batches


def pad(sequences: list[list[int]], value: int, device: str, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as a [batch, longest] tensor padded on the right (or the left), and its attention mask, on `device`."""
    import numpy as np
    import torch

    lengths = np.array([len(sequence) for sequence in sequences])  # numpy: ten times as fast as tensors made of lists
    places = np.arange(lengths.max())
    filled = (places[::-1] if left else places) < lengths[:, None]
    padded = np.full(filled.shape, value, dtype=np.int64)
    padded[filled] = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=int(lengths.sum()))
    ids, mask = torch.from_numpy(padded), torch.from_numpy(filled.astype(np.int64))
    if device.startswith("cuda"):  # from pinned memory: such a copy does not wait for the batches before it
        return tuple(part.pin_memory().to(device, non_blocking=True) for part in (ids, mask))
    return ids.to(device), mask.to(device)
