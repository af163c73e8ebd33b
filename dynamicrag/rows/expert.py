"""The expert that is cloned: the reranker's relevant documents, best first."""

from collections.abc import Sequence

from dynamicrag.rows.row import Doc

EXPERT_LENGTH = 14  # maximum length of an expert sequence in the paper


def unjudged_position(docs: Sequence[Doc], positions: Sequence[int]) -> int | None:
    """Return the first of `positions` whose document lacks a rerank score; None if all are judged alike.

    If no document has a score, a rerank_label is enough.
    """
    unscored = [position for position in positions if docs[position - 1].get("rerank_score") is None]
    if 0 < len(unscored) < len(positions):
        return unscored[0]
    return next((position for position in unscored if docs[position - 1].get("rerank_label") is None), None)


def best_first(docs: Sequence[Doc], positions: Sequence[int]) -> list[int]:
    """Return the positions by rerank score, best first; equal scores keep their order.

    If a score is missing, the positions are sorted instead: published training data has labels only, with the documents
    in order.
    """
    scores = {position: docs[position - 1].get("rerank_score") for position in positions}
    known = {position: score for position, score in scores.items() if score is not None}
    if len(known) < len(scores):
        return sorted(positions)
    return sorted(positions, key=lambda position: -known[position])


def expert_sequence(docs: Sequence[Doc], true_id: Sequence[int], max_length: int = EXPERT_LENGTH) -> list[int]:
    """Return the selection of the reranker: its relevant documents, best first, at most `max_length`."""
    return best_first(docs, true_id)[:max_length]
