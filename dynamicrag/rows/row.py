"""A row and its documents: the keys that the stages read and write, and how errors name them."""

import math
from typing import Any, Required, TypedDict, cast

# Keys that inference.py and top_inference.py add to a row.
RESULT_KEYS = {"docs_shown", "candidates", "id_list", "final_docs", "response", "error", "usage"}


class Doc(TypedDict, total=False):
    """A retrieved passage in a row."""

    id: Required[str]
    title: Required[str]
    text: Required[str]
    score: float  # of the retriever
    rerank_score: float  # P(relevant), in [0, 1]
    rerank_label: str  # "true" if rerank_score > 0.5, else "false"


class Row(TypedDict, total=False):
    """A question and the keys that the stages have added to it. Positions are 1-based, into the documents shown.

    Every row has `id` and `question`. The other required keys are those that a stage names in `needs` before it reads
    them, so that read_rows refuses a row without them. Any other key may be missing.
    """

    id: Required[str]
    question: Required[str]
    source_id: str  # in the published file from which prepare_data.py took the row
    retrieved_question: str  # the question without its choices
    dataset: str
    choices: Any  # see choices.choices_of
    answers: Required[list[str]]
    qa_pairs: list[dict[str, Any]]  # ASQA's readings of the question, each with short_answers
    gold_docs: Any  # see gold.gold_documents
    positive_ctxs: Any
    docs: Required[list[Doc]]
    true_id: Required[list[int]]
    false_id: Required[list[int]]
    true_count: Required[int]
    sequence: Required[list[int]]
    sequence_length: int
    docs_shown: Required[int]
    id_lists: Required[list[list[int]]]
    selections: Required[list[str]]
    responses: Required[list[str]]
    response_tokens: Required[list[int]]
    from_expert: Required[list[bool]]
    invalid_selections: Required[list[str]]
    response_scores: Required[list[float]]
    score_terms: Required[list[dict[str, float]]]
    candidates: list[str]
    id_list: list[int]
    final_docs: list[str]
    response: str
    error: str
    usage: dict[str, int | None]  # None: not known


class RowError(ValueError):
    """An error in one row: the key and what was expected of its value."""

    def __init__(self, key: str, expected: str):
        super().__init__(f"key '{key}': {expected}")


def finite(value: object, where: str) -> float:
    """Return a number that a row has as a number or as text. Raises RowError, naming `where`, for any other value."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None  # published files store scores as strings
    except ValueError:
        number = None
    if number is None:
        raise RowError(where, f"expected a number, found {kind_of(value)}")
    if not math.isfinite(number):
        raise RowError(where, f"expected a finite number, found {number}")
    return number


def kind_of(value: object) -> str:
    """Return type and value for an error, at most 40 characters of the value."""
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def unanswered(row: Row) -> Row:
    """Return the row without the results of an earlier run, so that result and remain files can serve as inputs."""
    return cast(Row, {key: value for key, value in row.items() if key not in RESULT_KEYS})


def fail_unanswered(row: Row, reason: str) -> Row:
    """Return the row as written to the remain file, with `reason` as its `error`."""
    return {**unanswered(row), "error": reason}
