"""The contract between the stages: what a row is, and how rows are read and normalised.

A row is one question. Every stage reads rows through `read_rows`. It accepts the key names of common data sets (`ctxs`
for `docs`, `answer` or `golden_answers` for `answers`, `sample_id` for `id`), checks the keys that the stage needs, and
keeps unknown keys unchanged. The choices of a multiple-choice question (`choices`) are appended to its `question`,
which the LLM and the judge read. Retrieval uses the question without them (`retrieved_question`).
"""

import ast
import io
import itertools
import math
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import orjson

from dynamicrag.files.jsonio import read_json
from dynamicrag.rows.choices import choices_of, with_choices
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
# ARC uses answerKey, PopQA possible_answers. answer_aliases (MuSiQue, 2WikiMultihopQA) are added to any of these.
ANSWER_KEYS = ("answers", "answer", "golden_answers", "possible_answers", "output", "answerKey")
ALIASES_KEY = "answer_aliases"
TRIVIAQA_KEYS = ("aliases", "normalized_aliases")  # in addition to `value`
LONGEST_LITERAL = 100_000  # characters of a list given as text: Python's parser needs a hundred times as much memory
DOCS_KEYS = ("docs", "ctxs")
DOC_ID_KEYS = ("id", "_id", "docid", "passage_id", "psg_id")
DOC_TEXT_KEYS = ("text", "contents", "doc", "passage_text")  # contents starts with the title if there is no key title
POSITION_KEYS = ("true_id", "false_id", "sequence")
TRAJECTORY_KEYS = {  # parallel lists with one entry per trajectory, and the type of an entry
    "id_lists": list, "responses": str, "response_tokens": int, "response_scores": float | int, "score_terms": dict,
}
# Keys that inference.py and top_inference.py add to a row.
RESULT_KEYS = {"docs_shown", "candidates", "id_list", "final_docs", "response", "error", "usage"}


class Doc(TypedDict, total=False):
    """A retrieved passage in a row."""

    id: str
    title: str
    text: str
    score: float  # of the retriever
    rerank_score: float  # P(relevant), in [0, 1]
    rerank_label: str  # "true" if rerank_score > 0.5, else "false"


class Row(TypedDict, total=False):
    """A question and the keys that the stages have added to it. Positions are 1-based, into the documents shown."""

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
    usage: dict[str, int | None]  # None: not known


class RowError(ValueError):
    """An error in one row: the key and what was expected of its value."""

    def __init__(self, key: str, expected: str):
        super().__init__(f"key '{key}': {expected}")


def read_rows(
    path: str | Path,
    needs: tuple[str, ...] = (),
    dataset: str | None = None,
    reject: Callable[[dict], None] | None = None,
    unique: bool = True,
    asked: Mapping[str, Row] | None = None,
    complete: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Yield the normalised rows of a JSON or JSONL file.

    `needs` lists the keys besides id and question that the stage requires. `dataset` overrides the data set of the
    rows. `asked` maps row ids to rows that supply missing keys (question, answers, data set, ...). `complete` may add
    keys that other tools do not write; it is called before `needs` are checked. Raises UserError naming file, line and
    key. With `reject`, a malformed row is passed to it and skipped instead. A line that is not JSON always raises
    UserError, because nothing after it can be trusted. A repeated id is an error unless `unique` is False.
    """
    seen: dict[str, int] = {}
    file_name = name_of_file(path)
    for line, value in read_json(path):
        try:
            row = normalise_row(_completed(value, asked or {}), needs, dataset, file_name, complete)
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
    """Check every row of a file before the long work starts. Returns the number of rows; raises UserError if it is 0.
    """
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
    named = dataset or row.get("dataset") or derive_dataset(row["id"], file_name) or (READINGS_TASK if readings_of(row) else None)
    if named is not None:
        row["dataset"] = dataset_named(named) or named
    _show_choices(row)
    if complete is not None:
        complete(row)
    for key in needs:
        if key not in row:
            empty = next((other for other in ANSWER_KEYS if other in row), None) if key == "answers" else None
            reason = "contains no gold answer" if empty else "missing; it comes from an earlier stage or the data set"
            raise RowError(empty or key, reason)
    _check_written(row, needs)
    if "response" in row:
        if isinstance(row["response"], list) and len(row["response"]) == 1 and isinstance(row["response"][0], str):
            row["response"] = row["response"][0]  # a list of one sample
        _check_result(row)
    return row


def normalise_doc(value: object, position: int, key: str = "docs") -> Doc:
    """Return one document of a row with string ids and texts and finite scores. Raises RowError."""
    where = f"{key}[{position - 1}]"
    if not isinstance(value, dict):
        raise RowError(where, f"expected an object with id, title and text, found {_kind(value)}")
    doc = dict(value)
    text_key = next((name for name in DOC_TEXT_KEYS if doc.get(name) is not None), DOC_TEXT_KEYS[0])
    text = doc.get(text_key)
    if not isinstance(text, str):
        expected = "a string" if text is not None else f"a string (or one of {', '.join(DOC_TEXT_KEYS[1:])})"
        raise RowError(f"{where}.{text_key}", f"expected {expected}, found {_kind(text)}")
    id_key = next((name for name in DOC_ID_KEYS if doc.get(name) is not None), None)
    doc_id = doc[id_key] if id_key else f"doc{position}"
    if type(doc_id) not in (str, int) or doc_id == "":
        raise RowError(f"{where}.{id_key}", f"expected a non-empty string or an integer, found {_kind(doc_id)}")
    if text_key == "contents" and doc.get("title") is None:
        doc["title"], text = title_and_text(text)
    doc |= {"id": str(doc_id), "title": doc.get("title") or "", "text": text}
    if text_key != "text":
        del doc[text_key]
    if not isinstance(doc["title"], str):
        raise RowError(f"{where}.title", f"expected a string, found {_kind(doc['title'])}")
    for score in ("score", "rerank_score"):
        if doc.get(score) is not None:
            doc[score] = _finite(doc[score], f"{where}.{score}")
    if "rerank_label" in doc:
        label = str(doc["rerank_label"]).lower()  # a JSON true counts as "true"
        if label not in ("true", "false"):
            raise RowError(f"{where}.rerank_label", f'expected "true" or "false", found {_kind(doc["rerank_label"])}')
        doc["rerank_label"] = label
    return doc


def _check_written(row: Row, needs: tuple[str, ...]) -> None:
    """Check the keys in `needs` that earlier stages wrote: positions are in range and parallel lists have equal
    lengths.
    """
    documents = len(row["docs"]) if "docs" in row else None
    for key in needs:
        if key == "answers" and not any(answer.strip() for answer in row["answers"] or ()):
            raise RowError(key, "contains no gold answer")
        if key == "docs_shown" and (type(row[key]) is not int or not 0 <= row[key] <= (documents or 0)):
            raise RowError(key, f"expected an integer from 0 to {documents}, found {_kind(row[key])}")
        if key in POSITION_KEYS:
            # A sequence names labelled documents only
            labelled = key == "sequence" and {"true_id", "false_id"} <= {*needs}
            _check_positions(row[key], key, len(row["true_id"]) + len(row["false_id"]) if labelled else documents)
        elif key in TRAJECTORY_KEYS:
            lists, kind = row[key], TRAJECTORY_KEYS[key]
            if not isinstance(lists, list) or not all(isinstance(value, kind) for value in lists):
                name = getattr(kind, "__name__", "number")
                raise RowError(key, f"expected a list of one {name} per trajectory, found {_kind(lists)}")
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
                raise RowError(key, f"expected a list of integers of at least 0, found {_kind(lists)}")
            if key == "score_terms":
                _check_terms(lists)


def _check_terms(lists: list[dict]) -> None:
    """Check that every trajectory has the same terms, including em, and that each is a number from 0 to 1."""
    for trajectory, terms in enumerate(lists):
        for term, value in {"em": None, **terms}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RowError(f"score_terms[{trajectory}].{term}", f"expected a number from 0 to 1, found {_kind(value)}")
        if terms.keys() != lists[0].keys():
            first = ", ".join(lists[0])
            raise RowError(f"score_terms[{trajectory}]", f"has {', '.join(terms)}, but the first one has {first}")


def _check_result(row: Row) -> None:
    """Check the keys of an answered row that evaluate.py counts."""
    if not isinstance(row.get("id_list") or [], list):
        raise RowError("id_list", f"expected a list of positions, found {_kind(row['id_list'])}")
    usage = row.get("usage") or {}
    if not isinstance(usage, dict) or not all(type(value) in (int, float, type(None)) for value in usage.values()):
        raise RowError("usage", f"expected an object of numbers, found {_kind(usage)}")


def _check_positions(value: object, key: str, documents: int | None) -> None:
    if not isinstance(value, list) or not all(type(position) is int for position in value):
        raise RowError(key, f"expected a list of integers, found {_kind(value)}")
    outside = next((p for p in value if p < 1 or (documents is not None and p > documents)), None)
    if outside is not None:
            raise RowError(key, f"{outside} is not the position of a document; expected 1 to {documents}")


def _identifier(row: dict) -> str:
    key = next((key for key in ID_KEYS if row.get(key) is not None), None)
    if key is None:
        raise RowError("id", "missing; every row needs a unique id")
    if isinstance(row[key], bool) or not isinstance(row[key], str | int) or row[key] == "":
        raise RowError(key, f"expected a non-empty string, found {_kind(row[key])}")
    return str(row[key])


def _answers(row: dict) -> list[str] | None:
    """Return the gold answers from whichever keys the data set uses, or else those of all readings."""
    answers = _own_answers(row)
    if not _any_text(answers) and row.get("qa_pairs") is not None:
        return list(dict.fromkeys(answer for pair in row["qa_pairs"] for answer in pair["short_answers"]))
    return answers


def _own_answers(row: dict) -> list[str] | None:
    """Return the answers of the first of ANSWER_KEYS that has any, plus aliases. A single string is one answer."""
    answers: list[str] | None = None
    for key in ANSWER_KEYS:
        if row.get(key) is not None and not _any_text(answers):
            texts = _answer_texts(row[key], key)
            answers = texts if answers is None or _any_text(texts) else answers
    if row.get(ALIASES_KEY) is not None:
        aliases = _answer_texts(row[ALIASES_KEY], ALIASES_KEY)
        answers = [*(answers or []), *(alias for alias in dict.fromkeys(aliases) if alias not in (answers or ()))]
    return answers


def _any_text(texts: list[str] | None) -> bool:
    return any(text.strip() for text in texts or ())


def _answer_texts(value: object, key: str) -> list[str]:
    """Return answers given as a string, a list of strings, TriviaQA's {value, aliases, normalized_aliases}, or one of
    these as text.

    PopQA stores its list of answers as text. Raises RowError for a text that looks like a list but cannot be read as a
    list of strings; as an answer it would match nothing.
    """
    if isinstance(value, str):
        read = _read_literal(value)
        if read is not None:
            return _answer_texts(read, key)
        if value.strip().startswith("[") and value.strip().endswith("]"):
            raise RowError(key, f"is the text of a list that cannot be parsed, {_kind(value)}; give a list of strings")
        return [value]
    if isinstance(value, dict) and isinstance(value.get("value"), str):
        value = [value["value"], *(alias for name in TRIVIAQA_KEYS for alias in _answer_texts(value.get(name) or [], key))]
        return list(dict.fromkeys(value))
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise RowError(key, f"expected a string or a list of strings, found {_kind(value)}")
    read = [_read_literal(answer) for answer in value]
    listed = [isinstance(one, list) and bool(one) and all(isinstance(answer, str) for answer in one) for one in read]
    if not any(listed):
        return value
    flat = ([answer] if not is_list else one for answer, one, is_list in zip(value, read, listed, strict=True))
    return _answer_texts([answer for some in flat for answer in some], key)


def _read_literal(text: str) -> list | dict | None:
    """Parse a list or object from text in JSON or Python syntax (including a tuple or set of strings); None for any
    other text.
    """
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}", "()") or len(text) > LONGEST_LITERAL:
        return None
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    try:
        # numpy writes ['a' 'b'], which Python parses as the single string 'ab'.
        words = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in (tokenize.NL, tokenize.NEWLINE)]
        if any(one == other == tokenize.STRING for one, other in itertools.pairwise(words)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError):
        return None
    if isinstance(value, tuple | set) and value and all(isinstance(one, str) for one in value):
        return sorted(value) if isinstance(value, set) else list(value)
    return value if isinstance(value, list | dict) else None


def title_and_text(contents: str) -> tuple[str, str]:
    """Split the `contents` of FlashRAG and Search-R1 into title and text: the first of several lines is the quoted
    title.
    """
    title, line_end, text = contents.partition("\n")
    return (title.strip().removeprefix('"').removesuffix('"'), text) if line_end else ("", contents)


def _show_choices(row: Row) -> None:
    """Append the row's choices to its question if it lacks them, and keep the bare question in `retrieved_question`."""
    try:
        choices = choices_of(row)
    except ValueError as error:
        task = known_task(row.get("dataset"))
        if task and task.instruction == CHOICE:
            raise RowError("choices", f"{error}, found {_kind(row['choices'])}") from error
        return  # `choices` has another meaning in this data set
    question = row["question"]
    row["question"] = with_choices(question, choices)
    if row["question"] != question and row.get("retrieved_question") is None:
        row["retrieved_question"] = question


def _completed(value: object, asked: Mapping[str, Row]) -> object:
    """Fill the missing keys of a decoded row from the row of `asked` with the same id.

    Raises RowError for its id or answers.
    """
    if not isinstance(value, dict) or not asked:
        return value
    known = dict(asked.get(_identifier(value), {}))
    if _any_text(_own_answers(value)):
        known.pop("answers", None)
    if value.get("gold_docs") is not None or value.get("positive_ctxs"):
        known.pop("gold_docs", None)
    filled = {key: known_value for key, known_value in known.items() if key == "answers" or value.get(key) is None}
    return {**value, **filled}


def _finite(value: object, where: str) -> float:
    try:
        number = float(value) if type(value) in (int, float, str) else None  # published files store scores as strings
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
    """Return whether the value is ASQA's qa_pairs: the readings of a question, each with short answers."""
    return isinstance(value, list) and all(
        isinstance(pair, dict) and isinstance(pair.get("short_answers"), list) and all(map(_is_text, pair["short_answers"])) for pair in value
    )


# Optional keys that stages read if a row has them.
OPTIONAL: dict[str, tuple[Callable[[object], bool], str]] = {
    "retrieved_question": (_is_text, "a string"),
    "qa_pairs": (_is_readings, "a list of objects with short_answers, each a list of strings"),
}


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def unanswered(row: Row) -> Row:
    """Return the row without the results of an earlier run, so that result and remain files can serve as inputs."""
    return {key: value for key, value in row.items() if key not in RESULT_KEYS}


def fail_unanswered(row: Row, reason: str) -> Row:
    """Return the row as written to the remain file, with `reason` as its `error`."""
    return {**unanswered(row), "error": reason}
