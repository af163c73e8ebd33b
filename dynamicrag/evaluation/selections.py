"""How well documents were chosen, where it is known which ones a question needs: precision, recall, and k against needed k.

Documents are compared by id. A row's `gold_docs` names those needed, and an empty list that none is (a sum, say); DPR's
`positive_ctxs` is read too, and empty, or without either key, nothing is known. Another document may hold the answer as
well as a gold one: precision is a lower bound.
"""

import statistics
from collections import Counter
from typing import NamedTuple

from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.records import Row
from dynamicrag.stage import UserError

UNANSWERED = "unanswered"  # the column of questions for which no selection is known


class Chosen(NamedTuple):
    """One question, in numbers of distinct documents."""

    needed: int
    chosen: int | None  # None where it was not answered
    right: int  # both chosen and needed
    retrieved: int | None  # both retrieved and needed; None where the row has no documents


def chosen_of(row: Row, path: str) -> Chosen | None:
    """What was chosen for a row and what it needs; None where that is not known, or an answer came without final_docs.

    Raises UserError naming file, row and key.
    """
    needed = needed_documents(row, path)
    if needed is None:
        return None
    retrieved = len(needed & {doc["id"] for doc in row["docs"]}) if "docs" in row else None
    if not isinstance(row.get("response"), str):
        return Chosen(len(needed), None, 0, retrieved)
    if "final_docs" not in row:
        return None
    chosen = final_ids(row, path)
    return Chosen(len(needed), len(chosen), len(needed & chosen), retrieved)


def final_ids(row: Row, path: str) -> set[str]:
    """The ids of the documents an answer was given from. Raises UserError naming file and row."""
    found = row["final_docs"]
    if not isinstance(found, list) or not all(type(doc_id) in (str, int) for doc_id in found):
        raise UserError(f"{path}: row {row['id']}: key 'final_docs': expected a list of document ids; correct or remove it")
    return set(map(str, found))


def summarise_chosen(questions: list[Chosen]) -> dict:
    """Means of `questions` (n,), and how many documents were chosen by how many are needed.

    precision, recall and f1, on 0 to 100, are over the questions that need a document; to choose none of one is 0 in all
    three. exact, the share whose documents are those needed and no other, is over all; recall_ceiling is the recall of
    choosing every document retrieved. An unanswered question counts as wrong in all of them, and has no k.
    """
    needing = [one for one in questions if one.needed]
    ceiling = [one.retrieved / one.needed for one in needing if one.retrieved is not None]
    answered = [one for one in questions if one.chosen is not None]
    counts: dict[int, Counter[str]] = {needed: Counter() for needed in sorted({one.needed for one in questions})}
    for one in sorted(questions, key=lambda one: (one.chosen is None, one.chosen)):
        counts[one.needed][UNANSWERED if one.chosen is None else str(one.chosen)] += 1
    return {
        "n": len(questions),
        "needing_documents": len(needing),
        "precision": _mean([one.right / one.chosen if one.chosen else 0.0 for one in needing], 100),
        "recall": _mean([one.right / one.needed for one in needing], 100),
        "f1": _mean([2 * one.right / (one.needed + (one.chosen or 0)) for one in needing], 100),
        "exact": _mean([float(one.right == one.needed == one.chosen) for one in questions], 100),
        "recall_ceiling": _mean(ceiling, 100),
        "gold_documents": sum(one.needed for one in questions),
        "gold_retrieved": sum(one.retrieved or 0 for one in questions),
        "gold_chosen": sum(one.right for one in questions),
        "needed_k": _mean([one.needed for one in questions]),
        "chosen_k": _mean([one.chosen for one in answered]),
        "by_needed_k": {
            str(needed): {
                "chosen_k": _mean([one.chosen for one in answered if one.needed == needed]),
                "counts": dict(found),
            }
            for needed, found in counts.items()
        },
    }


def _mean(values: list[float], scale: float = 1) -> float | None:
    return scale * statistics.fmean(values) if values else None
