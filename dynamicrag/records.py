"""The contract between the stages: what a row is, read leniently and handed on in one form.

A row is one question. Every stage reads rows through `read_rows`, which accepts the names the field's data sets use
(`ctxs` for `docs`, `answer` or `golden_answers` for `answers`, `sample_id` for `id`), checks what the stage needs,
and passes keys it does not know through untouched.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from dynamicrag.jsonio import read_json
from dynamicrag.stage import UserError
from dynamicrag.tasks import derive_dataset

ID_KEYS = ("id", "sample_id")
ANSWER_KEYS = ("answers", "answer", "golden_answers", "output")
DOCS_KEYS = ("docs", "ctxs")
POSITION_KEYS = ("true_id", "false_id", "sequence")
TRAJECTORY_KEYS = {  # parallel lists: one of these a trajectory
    "id_lists": list, "responses": str, "response_tokens": int, "response_scores": float | int, "score_terms": dict,
}


class Doc(TypedDict, total=False):
    """A retrieved passage, as a row carries it."""

    id: str
    title: str
    text: str
    score: float  # the retriever's
    rerank_score: float  # P(relevant), in [0, 1]
    rerank_label: str  # "true" iff rerank_score > 0.5, else "false"


class Row(TypedDict, total=False):
    """A question and what the stages so far have added to it. Positions are 1-based into the documents shown."""

    id: str
    dataset: str
    question: str
    answers: list[str]
    docs: list[Doc]
    true_id: list[int]
    false_id: list[int]
    true_count: int
    sequence: list[int]
    sequence_length: int
    id_lists: list[list[int]]
    responses: list[str]
    response_tokens: list[int]
    from_expert: list[bool]
    response_scores: list[float]
    score_terms: list[dict[str, float]]
    id_list: list[int]
    response: str
    final_docs: list[str]
    usage: dict[str, int]


class RowError(ValueError):
    """What is wrong with one row: the key, and what was expected of it."""

    def __init__(self, key: str, expected: str):
        super().__init__(f"key '{key}': {expected}")


def read_rows(
    path: str | Path,
    needs: tuple[str, ...] = (),
    dataset: str | None = None,
    reject: Callable[[dict], None] | None = None,
    unique: bool = True,
    complete: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Stream the rows of a JSON or JSONL file in the project's own form.

    `needs` are the keys beyond id and question that this stage cannot do without. `dataset` overrides what the rows
    say. Raises UserError naming file, line and key; with `reject`, a malformed row is handed to it instead and
    skipped. (A line that is not JSON always raises: nothing after it can be trusted.) An id that comes again is an
    error of its row; without `unique` it is the caller's to see. `complete` may add keys that other tools do not write,
    before `needs` are checked.
    """
    seen: dict[str, int] = {}
    for line, value in read_json(path):
        try:
            row = normalise_row(value, needs, dataset, Path(path).stem, complete)
            if unique and row["id"] in seen:
                raise RowError("id", f"{row['id']!r} is already used on line {seen[row['id']]}; ids must be unique")
        except RowError as error:
            if reject is None:
                raise UserError(f"{path}:{line}: {error}") from error
            reject({"file": str(path), "line": line, "error": str(error), "row": value})
            continue
        seen[row["id"]] = line
        yield row


def count_rows(
    path: str | Path, needs: tuple[str, ...] = (), skip_malformed: bool = False, dataset: str | None = None
) -> int:
    """Check every row of a file before hours are spent on the first ones; returns how many there are."""
    count = sum(1 for _ in read_rows(path, needs, dataset, (lambda _: None) if skip_malformed else None))
    if count == 0:
        raise UserError(f"{path}: holds no usable row")
    return count


def normalise_row(
    value: object, needs: tuple[str, ...] = (), dataset: str | None = None, stem: str = "", complete: Callable[[Row], None] | None = None
) -> Row:
    """One decoded JSON value as a row. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError("(the whole row)", f"expected a JSON object, found {_kind(value)}")
    row = dict(value)
    row["id"] = _identifier(row)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise RowError("question", f"expected a non-empty string, found {_kind(question)}")
    for key, (accepts, expected) in OPTIONAL.items():
        if row.get(key) is not None and not accepts(row[key]):
            raise RowError(key, f"expected {expected}, found {_kind(row[key])}")
    answers = _answers(row)
    if answers is not None:
        row["answers"] = answers
    docs_key = next((key for key in DOCS_KEYS if key in row), None)
    if docs_key is not None:
        docs = row.pop(docs_key)
        if not isinstance(docs, list):
            raise RowError(docs_key, f"expected a list of documents, found {_kind(docs)}")
        row["docs"] = [normalise_doc(doc, position, docs_key) for position, doc in enumerate(docs, start=1)]
    if not dataset and row.get("dataset") is not None and not _is_text(row["dataset"]):
        raise RowError("dataset", f"expected a string, found {_kind(row['dataset'])}")
    named = dataset or row.get("dataset") or derive_dataset(row["id"], stem)
    if named is not None:
        row["dataset"] = named
    if complete is not None:
        complete(row)
    for key in needs:
        if key not in row:
            raise RowError(key, "missing; it is written by an earlier stage or is part of the data set")
    _check_written(row, needs)
    if "response" in row:
        _check_result(row)
    return row


def normalise_doc(value: object, position: int, key: str = "docs") -> Doc:
    """One document of a row: ids and texts are strings, scores finite numbers. Raises RowError."""
    where = f"{key}[{position - 1}]"
    if not isinstance(value, dict):
        raise RowError(where, f"expected an object with id, title and text, found {_kind(value)}")
    doc = dict(value)
    text = doc.get("text")
    if not isinstance(text, str):
        raise RowError(f"{where}.text", f"expected a string, found {_kind(text)}")
    if doc.get("id") is not None and (type(doc["id"]) not in (str, int) or doc["id"] == ""):
        raise RowError(f"{where}.id", f"expected a non-empty string or an integer, found {_kind(doc['id'])}")
    doc["id"] = str(doc["id"]) if doc.get("id") is not None else f"doc{position}"
    doc["title"] = doc.get("title") or ""
    if not isinstance(doc["title"], str):
        raise RowError(f"{where}.title", f"expected a string, found {_kind(doc['title'])}")
    for score in ("score", "rerank_score"):
        if doc.get(score) is not None:
            doc[score] = _finite(doc[score], f"{where}.{score}")
    if "rerank_label" in doc:
        label = str(doc["rerank_label"]).lower()  # a JSON true is "true": taken for anything else it would mean "false"
        if label not in ("true", "false"):
            raise RowError(f"{where}.rerank_label", f'expected "true" or "false", found {_kind(doc["rerank_label"])}')
        doc["rerank_label"] = label
    return doc


def _check_written(row: Row, needs: tuple[str, ...]) -> None:
    """The keys that earlier stages wrote, those a stage needs: positions name documents, parallel lists are parallel."""
    documents = len(row["docs"]) if "docs" in row else None
    for key in needs:
        if key == "answers" and not any(answer.strip() for answer in row["answers"] or ()):
            raise RowError(key, "holds no gold answer")
        if key == "docs_shown" and (type(row[key]) is not int or not 0 <= row[key] <= (documents or 0)):
            raise RowError(key, f"expected an integer from 0 to {documents}, found {_kind(row[key])}")
        if key in POSITION_KEYS:
            labelled = key == "sequence" and {"true_id", "false_id"} <= {*needs}  # a sequence names none but these
            _check_positions(row[key], key, len(row["true_id"]) + len(row["false_id"]) if labelled else documents)
        elif key in TRAJECTORY_KEYS:
            lists, kind = row[key], TRAJECTORY_KEYS[key]
            if not isinstance(lists, list) or not all(isinstance(value, kind) for value in lists):
                raise RowError(key, f"expected a list of one {getattr(kind, '__name__', 'number')} a trajectory, found {_kind(lists)}")
            if len(lists) != len(row["id_lists"]):
                raise RowError(key, f"has {len(lists)} entries for {len(row['id_lists'])} id_lists")
            if key == "id_lists":
                shown = row["docs_shown"] if "docs_shown" in needs else documents
                for trajectory, ids in enumerate(lists):
                    _check_positions(ids, f"id_lists[{trajectory}]", shown)
            if key == "response_scores":
                for trajectory, score in enumerate(lists):
                    _finite(score, f"response_scores[{trajectory}]")
            if key == "response_tokens" and any(type(tokens) is not int or tokens < 0 for tokens in lists):
                raise RowError(key, f"expected a list of integers from 0, found {_kind(lists)}")
            if key == "score_terms":
                _check_terms(lists)


def _check_terms(lists: list[dict]) -> None:
    """Every trajectory has the same terms, em among them, each a number from 0 to 1."""
    for trajectory, terms in enumerate(lists):
        for term, value in {"em": None, **terms}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RowError(f"score_terms[{trajectory}].{term}", f"expected a number from 0 to 1, found {_kind(value)}")
        if terms.keys() != lists[0].keys():
            raise RowError(f"score_terms[{trajectory}]", f"has {', '.join(terms)} where the first trajectory has {', '.join(lists[0])}")


def _check_result(row: Row) -> None:
    """What evaluate.py counts of an answered row."""
    if not isinstance(row.get("id_list") or [], list):
        raise RowError("id_list", f"expected a list of positions, found {_kind(row['id_list'])}")
    usage = row.get("usage") or {}
    if not isinstance(usage, dict) or not all(type(value) in (int, float) for value in usage.values()):
        raise RowError("usage", f"expected an object of numbers, found {_kind(usage)}")


def _check_positions(value: object, key: str, documents: int | None) -> None:
    if not isinstance(value, list) or not all(type(position) is int for position in value):
        raise RowError(key, f"expected a list of integers, found {_kind(value)}")
    outside = next((p for p in value if p < 1 or (documents is not None and p > documents)), None)
    if outside is not None:
        raise RowError(key, f"{outside} is not the position of a document; there are {documents}, counted from 1")


def _identifier(row: dict) -> str:
    key = next((key for key in ID_KEYS if row.get(key) is not None), None)
    if key is None:
        raise RowError("id", "missing; every row needs a unique id")
    if isinstance(row[key], bool) or not isinstance(row[key], str | int) or row[key] == "":
        raise RowError(key, f"expected a non-empty string, found {_kind(row[key])}")
    return str(row[key])


def _answers(row: dict) -> list[str] | None:
    """Gold answers from whichever key the data set uses; a lone string is one answer, never its characters."""
    key = next((key for key in ANSWER_KEYS if row.get(key) is not None), None)
    if key is None:
        if row.get("qa_pairs") is None:
            return None
        return list(dict.fromkeys(answer for pair in row["qa_pairs"] for answer in pair["short_answers"]))
    answers = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RowError(key, f"expected a string or a list of strings, found {_kind(row[key])}")
    return answers


def _finite(value: object, where: str) -> float:
    try:
        number = float(value) if type(value) in (int, float, str) else None  # published files carry scores as strings
    except ValueError:
        number = None
    if number is None:
        raise RowError(where, f"expected a number, found {_kind(value)}")
    if not math.isfinite(number):
        raise RowError(where, f"expected a finite number, found {number}")
    return number


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_readings(value: object) -> bool:
    """Whether it is ASQA's qa_pairs: the readings of a question, each with its short answers."""
    return isinstance(value, list) and all(
        isinstance(pair, dict) and isinstance(pair.get("short_answers"), list) and all(map(_is_text, pair["short_answers"])) for pair in value
    )


# Keys that a row need not have, and that stages read where it does.
OPTIONAL: dict[str, tuple[Callable[[object], bool], str]] = {
    "retrieved_question": (_is_text, "a string"),
    "qa_pairs": (_is_readings, "a list of objects with short_answers, each a list of strings"),
}


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
