"""Answer from hundreds of retrieved documents: select window by window, select once more from the result, then answer.

In each round, the current documents of every question are cut into windows. The LLM selects in each window (all windows
of all questions in one batch). The selected documents continue to the next round, in retrieval order, until they fit
one window. If a round does not reduce them, they are cut to one window in retrieval order, so that the loop always
ends. The last window is handled like a question of inference.py.

Reads    eval_data/nq_top500.jsonl                       rows with docs
Writes   results/llama3_8b_top_500_nq.json               + candidates, id_list, final_docs, response, usage
         results/llama3_8b_top_500_nq_remain.json        rows that could not be answered, + error

    python top_inference.py --template template/llama3.jinja --llm-model DynamicRAG_llama3_8b \\
        --input-jsonl eval_data/nq_top500.jsonl --output-json results/llama3_8b_top_500_nq.json \\
        --remain-output-json results/llama3_8b_top_500_nq_remain.json --max-context-window 40 --topn 500
"""

import argparse
from collections.abc import Callable, Sequence

from dynamicrag import stage
from dynamicrag.llm.answering import AnswerRun, add_files_flags, answer_runs, assemble_result, runs_of
from dynamicrag.llm.completion import Usage
from dynamicrag.llm.engine import add_engine_flags, engine_inputs
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import Builders, add_call_flags, load_builders, positions_of, read_selection
from dynamicrag.llm.templates import in_threads
from dynamicrag.rows.identifiers import Selection
from dynamicrag.rows.row import Doc, Row
from dynamicrag.stage import UserError, options_from

Window = tuple[int, list[Doc]]  # number of the question, documents in the window


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    add_files_flags(parser.add_argument_group("files"), "eval_data/nq_top500.jsonl", "results/llama3_8b_top_500_nq.json")
    windows = parser.add_argument_group("windows")
    windows.add_argument("--max-context-window", type=int, default=40, help="documents per window")
    windows.add_argument("--topn", type=int,
                         nargs="+", default=[500], help="number of first documents used per question")
    windows.add_argument(
        "--order", choices=["final", "retrieval"], default="final",
        help="order of the documents for the answer: as the LLM wrote them in the last window, or as retrieved",
    )
    add_engine_flags(parser)
    add_call_flags(parser)
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


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


def answer_rows(rows: list[Row], builders: Builders, topn: int, window_size: int, order: str) -> list[Row]:
    """Return the answered rows, from their first `topn` documents in windows of `window_size`. `order` is a value of --order.

    A row whose last selection or answer cannot be read has `error` instead of `response`.
    """
    chooser, generator = builders
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
    final = dict(zip(open_questions, choose([(number, candidates[number]) for number in open_questions]), strict=True))
    in_order = sorted if order == "retrieval" else list  # candidates are in the order of retrieval
    readable = [number for number in range(len(rows)) if number not in final or final[number].valid]
    chosen = {
        number: [candidates[number][position - 1] for position in in_order(final[number].ids)] if number in final else []
        for number in readable
    }
    completions = generator.ask(in_threads(lambda number: generator.answer(rows[number], chosen[number]), readable))
    answers = dict(zip(readable, completions, strict=True))
    results = []
    for number, (row, usage) in enumerate(zip(rows, usages, strict=True)):
        about = {"candidates": [doc["id"] for doc in candidates[number]]}
        if number in chosen:
            selection = positions_of(row["docs"], chosen[number]), chosen[number]
        else:
            selection = f"{final[number].reason} (last window)"
        results.append(assemble_result(row, about, selection, answers.get(number), usage))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.max_context_window < 1:
        raise UserError(f"--max-context-window: expected at least 1, found {args.max_context_window}")
    if min(args.topn) < 1:
        raise UserError(f"--topn: expected at least 1, found {min(args.topn)}")
    engine, calls = options_from(args, EngineOptions), options_from(args, CallOptions)

    def answer(rows: list[Row], builders: Builders, run: AnswerRun) -> list[Row]:
        return answer_rows(rows, builders, run.value, args.max_context_window, args.order)

    answer_runs(runs_of(args, "topn"), calls, engine_inputs(engine, calls), lambda _: load_builders(engine, calls), answer)


if __name__ == "__main__":
    stage.run(main)
