"""The contract between the stages: what a row is, read leniently and handed on in one form.

A row is one question. Every stage reads rows through `read_rows`, which accepts the names the field's data sets use
(`ctxs` for `docs`, `answer` or `golden_answers` for `answers`, `sample_id` for `id`), checks what the stage needs,
and passes keys it does not know through untouched. The choices of a multiple-choice question (`choices`) become part of
its `question`, which is what the LLM and the judge read; what is searched with stays the question alone (`retrieved_question`).
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

ID_KEYS = ("id", "sample_id", "_id", "question_id")  # ALCE has the second, HotpotQA and 2WikiMultihopQA the third, TriviaQA the last
# answerKey is ARC's, possible_answers PopQA's; answer_aliases, of MuSiQue and 2WikiMultihopQA, come on top of any of them.
ANSWER_KEYS = ("answers", "answer", "golden_answers", "possible_answers", "output", "answerKey")
ALIASES_KEY = "answer_aliases"
TRIVIAQA_KEYS = ("aliases", "normalized_aliases")  # beside `value`
LONGEST_LITERAL = 100_000  # characters of a list written out as a text: Python's parser takes a hundred times as much memory
DOCS_KEYS = ("docs", "ctxs")
DOC_ID_KEYS = ("id", "_id", "docid", "passage_id", "psg_id")
DOC_TEXT_KEYS = ("text", "contents", "doc", "passage_text")  # contents begins with the title if there is no key title
POSITION_KEYS = ("true_id", "false_id", "sequence")
TRAJECTORY_KEYS = {  # parallel lists: one of these a trajectory
    "id_lists": list, "responses": str, "response_tokens": int, "response_scores": float | int, "score_terms": dict,
}
# What inference.py and top_inference.py add to a row.
RESULT_KEYS = {"docs_shown", "candidates", "id_list", "final_docs", "response", "error", "usage"}


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
    usage: dict[str, int | None]  # None: not known


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
    asked: Mapping[str, Row] | None = None,
    complete: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Stream the rows of a JSON or JSONL file in the project's own form.

    `needs` are the keys beyond id and question that this stage cannot do without. `dataset` overrides what the rows
    say. `asked`, rows by id, has what a row does not say itself: its question, answers, data set, ... Raises UserError naming file, line and key; with `reject`, a malformed row is handed to it instead and
    skipped. (A line that is not JSON always raises: nothing after it can be trusted.) An id that comes again is an
    error of its row; without `unique` it is the caller's to see. `complete` may add keys that other tools do not write,
    before `needs` are checked.
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
    """Check every row of a file before hours are spent on the first ones; returns how many there are."""
    count = sum(1 for _ in read_rows(path, needs, dataset, (lambda _: None) if skip_malformed else None))
    if count == 0:
        raise UserError(f"{path}: holds no usable row")
    return count


def normalise_row(
    value: object, needs: tuple[str, ...] = (), dataset: str | None = None, file_name: str = "",
    complete: Callable[[Row], None] | None = None,
) -> Row:
    """One decoded JSON value as a row; `file_name` as tasks.name_of_file gives it. Raises RowError."""
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
            raise RowError(empty or key, "holds no gold answer" if empty else "missing; it is written by an earlier stage or is part of the data set")
    _check_written(row, needs)
    if "response" in row:
        if isinstance(row["response"], list) and len(row["response"]) == 1 and isinstance(row["response"][0], str):
            row["response"] = row["response"][0]  # of one sample
        _check_result(row)
    return row


def normalise_doc(value: object, position: int, key: str = "docs") -> Doc:
    """One document of a row: ids and texts are strings, scores finite numbers. Raises RowError."""
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
    if not isinstance(usage, dict) or not all(type(value) in (int, float, type(None)) for value in usage.values()):
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
    """Gold answers from whichever keys the data set uses, else of all readings."""
    found = _own_answers(row)
    if not _any_text(found) and row.get("qa_pairs") is not None:
        return list(dict.fromkeys(answer for pair in row["qa_pairs"] for answer in pair["short_answers"]))
    return found


def _own_answers(row: dict) -> list[str] | None:
    """Those of ANSWER_KEYS, the first key that has any, and aliases; a lone string is one answer, never its characters."""
    found: list[str] | None = None
    for key in ANSWER_KEYS:
        if row.get(key) is not None and not _any_text(found):
            texts = _answer_texts(row[key], key)
            found = texts if found is None or _any_text(texts) else found
    if row.get(ALIASES_KEY) is not None:
        aliases = _answer_texts(row[ALIASES_KEY], ALIASES_KEY)
        found = [*(found or []), *(alias for alias in dict.fromkeys(aliases) if alias not in (found or ()))]
    return found


def _any_text(texts: list[str] | None) -> bool:
    return any(text.strip() for text in texts or ())


def _answer_texts(value: object, key: str) -> list[str]:
    """A string, a list of strings, TriviaQA's {value, aliases, normalized_aliases}, or one of these written out as a text.

    PopQA ships the list of its answers as a text. Raises RowError for a text that is a list and cannot be read as one of
    strings: taken for an answer it would match nothing.
    """
    if isinstance(value, str):
        read = _read_literal(value)
        if read is not None:
            return _answer_texts(read, key)
        if value.strip().startswith("[") and value.strip().endswith("]"):
            raise RowError(key, f"is the text of a list that cannot be read, {_kind(value)}; give a list of strings (of one, if this is the answer itself)")
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
    """The list or object that a text is, as JSON or as Python writes it (a tuple or set of strings too); None for any other text."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}", "()") or len(text) > LONGEST_LITERAL:
        return None
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    try:
        # numpy writes ['a' 'b'], which Python reads as the one string 'ab'.
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
    """FlashRAG's and Search-R1's `contents`: the title, in quotes, is the first of several lines."""
    title, line_end, text = contents.partition("\n")
    return (title.strip().removeprefix('"').removesuffix('"'), text) if line_end else ("", contents)


def _show_choices(row: Row) -> None:
    """Put the row's choices below its question, unless they are there; the question alone is what is searched with."""
    try:
        choices = choices_of(row)
    except ValueError as error:
        task = known_task(row.get("dataset"))
        if task and task.instruction == CHOICE:
            raise RowError("choices", f"{error}, found {_kind(row['choices'])}") from error
        return  # a key of another meaning
    question = row["question"]
    row["question"] = with_choices(question, choices)
    if row["question"] != question and row.get("retrieved_question") is None:
        row["retrieved_question"] = question


def _completed(value: object, asked: Mapping[str, Row]) -> object:
    """A decoded row with what it does not say itself from the row of `asked` that has its id. Raises RowError for its id or answers."""
    if not isinstance(value, dict) or not asked:
        return value
    known = dict(asked.get(_identifier(value), {}))
    if _any_text(_own_answers(value)):
        known.pop("answers", None)
    if value.get("gold_docs") is not None or value.get("positive_ctxs"):
        known.pop("gold_docs", None)
    filled = {key: found for key, found in known.items() if key == "answers" or value.get(key) is None}
    return {**value, **filled}


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


def unanswered(row: Row) -> Row:
    """The row without what an earlier run answered: result and remain files are usable inputs."""
    return {key: value for key, value in row.items() if key not in RESULT_KEYS}


def fail_unanswered(row: Row, reason: str) -> Row:
    """The row as the remain file has it."""
    return {**unanswered(row), "error": reason}
