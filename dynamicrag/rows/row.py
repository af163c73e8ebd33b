"""A row and its documents: the keys that the stages read and write, and how errors name them."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Required, TypedDict, cast


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

    Every row has `id` and `question`. The other required keys are those that a stage reads according to STAGE_KEYS, so
    that read_rows refuses a row without them. Any other key may be missing.
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
    baseline_k: Required[int]
    baseline_response: Required[str]
    response_scores: Required[list[float]]
    score_terms: Required[list[dict[str, float]]]
    candidates: list[str]
    id_list: list[int]
    final_docs: list[str]
    response: str
    error: str
    usage: dict[str, int | None]  # None: not known


class StageKeys(NamedTuple):
    """The keys of rows that a stage reads and writes, besides id and question."""

    reads: tuple[str, ...] = ()  # a row without one of them is refused
    writes: tuple[str, ...] = ()
    computes: tuple[str, ...] = ()  # those of `reads` that the stage computes itself if a row lacks them
    reads_with: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # by flag: what it reads then instead of `reads`


# By the name of the script. docs/data.md describes the keys, and is compared with this table.
STAGE_KEYS = {
    "prepare_data": StageKeys(writes=("source_id",), reads_with=MappingProxyType({"--export_run": ("docs",)})),
    "split_data": StageKeys(),
    "retriever": StageKeys(writes=("docs",)),
    "aggregate": StageKeys(("docs",)),
    "reranker": StageKeys(("docs",), ("rerank_score", "rerank_label")),
    "process_training_data": StageKeys(("docs",), ("true_id", "false_id", "true_count", "sequence", "sequence_length")),
    "reranker_sequence": StageKeys(("docs", "true_id", "false_id", "sequence")),
    "split_for_sft_dpo": StageKeys(("docs", "true_id", "false_id")),
    "construct_generator_sft": StageKeys(("docs", "true_id")),
    "sampling_dpo_trajectories": StageKeys(
        ("docs",),
        ("docs_shown", "id_lists", "responses", "response_tokens", "from_expert", "selections", "invalid_selections", "baseline_k", "baseline_response", "usage"),
        reads_with=MappingProxyType({"--include-expert": ("docs", "true_id")}),
    ),
    "reward_trajectories": StageKeys(
        ("answers", "id_lists", "responses"), ("response_scores", "score_terms"),
        reads_with=MappingProxyType({
            "--length-of response": ("answers", "id_lists", "responses", "response_tokens"), "--reweight": ("id_lists", "score_terms"),
        }),
    ),
    **dict.fromkeys(("construct_dpo", "construct_best_of_n", "construct_kto"), StageKeys(
        ("docs", "docs_shown", "answers", "id_lists", "responses", "response_scores", "score_terms"), computes=("docs_shown", "score_terms")
    )),
    "grpo_selector": StageKeys(("docs", "answers")),
    "inference": StageKeys(("docs",), ("docs_shown", "id_list", "final_docs", "response", "error", "usage")),
    "top_inference": StageKeys(("docs",), ("candidates", "id_list", "final_docs", "response", "error", "usage")),
    "evaluate": StageKeys(),
    "evaluate_retrieval": StageKeys(("docs",)),
}
# Keys that inference.py and top_inference.py add to a row.
RESULT_KEYS = {*STAGE_KEYS["inference"].writes, *STAGE_KEYS["top_inference"].writes}


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
