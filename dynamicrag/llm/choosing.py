"""The choice of documents by the LLM for a batch of questions: among the documents shown, or window by window.

inference.py, top_inference.py and serve.py choose with these functions.
"""

from collections.abc import Callable, Sequence

from dynamicrag.llm.completion import Usage
from dynamicrag.llm.requests import RequestBuilder, read_selection
from dynamicrag.llm.templates import in_threads
from dynamicrag.rows.identifiers import Selection
from dynamicrag.rows.row import Doc, Row

Window = tuple[int, list[Doc]]  # number of the question, documents in the window
Choice = list[int] | str  # 1-based positions among the documents shown, or the reason why the LLM's output cannot be read


def choose_among(rows: list[Row], shown: list[list[Doc]], builder: RequestBuilder) -> tuple[list[Choice], list[Usage]]:
    """Return, for each question, the choice among the documents `shown`, and the cost."""
    usages = [Usage() for _ in rows]
    choices: list[Choice] = [[] for _ in rows]
    numbers = [number for number, docs in enumerate(shown) if docs]  # without documents there is nothing to select
    completions = builder.ask([builder.select(rows[number], shown[number]) for number in numbers])
    for number, completion in zip(numbers, completions, strict=True):
        usages[number].add(completion)
        choices[number] = _choice(read_selection(completion, 0, len(shown[number]), builder.prompts.notation))
    return choices, usages


def choose_by_windows(
    rows: list[Row], topn: int, window_size: int, chooser: RequestBuilder
) -> tuple[list[list[Doc]], list[Choice], list[Usage]]:
    """Return, for each question, the candidates of the last window, the choice among them, and the cost.

    The candidates are chosen from the first `topn` documents in windows of `window_size` (reduce_to_window).
    """
    usages = [Usage() for _ in rows]

    def choose(windows: list[Window]) -> list[Selection]:
        shown = in_threads(lambda window: (window[0], chooser.shown(rows[window[0]]["question"], window[1])), windows)
        completions = chooser.ask([
            chooser.select(rows[number], docs, ("window", docs[0]["id"] if docs else "")) for number, docs in shown
        ])
        for (number, _), completion in zip(shown, completions, strict=True):
            usages[number].add(completion)
        notation = chooser.prompts.notation
        return [read_selection(completion, 0, len(docs), notation) for (_, docs), completion in zip(shown, completions, strict=True)]

    candidates = reduce_to_window([row["docs"][:topn] for row in rows], window_size, choose)
    open_questions = [number for number, docs in enumerate(candidates) if docs]
    final = choose([(number, candidates[number]) for number in open_questions])
    choices: list[Choice] = [[] for _ in rows]
    for number, selection in zip(open_questions, final, strict=True):
        choices[number] = _choice(selection)
    return candidates, choices, usages


def _choice(selection: Selection) -> Choice:
    return selection.ids if selection.valid else selection.reason


def reduce_to_window(
    questions: Sequence[Sequence[Doc]], window: int, choose: Callable[[list[Window]], list[Selection]]
) -> list[list[Doc]]:
    """Reduce every question's documents to at most `window`, in their own order.

    `choose` gets the windows of one round of all questions and returns the selections, as positions within each window.
    If a selection cannot be read, all documents of its window are kept.
    """
    current = [unique_documents(docs) for docs in questions]
    while any(len(docs) > window for docs in current):
        windows = [
            (number, docs[start : start + window])
            for number, docs in enumerate(current) if len(docs) > window
            for start in range(0, len(docs), window)
        ]
        kept: dict[int, list[Doc]] = {number: [] for number, _ in windows}
        for (number, docs), selection in zip(windows, choose(windows), strict=True):
            ids = selection.ids if selection.valid else range(1, len(docs) + 1)
            kept[number] += [docs[position - 1] for position in sorted(ids)]
        for number, docs in kept.items():
            current[number] = docs if len(docs) < len(current[number]) else current[number][:window]
    return current


def unique_documents(docs: Sequence[Doc]) -> list[Doc]:
    """Return the documents with distinct ids; the first of each id is kept."""
    first: dict[str, Doc] = {}
    for doc in docs:
        first.setdefault(doc["id"], doc)
    return list(first.values())
