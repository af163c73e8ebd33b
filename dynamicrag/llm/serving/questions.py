"""One question of a client: choose its documents, then answer, with the functions of inference.py and top_inference.py."""

from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import cast

from dynamicrag.llm.answering import answer_from
from dynamicrag.llm.choosing import choose_among, choose_by_windows
from dynamicrag.llm.completion import Usage
from dynamicrag.llm.requests import Builders, RequestBuilder, positions_of
from dynamicrag.llm.serving.refusals import Refusal
from dynamicrag.llm.serving.work import current_work
from dynamicrag.rows.row import Doc, Row
from dynamicrag.stage import UserError, log


@dataclass(frozen=True)
class Choice:
    """The documents that were chosen, most important first.

    `positions` are 1-based, among the documents of the question. `shown` is the number of documents in the prompt of
    the last selection.
    """

    docs: list[Doc]
    positions: list[int]
    shown: int
    usage: Usage = field(default_factory=Usage)


def row_of(question: str, docs: Sequence[Doc], dataset: str | None = None, row_id: str | None = None) -> Row:
    """Return the row of a question. Its id, by default the question, decides the seeds."""
    row = {"id": row_id or question, "question": question, "docs": list(docs), **({"dataset": dataset} if dataset else {})}
    return cast(Row, row)


def choose(row: Row, builders: Builders, window: int) -> Choice:
    """Return the choice of the LLM. More than `window` documents are chosen window by window, as in top_inference.py.

    Raises Refusal if the question is too long or the choice cannot be read.
    """
    chooser = builders[0]
    if reason := next(filter(None, (builder.too_long(row) for builder in dict.fromkeys(builders))), None):
        raise Refusal(422, "question_too_long", reason.removesuffix(f": {row['question'][:80]!r}"))
    fitting = cast(Row, {**row, "docs": documents_that_can_fit(row, chooser)})
    if len(fitting["docs"]) <= window:
        shown = chooser.shown(row["question"], fitting["docs"])
        [ids], [usage] = choose_among([fitting], [shown], chooser)
    else:
        [shown], [ids], [usage] = choose_by_windows([fitting], len(fitting["docs"]), window, chooser)
    if isinstance(ids, str):
        raise Refusal(502, "no_selection", ids)
    docs = [shown[position - 1] for position in ids]
    return Choice(docs, positions_of(row["docs"], docs), len(shown), usage)


def documents_that_can_fit(row: Row, chooser: RequestBuilder) -> list[Doc]:
    """Return the documents of a row that fit into the prompt alone. One that does not fit is left out, and the others stay."""
    window = getattr(chooser.engine, "max_model_len", None)
    if window is None:
        return row["docs"]
    # A token has at least one byte: a short document fits, unless the question fills half the window.
    return [doc for doc in row["docs"] if len(f"{doc['title']}{doc['text']}".encode()) < window // 2 or chooser.shown(row["question"], [doc])]


def answer(row: Row, choice: Choice, builders: Builders, streams: bool = False) -> str:
    """Return the answer from the chosen documents, and add its cost to the usage. Raises Refusal if it has no text.

    With `streams`, the work says the text while it is written.
    """
    work = current_work()
    work.streams = streams
    completion = answer_from([row], {0: choice.docs}, builders[1])[0]
    choice.usage.add(completion)
    if reason := completion.reason("answer"):
        raise Refusal(502 if completion.answered else 422, "no_answer", reason)
    if streams:
        work.text(completion.texts[0])
    return completion.texts[0]


def refusal_of(error: BaseException) -> Refusal:
    """Return the refusal that tells a client of an error of its work. Errors of the server are logged, and not told."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, CancelledError):
        return Refusal(503, "ended", "the request was ended", {"Retry-After": "1"})
    if isinstance(error, UserError):
        log.error("%s", error)
        return Refusal(502, "model_unavailable", "the model cannot answer; the server's log has the reason")
    log.error("a request failed", exc_info=error)
    return Refusal(500, "internal_error", "internal error; the server's log has the reason")
