"""Answer from hundreds of retrieved documents: choose among them window by window, then once more, then answer.

In each round the current documents of every question are cut into windows, the LLM chooses in each (all windows of
all questions in one batch), and what it chose goes on, in retrieval order, until it fits one window. A round that
does not shrink is cut to one window by retrieval order, so it always ends. The last window is chosen from and ordered
like any question of inference.py.

Reads    eval_data/nq_top500.jsonl                       rows with docs
Writes   results/llama3_8b_top_500_nq.json               + candidates, id_list, final_docs, response, usage
         results/llama3_8b_top_500_nq_remain.json        rows that could not be answered, + error

    python top_inference.py --template template/llama3.jinja --llm-model DynamicRAG_llama3_8b \\
        --input-jsonl eval_data/nq_top500.jsonl --output-json results/llama3_8b_top_500_nq.json \\
        --remain-output-json results/llama3_8b_top_500_nq_remain.json --max-context-window 40 --topn 500
"""

from collections.abc import Callable, Sequence
from functools import partial

from dynamicrag import stage
from dynamicrag.calls import (
    Caller,
    add_call_flags,
    fail_unanswered,
    load_callers,
    remain_path,
    unanswered,
    work_on_fitting,
)
from dynamicrag.engine import Usage, add_engine_flags, engine_inputs
from dynamicrag.output import Output
from dynamicrag.records import Doc, Row, count_rows, read_rows
from dynamicrag.selection import Selection, parse_ids
from dynamicrag.stage import UserError

Window = tuple[int, list[Doc]]  # (number of the question, documents shown)


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input-jsonl", "--input-json", dest="input_json", default="eval_data/nq_top500.jsonl", help="questions"
    )
    files.add_argument(
        "--output-json", "--output-jsonl", dest="output_json", default="results/llama3_8b_top_500_nq.json", help="answered rows"
    )
    files.add_argument(
        "--remain-output-json", help="rows without an answer (default: <output>_remain)"
    )
    windows = parser.add_argument_group("windows")
    windows.add_argument("--max-context-window", type=int, default=40, help="documents a window")
    windows.add_argument("--topn", type=int, default=500, help="documents a question, from the first")
    add_engine_flags(parser)
    add_call_flags(parser)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    args.remain_output_json = args.remain_output_json or remain_path(args.output_json)
    return args


def reduce_to_window(
    questions: Sequence[Sequence[Doc]], window: int, choose: Callable[[list[Window]], list[Selection]]
) -> list[list[Doc]]:
    """Shrink every question's documents to at most `window`, in their own order.

    `choose` gets the windows of one round, of all questions, and returns what was chosen in each, as positions within
    the window. A window whose selection cannot be read keeps all its documents.
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
    """Documents by id, the first of equals."""
    first: dict[str, Doc] = {}
    for doc in docs:
        first.setdefault(doc["id"], doc)
    return list(first.values())


def answer_chunk(rows: list[Row], callers: tuple[Caller, Caller], args) -> list[Row]:
    """The rows answered; one whose last selection cannot be read carries `error` instead of `response`."""
    chooser, generator = callers
    usages = [Usage() for _ in rows]

    def choose(windows: list[Window]) -> list[Selection]:
        shown = [(number, chooser.shown(rows[number]["question"], docs)) for number, docs in windows]
        completions = chooser.engine.complete([
            chooser.select(rows[number], docs, ("window", docs[0]["id"] if docs else "")) for number, docs in shown
        ])
        for (number, _), completion in zip(shown, completions, strict=True):
            usages[number].add(completion)
        return [parse_ids(completion.texts[0], len(docs)) for (_, docs), completion in zip(shown, completions, strict=True)]

    candidates = reduce_to_window([row["docs"][: args.topn] for row in rows], args.max_context_window, choose)
    open_questions = [number for number, docs in enumerate(candidates) if docs]
    final = dict(zip(open_questions, choose([(number, candidates[number]) for number in open_questions]), strict=True))
    readable = [number for number in range(len(rows)) if number not in final or final[number].valid]
    chosen = {
        number: [candidates[number][position - 1] for position in final[number].ids] if number in final else []
        for number in readable
    }
    completions = generator.engine.complete([generator.answer(rows[number], chosen[number]) for number in readable])
    answers = dict(zip(readable, completions, strict=True))
    results = []
    for number, (row, usage) in enumerate(zip(rows, usages, strict=True)):
        result = {**unanswered(row), "candidates": [doc["id"] for doc in candidates[number]]}
        if number in answers:
            usage.add(answers[number])
            positions = {doc["id"]: position for position, doc in reversed(list(enumerate(row["docs"], start=1)))}
            result |= {
                "id_list": [positions[doc["id"]] for doc in chosen[number]],
                "final_docs": [doc["id"] for doc in chosen[number]],
                "response": answers[number].texts[0],
            }
        else:
            result["error"] = "no selection in the model's output for the last window"
        results.append({**result, "usage": vars(usage)})
    return results


def main(argv=None):
    args = parse_args(argv)
    if args.max_context_window < 1:
        raise UserError("--max-context-window: at least 1")
    out = Output(args, [args.output_json, args.remain_output_json], [args.input_json, *engine_inputs(args)])
    if out.finished:
        return
    total = count_rows(args.input_json, ("docs",), skip_malformed=bool(out.reject))
    callers = load_callers(args)
    rows = read_rows(args.input_json, ("docs",), args.dataset, out.reject)
    answer = partial(answer_chunk, callers=callers, args=args)
    work = partial(work_on_fitting, callers=callers, work=answer, fail=fail_unanswered)
    out.process(rows, args.chunk_size, work, total, f"top {args.topn}")
    out.finish_answers()


if __name__ == "__main__":
    stage.run(main)
