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
from collections.abc import Sequence

from dynamicrag import stage
from dynamicrag.llm.answering import AnswerRun, add_files_flags, answer_from, answer_runs, assemble_result, runs_of
from dynamicrag.llm.choosing import choose_by_windows
from dynamicrag.llm.engine import add_engine_flags, engine_inputs
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import Builders, add_call_flags, load_builders, positions_of
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, options_from


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


def answer_rows(rows: list[Row], builders: Builders, topn: int, window_size: int, order: str) -> list[Row]:
    """Return the answered rows, from their first `topn` documents in windows of `window_size`. `order` is a value of --order.

    A row whose last selection or answer cannot be read has `error` instead of `response`.
    """
    chooser, generator = builders
    candidates, choices, usages = choose_by_windows(rows, topn, window_size, chooser)
    in_order = sorted if order == "retrieval" else list  # candidates are in the order of retrieval
    chosen = {
        number: [docs[position - 1] for position in in_order(choice)]
        for number, (docs, choice) in enumerate(zip(candidates, choices, strict=True)) if isinstance(choice, list)
    }
    answers = answer_from(rows, chosen, generator)
    results = []
    for number, (row, docs, choice, usage) in enumerate(zip(rows, candidates, choices, usages, strict=True)):
        about = {"candidates": [doc["id"] for doc in docs]}
        selection = f"{choice} (last window)" if isinstance(choice, str) else (positions_of(row["docs"], chosen[number]), chosen[number])
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
