"""The contract between the stages: what a row is, and how rows are read and normalised.

A row is one question (row.py). Every stage reads rows through `read_rows`. It accepts the key names of common data sets (`ctxs`
for `docs`, `answer` or `golden_answers` for `answers`, `sample_id` for `id`), checks the keys that the stage needs, and
keeps unknown keys unchanged. The choices of a multiple-choice question (`choices`) are appended to its `question`,
which the LLM and the judge read. Retrieval uses the question without them (`retrieved_question`).
"""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, cast

from dynamicrag.files.jsonio import read_json
from dynamicrag.rows.answer_forms import ANSWER_KEYS, any_text, gold_answers, own_answers
from dynamicrag.rows.checks import check_result, check_written
from dynamicrag.rows.choices import choices_of, with_choices
from dynamicrag.rows.row import Doc, Row, RowError, finite, kind_of
from dynamicrag.rows.seen import Seen
from dynamicrag.rows.tasks import (
    CHOICE,
    READINGS_TASK,
    dataset_named,
    derive_dataset,
    known_task,
    name_of_file,
    readings_of,
)
from dynamicrag.stage import UserError

# ALCE uses the second, HotpotQA and 2WikiMultihopQA the third, TriviaQA the last.
ID_KEYS = ("id", "sample_id", "_id", "question_id")
DOCS_KEYS = ("docs", "ctxs")
DOC_ID_KEYS = ("id", "_id", "docid", "passage_id", "psg_id")
DOC_TEXT_KEYS = ("text", "contents", "doc", "passage_text")  # contents starts with the title if there is no key title
def read_rows(
    path: str | Path,
    needs: tuple[str, ...] = (),
    dataset: str | None = None,
    reject: Callable[[dict], object] | None = None,
    unique: bool = True,
    asked: Mapping[str, Mapping[str, Any]] | None = None,
    complete: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Yield the normalised rows of a JSON or JSONL file.

    `needs` lists the keys besides id and question that the stage requires. `dataset` overrides the data set of the
    rows. `asked` maps row ids to rows that supply missing keys (question, answers, data set, ...). `complete` may add
    keys that other tools do not write; it is called before `needs` are checked. Raises UserError naming file, line and
    key. With `reject`, a malformed row is passed to it and skipped instead. A line that is not JSON always raises
    UserError, because nothing after it can be trusted. A repeated id is an error unless `unique` is False.
    """
    seen = Seen()
    file_name = name_of_file(path)
    for line, value in read_json(path):
        try:
            row = normalise_row(_completed(value, asked or {}), needs, dataset, file_name, complete)
            if unique and (used := seen.add(row["id"], line)) is not None:
                raise RowError("id", f"{row['id']!r} is already used on line {used}; ids must be unique")
        except RowError as error:
            if reject is None:
                raise UserError(f"{path}:{line}: {error}") from error
            reject({"file": str(path), "line": line, "error": str(error), "row": value})
            continue
        yield row


def count_rows(
    path: str | Path, needs: tuple[str, ...] = (), skip_malformed: bool = False, dataset: str | None = None
) -> int:
    """Check every row of a file before the long work starts. Returns the number of rows; raises UserError if it is 0."""
    count = sum(1 for _ in read_rows(path, needs, dataset, (lambda _: None) if skip_malformed else None))
    if count == 0:
        raise UserError(f"{path}: contains no usable row; give a file with at least one valid row")
    return count


def normalise_row(
    value: object, needs: tuple[str, ...] = (), dataset: str | None = None, file_name: str = "",
    complete: Callable[[Row], None] | None = None,
) -> Row:
    """Return one decoded JSON value as a normalised row. `file_name` comes from tasks.name_of_file. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError("(the whole row)", f"expected a JSON object, found {kind_of(value)}")
    row: dict[str, Any] = dict(value)
    # Id and question
    row["id"] = _identifier(row)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise RowError("question", f"expected a non-empty string, found {kind_of(question)}")
    # Optional keys and answers
    for key, (accepts, expected) in OPTIONAL.items():
        if row.get(key) is not None and not accepts(row[key]):
            raise RowError(key, f"expected {expected}, found {kind_of(row[key])}")
    answers = gold_answers(row)
    if answers is not None:
        row["answers"] = answers
    # Documents
    docs_key = next((key for key in DOCS_KEYS if key in row), None)
    if docs_key is not None:
        docs = row.pop(docs_key)
        if not isinstance(docs, list):
            raise RowError(docs_key, f"expected a list of documents, found {kind_of(docs)}")
        row["docs"] = [normalise_doc(doc, position, docs_key) for position, doc in enumerate(docs, start=1)]
    # Data set and choices
    if not dataset and row.get("dataset") is not None and not _is_text(row["dataset"]):
        raise RowError("dataset", f"expected a string, found {kind_of(row['dataset'])}")
    named = dataset or row.get("dataset") or derive_dataset(row["id"], file_name)
    if not named and readings_of(row):
        named = READINGS_TASK
    if named is not None:
        row["dataset"] = dataset_named(named) or named
    _show_choices(row)
    # The keys that the stage needs
    if complete is not None:
        complete(cast(Row, row))
    for key in needs:
        if key not in row:
            empty = next((other for other in ANSWER_KEYS if other in row), None) if key == "answers" else None
            reason = "contains no gold answer" if empty else "missing; it comes from an earlier stage or the data set"
            raise RowError(empty or key, reason)
    check_written(row, needs)
    # The result of an earlier run
    if "response" in row:
        if isinstance(row["response"], list) and len(row["response"]) == 1 and isinstance(row["response"][0], str):
            row["response"] = row["response"][0]  # a list of one sample
        check_result(row)
    return cast(Row, row)


def normalise_doc(value: object, position: int, key: str = "docs") -> Doc:
    """Return one document of a row with string ids and texts and finite scores. Raises RowError."""
    if isinstance(value, dict) and _is_normal(value):
        return cast(Doc, value)
    where = f"{key}[{position - 1}]"
    if not isinstance(value, dict):
        raise RowError(where, f"expected an object with id, title and text, found {kind_of(value)}")
    doc: dict[str, Any] = dict(value)
    text_key = next((name for name in DOC_TEXT_KEYS if doc.get(name) is not None), DOC_TEXT_KEYS[0])
    text = doc.get(text_key)
    if not isinstance(text, str):
        expected = "a string" if text is not None else f"a string (or one of {', '.join(DOC_TEXT_KEYS[1:])})"
        raise RowError(f"{where}.{text_key}", f"expected {expected}, found {kind_of(text)}")
    id_key = next((name for name in DOC_ID_KEYS if doc.get(name) is not None), None)
    doc_id = doc[id_key] if id_key else f"doc{position}"
    if type(doc_id) not in (str, int) or doc_id == "":
        raise RowError(f"{where}.{id_key}", f"expected a non-empty string or an integer, found {kind_of(doc_id)}")
    if text_key == "contents" and doc.get("title") is None:
        doc["title"], text = title_and_text(text)
    doc |= {"id": str(doc_id), "title": doc.get("title") or "", "text": text}
    if text_key != "text":
        del doc[text_key]
    if not isinstance(doc["title"], str):
        raise RowError(f"{where}.title", f"expected a string, found {kind_of(doc['title'])}")
    for score in ("score", "rerank_score"):
        if doc.get(score) is not None:
            doc[score] = finite(doc[score], f"{where}.{score}")
    if "rerank_label" in doc:
        label = str(doc["rerank_label"]).lower()  # a JSON true counts as "true"
        if label not in ("true", "false"):
            raise RowError(f"{where}.rerank_label", f'expected "true" or "false", found {kind_of(doc["rerank_label"])}')
        doc["rerank_label"] = label
    return cast(Doc, doc)


def _is_normal(doc: dict) -> bool:
    """Return whether a document already has the form that normalise_doc gives it, as in every file of the stages."""
    get = doc.get
    score, rerank_score = get("score", 0.0), get("rerank_score", 0.0)
    return (
        type(get("text")) is str and type(get("title")) is str and type(get("id")) is str and get("id") != ""
        and (type(score) is float and isfinite(score)) and (type(rerank_score) is float and isfinite(rerank_score))
        and get("rerank_label", "true") in ("true", "false")
    )


def _identifier(row: dict) -> str:
    key = next((key for key in ID_KEYS if row.get(key) is not None), None)
    if key is None:
        raise RowError("id", "missing; every row needs a unique id")
    if isinstance(row[key], bool) or not isinstance(row[key], str | int) or row[key] == "":
        raise RowError(key, f"expected a non-empty string, found {kind_of(row[key])}")
    return str(row[key])


def title_and_text(contents: str) -> tuple[str, str]:
    """Split the `contents` of FlashRAG and Search-R1 into title and text: the first of several lines is the quoted title."""
    title, line_end, text = contents.partition("\n")
    return (title.strip().removeprefix('"').removesuffix('"'), text) if line_end else ("", contents)


def _show_choices(row: dict[str, Any]) -> None:
    """Append the row's choices to its question if it lacks them, and keep the bare question in `retrieved_question`."""
    try:
        choices = choices_of(row)
    except ValueError as error:
        task = known_task(row.get("dataset"))
        if task and task.instruction == CHOICE:
            raise RowError("choices", f"{error}, found {kind_of(row['choices'])}") from error
        return  # `choices` has another meaning in this data set
    question = row["question"]
    row["question"] = with_choices(question, choices)
    if row["question"] != question and row.get("retrieved_question") is None:
        row["retrieved_question"] = question


def _completed(value: object, asked: Mapping[str, Mapping[str, Any]]) -> object:
    """Fill the missing keys of a decoded row from the row of `asked` with the same id.

    Raises RowError for its id or answers.
    """
    if not isinstance(value, dict) or not asked:
        return value
    known = dict(asked.get(_identifier(value), {}))
    if any_text(own_answers(value)):
        known.pop("answers", None)
    if value.get("gold_docs") is not None or value.get("positive_ctxs"):
        known.pop("gold_docs", None)
    filled = {key: known_value for key, known_value in known.items() if key == "answers" or value.get(key) is None}
    return {**value, **filled}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_readings(value: object) -> bool:
    """Return whether the value is ASQA's qa_pairs: the readings of a question, each with short answers."""
    return isinstance(value, list) and all(
        isinstance(pair, dict) and isinstance(pair.get("short_answers"), list) and all(map(_is_text, pair["short_answers"]))
        for pair in value
    )


# Optional keys that stages read if a row has them.
OPTIONAL: dict[str, tuple[Callable[[object], bool], str]] = {
    "retrieved_question": (_is_text, "a string"),
    "qa_pairs": (_is_readings, "a list of objects with short_answers, each a list of strings"),
}
