"""Identifiers: how a selection of documents is written, and how what a model wrote is read.

A selection is an ordered list of 1-based positions into the documents shown: `[3], [1]`, or `None` for no document.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynamicrag.records import Doc, Row

NO_DOCUMENT = "None"
EXPERT_LENGTH = 14  # longest expert sequence, as published
_IDENTIFIER = re.compile(r"\[\s*(\d+)\s*\]", re.ASCII)
_NONE = re.compile(r"\bnone\b", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """What was read from a model's output. `valid` is False where it named no document shown and did not say None."""

    ids: list[int]
    valid: bool
    out_of_range: int = 0
    repeated: int = 0


def format_ids(ids: Sequence[int]) -> str:
    """Write a selection the way models are trained to write it."""
    return ", ".join(f"[{position}]" for position in ids) or NO_DOCUMENT


def parse_ids(text: str, n_docs: int) -> Selection:
    """Read a selection among `n_docs` documents from any text; the inverse of format_ids on what that writes.

    Identifiers `[n]` are taken in order; repeats and anything outside 1..n_docs are dropped and counted. Without any
    identifier the word None is the empty selection. Everything else is invalid, which is not the same as None.
    """
    ids: list[int] = []
    out_of_range = repeated = 0
    for match in _IDENTIFIER.finditer(text):
        digits = match[1].lstrip("0")
        # More digits than n_docs has cannot be in range, and int() refuses thousands of them.
        position = int(digits) if digits and len(digits) <= len(str(n_docs)) else 0
        if not 1 <= position <= n_docs:
            out_of_range += 1
        elif position in ids:
            repeated += 1
        else:
            ids.append(position)
    says_none = not out_of_range and _NONE.search(text) is not None
    return Selection(ids, bool(ids) or says_none, out_of_range, repeated)


def unjudged_position(docs: Sequence[Doc], positions: Sequence[int]) -> int | None:
    """The first of `positions` whose document was not judged as the others were: it has no rerank score and another has one, or no label either."""
    unscored = [position for position in positions if docs[position - 1].get("rerank_score") is None]
    if 0 < len(unscored) < len(positions):
        return unscored[0]
    return next((position for position in unscored if docs[position - 1].get("rerank_label") is None), None)


def best_first(docs: Sequence[Doc], positions: Sequence[int]) -> list[int]:
    """Positions by rerank score, best first; equal scores keep their order.

    Without scores the order of the documents stands for them: published training data has labels alone.
    """
    if any(docs[position - 1].get("rerank_score") is None for position in positions):
        return sorted(positions)
    return sorted(positions, key=lambda position: -docs[position - 1]["rerank_score"])


def expert_sequence(docs: Sequence[Doc], true_id: Sequence[int], max_length: int = EXPERT_LENGTH) -> list[int]:
    """What the reranker would select: its relevant documents, best first."""
    return best_first(docs, true_id)[:max_length]


def ids_pattern(n_docs: int) -> str:
    """A regular expression of every well-formed selection among `n_docs` documents, for constrained decoding.

    Repeats are not excluded (a regular expression that does is exponential in n_docs); parse_ids drops them.
    """
    if n_docs == 0:
        return NO_DOCUMENT
    identifier = rf"\[({'|'.join(map(str, range(1, n_docs + 1)))})\]"
    return rf"({NO_DOCUMENT}|{identifier}(, {identifier}){{0,{n_docs - 1}}})"


def summarise_selections(rows: Iterable[Row]) -> dict[str, float]:
    """What the model wrote, over all its samples: counts of malformed ones, and the mean and spread of k, shares, variety."""
    seen = dict.fromkeys(("questions", "trajectories", "malformed", "out_of_range", "repeated"), 0)
    valid = none = k = k_squared = distinct = answers = 0
    for row in rows:
        sampled = [trajectory for trajectory, expert in enumerate(row["from_expert"]) if not expert]
        texts = [row["selections"][trajectory] for trajectory in sampled] + row["invalid_selections"]
        parsed = [parse_ids(text, row["docs_shown"]) for text in texts]
        seen["questions"] += 1
        seen["trajectories"] += len(texts)
        seen["malformed"] += len(row["invalid_selections"])
        seen["out_of_range"] += sum(selection.out_of_range for selection in parsed)
        seen["repeated"] += sum(selection.repeated for selection in parsed)
        selections = [row["id_lists"][trajectory] for trajectory in sampled]
        valid += len(selections)
        none += selections.count([])
        k += sum(map(len, selections))
        k_squared += sum(len(ids) ** 2 for ids in selections)
        distinct += len(set(map(tuple, selections)))
        answers += len({row["responses"][trajectory] for trajectory in sampled})
    mean = k / max(valid, 1)
    return {
        **seen,
        "none_share": none / max(valid, 1),
        "k_mean": mean,
        "k_spread": max(k_squared / max(valid, 1) - mean**2, 0.0) ** 0.5,
        "distinct_selections": distinct / max(seen["questions"], 1),
        "distinct_answers": answers / max(seen["questions"], 1),
    }
