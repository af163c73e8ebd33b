"""Quality of selections if the needed documents are known: precision, recall, and k compared with the needed k.

Documents are compared by id. A row's `gold_docs` lists the needed documents; an empty list means that none is needed
(such as for a sum). DPR's `positive_ctxs` is accepted too. If it is empty, or both keys are missing, nothing is known.
Other documents may contain the answer as well, so that precision is a lower bound.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError

UNANSWERED = "unanswered"  # column for questions without a known selection


class Chosen(NamedTuple):
    """The selection for one question, as numbers of distinct documents."""

    needed: int
    chosen: int | None  # None if the question was not answered
    right: int  # both chosen and needed
    retrieved: int | None  # both retrieved and needed; None if the row has no documents


def chosen_of(row: Row, path: str) -> Chosen | None:
    """Return the selection of a row; None if the needed documents are not known or an answered row has no final_docs.

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
    """Return the ids of the documents that an answer was generated from. Raises UserError naming file and row."""
    ids = row.get("final_docs")
    if not isinstance(ids, list) or not all(type(doc_id) in (str, int) for doc_id in ids):
        raise UserError(f"{path}: row {row['id']}: key 'final_docs': expected a list of document ids; correct or remove it")
    return set(map(str, ids))


def summarise_chosen(questions: Iterable[Chosen] | Counter[Chosen]) -> dict:
    """Return means over `questions`, all or the number of each, and the distribution of the chosen k by needed k.

    precision, recall and f1 (0 to 100) are over the questions that need a document; an empty selection gives 0 for
    each. exact is the share of all questions whose selection is exactly the needed documents. recall_ceiling is the
    recall of all retrieved documents. An unanswered question counts as wrong in all of them and has no k.
    """
    times = Counter(questions)  # few are different

    def mean(value: Callable[[Chosen], float], included: Callable[[Chosen], object], scale: float = 1) -> float | None:
        known = Counter({one: count for one, count in times.items() if included(one)})
        return scale * statistics.fmean(map(value, known.elements())) if known else None

    def total(value: Callable[[Chosen], int]) -> int:
        return sum(value(one) * count for one, count in times.items())

    counts: dict[int, Counter[str]] = {needed: Counter() for needed in sorted({one.needed for one in times})}
    for one in sorted(times, key=lambda one: (one.chosen is None, one.chosen or 0)):
        counts[one.needed][UNANSWERED if one.chosen is None else str(one.chosen)] += times[one]
    return {
        "n": times.total(),
        "needing_documents": sum(count for one, count in times.items() if one.needed),
        "precision": mean(lambda one: one.right / one.chosen if one.chosen else 0.0, _needing, 100),
        "recall": mean(lambda one: one.right / one.needed, _needing, 100),
        "f1": mean(lambda one: 2 * one.right / (one.needed + (one.chosen or 0)), _needing, 100),
        "exact": mean(lambda one: float(one.right == one.needed == one.chosen), lambda _: True, 100),
        "recall_ceiling": mean(lambda one: (one.retrieved or 0) / one.needed, lambda one: one.needed and one.retrieved is not None, 100),
        "gold_documents": total(lambda one: one.needed),
        "gold_retrieved": total(lambda one: one.retrieved or 0),
        "gold_chosen": total(lambda one: one.right),
        "needed_k": mean(lambda one: one.needed, lambda _: True),
        "chosen_k": mean(_chosen_k, _answered),
        "by_needed_k": {
            str(needed): {
                "chosen_k": mean(_chosen_k, lambda one, needed=needed: _answered(one) and one.needed == needed),
                "counts": dict(by_chosen),
            }
            for needed, by_chosen in counts.items()
        },
    }


def _needing(one: Chosen) -> bool:
    return one.needed > 0


def _answered(one: Chosen) -> bool:
    return one.chosen is not None


def _chosen_k(one: Chosen) -> int:
    return one.chosen or 0
