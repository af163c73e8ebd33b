"""Checks of the keys that the stages write: positions are in range, and parallel lists have equal lengths."""

from collections.abc import Mapping

from dynamicrag.rows.answer_forms import any_text
from dynamicrag.rows.row import RowError, finite, kind_of

POSITION_KEYS = ("true_id", "false_id", "sequence")
TRAJECTORY_KEYS = {  # parallel lists with one entry per trajectory, and the type of an entry
    "id_lists": list, "responses": str, "response_tokens": int, "response_scores": float | int, "score_terms": dict,
}


def check_written(row: Mapping, needs: tuple[str, ...]) -> None:
    """Check the keys in `needs` that earlier stages wrote. Raises RowError."""
    documents = len(row["docs"]) if "docs" in row else None
    for key in needs:
        if key == "answers" and not any_text(row["answers"]):
            raise RowError(key, "contains no gold answer")
        if key == "docs_shown" and (type(row[key]) is not int or not 0 <= row[key] <= (documents or 0)):
            raise RowError(key, f"expected an integer from 0 to {documents}, found {kind_of(row[key])}")
        if key == "baseline_response" and not isinstance(row[key], str):
            raise RowError(key, f"expected a string, found {kind_of(row[key])}")
        if key in POSITION_KEYS:
            # A sequence names labelled documents only
            labelled = key == "sequence" and {"true_id", "false_id"} <= {*needs}
            _check_positions(row[key], key, len(row["true_id"]) + len(row["false_id"]) if labelled else documents)
        elif key in TRAJECTORY_KEYS:
            _check_trajectories(row, key, row["docs_shown"] if "docs_shown" in needs else documents)


def _check_trajectories(row: Mapping, key: str, shown: int | None) -> None:
    """Check one of TRAJECTORY_KEYS. `shown` is the number of documents that a trajectory can name."""
    lists, kind = row[key], TRAJECTORY_KEYS[key]
    if not isinstance(lists, list) or not all(isinstance(value, kind) for value in lists):
        name = getattr(kind, "__name__", "number")
        raise RowError(key, f"expected a list of one {name} per trajectory, found {kind_of(lists)}")
    if len(lists) != len(row["id_lists"]):
        raise RowError(key, f"has {len(lists)} entries for {len(row['id_lists'])} id_lists")
    if key == "id_lists":
        for trajectory, ids in enumerate(lists):
            _check_positions(ids, f"id_lists[{trajectory}]", shown)
    if key == "response_scores":
        for trajectory, score in enumerate(lists):
            finite(score, f"response_scores[{trajectory}]")
    if key == "response_tokens" and any(type(tokens) is not int or tokens < 0 for tokens in lists):
        raise RowError(key, f"expected a list of integers of at least 0, found {kind_of(lists)}")
    if key == "score_terms":
        _check_terms(lists)


def _check_terms(lists: list[dict]) -> None:
    """Check that every trajectory has the same terms, including em, and that each is a number from 0 to 1."""
    for trajectory, terms in enumerate(lists):
        for term, value in {"em": None, **terms}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RowError(f"score_terms[{trajectory}].{term}",
                               f"expected a number from 0 to 1, found {kind_of(value)}")
        if terms.keys() != lists[0].keys():
            first = ", ".join(lists[0])
            raise RowError(f"score_terms[{trajectory}]", f"has {', '.join(terms)}, but the first one has {first}")


def check_result(row: Mapping) -> None:
    """Check the keys of an answered row that evaluate.py counts."""
    if not isinstance(row.get("id_list") or [], list):
        raise RowError("id_list", f"expected a list of positions, found {kind_of(row['id_list'])}")
    usage = row.get("usage") or {}
    if not isinstance(usage, dict) or not all(type(value) in (int, float, type(None)) for value in usage.values()):
        raise RowError("usage", f"expected an object of numbers, found {kind_of(usage)}")


def _check_positions(value: object, key: str, documents: int | None) -> None:
    if not isinstance(value, list) or not all(type(position) is int for position in value):
        raise RowError(key, f"expected a list of integers, found {kind_of(value)}")
    outside = next((p for p in value if p < 1 or (documents is not None and p > documents)), None)
    if outside is not None:
        raise RowError(key, f"{outside} is not the position of a document; expected 1 to {documents}")
