"""The forms in which data sets give the gold answers of a question."""

import ast
import io
import itertools
import tokenize
import warnings
from collections.abc import Iterable, Mapping

import orjson

from dynamicrag.rows.row import RowError, kind_of

# ARC uses answerKey, PopQA possible_answers. answer_aliases (MuSiQue, 2WikiMultihopQA) are added to any of these.
ANSWER_KEYS = ("answers", "answer", "golden_answers", "possible_answers", "output", "answerKey")
ALIASES_KEY = "answer_aliases"
TRIVIAQA_KEYS = ("aliases", "normalized_aliases")  # in addition to `value`
LONGEST_LITERAL = 100_000  # characters of a list given as text: Python's parser needs a hundred times as much memory


def gold_answers(row: Mapping) -> list[str] | None:
    """Return the gold answers from whichever keys the data set uses, or else those of all readings; None without any such key. Raises RowError."""
    answers = own_answers(row)
    if not any_text(answers) and row.get("qa_pairs") is not None:
        return list(dict.fromkeys(answer for pair in row["qa_pairs"] for answer in pair["short_answers"]))
    return answers


def own_answers(row: Mapping) -> list[str] | None:
    """Return the answers of the first of ANSWER_KEYS that has any, plus aliases. A single string is one answer."""
    answers: list[str] | None = None
    for key in ANSWER_KEYS:
        if row.get(key) is not None and not any_text(answers):
            texts = _answer_texts(row[key], key)
            answers = texts if answers is None or any_text(texts) else answers
    if row.get(ALIASES_KEY) is not None:
        aliases = _answer_texts(row[ALIASES_KEY], ALIASES_KEY)
        answers = [*(answers or []), *(alias for alias in dict.fromkeys(aliases) if alias not in (answers or ()))]
    return answers


def any_text(texts: Iterable[str] | None) -> bool:
    """Return whether one of the texts is not blank."""
    return any(text.strip() for text in texts or ())


def _answer_texts(value: object, key: str) -> list[str]:
    """Return answers given as a string, a list of strings, TriviaQA's {value, aliases, normalized_aliases}, or one of these as text.

    PopQA stores its list of answers as text. Raises RowError for a text that looks like a list but cannot be read as a
    list of strings; as an answer it would match nothing.
    """
    if isinstance(value, str):
        read = _read_literal(value)
        if read is not None:
            return _answer_texts(read, key)
        if value.strip().startswith("[") and value.strip().endswith("]"):
            raise RowError(key, f"is the text of a list that cannot be parsed, {kind_of(value)}; give a list of strings")
        return [value]
    if isinstance(value, dict) and isinstance(value.get("value"), str):
        value = [value["value"], *(alias for name in TRIVIAQA_KEYS for alias in _answer_texts(value.get(name) or [], key))]
        return list(dict.fromkeys(value))
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise RowError(key, f"expected a string or a list of strings, found {kind_of(value)}")
    lists = [_list_of_texts(answer) for answer in value]
    if not any(lists):
        return value
    return _answer_texts([text for answer, texts in zip(value, lists, strict=True) for text in texts or [answer]], key)


def _list_of_texts(text: str) -> list[str]:
    """Return the texts of a list given as text; none for any other text."""
    read = _read_literal(text)
    return read if isinstance(read, list) and all(isinstance(one, str) for one in read) else []


def _read_literal(text: str) -> list | dict | None:
    """Parse a list or object from text in JSON or Python syntax (including a tuple or set of strings); None for any other text."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "{}", "()") or len(text) > LONGEST_LITERAL:
        return None
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    try:
        # numpy writes ['a' 'b'], which Python parses as the single string 'ab'.
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        words = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE)]
        if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(words):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError):
        return None
    if isinstance(value, tuple | set) and value and all(isinstance(one, str) for one in value):
        return sorted(value) if isinstance(value, set) else list(value)
    return value if isinstance(value, list | dict) else None
