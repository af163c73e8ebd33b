"""Batches of similar length under a token budget, so that little of the compute goes into padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def pad(sequences: list[list[int]], value: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists as a [batch, longest] tensor padded on the right, and its attention mask."""
    import torch

    longest = max(map(len, sequences))
    tokens = [sequence + [value] * (longest - len(sequence)) for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
