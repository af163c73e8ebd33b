"""Answer an evaluation file: the LLM chooses the documents it needs, then answers from them (two calls a question).

The baselines a paper compares with are other values of --selector:
    dynamic      the LLM writes the identifiers of the documents it needs, in order (DynamicRAG)
    none, all    no document; every document shown
    top:K        the first K
    monot5       those the reranker labelled relevant, best first
    adaptive     those before the largest gap between neighbouring scores
    pointwise    the LLM is asked once for every document whether it is needed
Several selectors may be given; the model is loaded once and {selector} in the output paths is replaced by each.

Reads    eval_data/nq.jsonl                      rows with docs
Writes   results/llama3_8b_nq.json               + id_list, final_docs, response, docs_shown, usage
         results/llama3_8b_nq_remain.json        rows that could not be answered, + error

    python inference.py --template template/llama3.jinja --llm-model DynamicRAG_llama3_8b \\
        --input-json eval_data/nq.jsonl --output-json results/llama3_8b_nq.json \\
        --remain-output-json results/llama3_8b_nq_remain.json
"""

import itertools
import re
from argparse import Namespace
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
from dynamicrag.selection import expert_sequence, format_ids, parse_ids
from dynamicrag.stage import UserError

SELECTOR = re.compile(r"dynamic|none|all|monot5|adaptive|pointwise|top:[1-9]\d*")
BY_LLM = ("dynamic", "pointwise")


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input-json", "--input-jsonl", dest="input_json", default="eval_data/nq.jsonl", help="questions")
    files.add_argument(
        "--output-json", "--output-jsonl", dest="output_json", default="results/llama3_8b_nq.json", help="answered rows"
    )
    files.add_argument("--remain-output-json", help="rows without an answer (default: <output>_remain)")
    choice = parser.add_argument_group("selection")
    choice.add_argument("--selector", nargs="+", default=["dynamic"], help="who chooses the documents")
    choice.add_argument("--topn", "--n-docs", dest="topn", type=int, default=20, help="documents shown, as in training")
    add_engine_flags(parser)
    add_call_flags(parser)
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    args.remain_output_json = args.remain_output_json or remain_path(args.output_json)
    return args


def select_by_rule(selector: str, docs: list[Doc]) -> list[int]:
    """1-based positions chosen without an LLM. Raises UserError where the scores a rule needs are missing."""
    if selector == "none":
        return []
    if selector == "all":
        return list(range(1, len(docs) + 1))
    if selector.startswith("top:"):
        return list(range(1, min(int(selector.removeprefix("top:")), len(docs)) + 1))
    key = "rerank_score" if all("rerank_score" in doc for doc in docs) else "score"
    needed = ("rerank_score", "rerank_label") if selector == "monot5" else (key,)
    unscored = next((doc["id"] for doc in docs if any(doc.get(score) is None for score in needed)), None)
    if unscored is not None:
        raise UserError(f"--selector {selector}: document {unscored} has no {' and '.join(needed)}; run reranker.py first")
    if selector == "monot5":
        return expert_sequence(docs, [n for n, doc in enumerate(docs, start=1) if doc["rerank_label"] == "true"], len(docs))
    best_first = sorted(range(1, len(docs) + 1), key=lambda position: -docs[position - 1][key])
    scores = [docs[position - 1][key] for position in best_first]
    gaps = [higher - lower for higher, lower in itertools.pairwise(scores)]
    return best_first[: gaps.index(max(gaps)) + 1] if gaps else best_first


def select_by_llm(selector: str, rows: list[Row], shown: list[list[Doc]], caller: Caller) -> tuple[list, list[Usage]]:
    """Positions each question's LLM chose (or the text that could not be read as a selection), and what it cost."""
    usages = [Usage() for _ in rows]
    if selector == "dynamic":
        completions = caller.engine.complete([caller.select(row, docs) for row, docs in zip(rows, shown, strict=True)])
        choices = []
        for docs, completion, usage in zip(shown, completions, usages, strict=True):
            usage.add(completion)
            selection = parse_ids(completion.texts[0], len(docs))
            choices.append(selection.ids if selection.valid else completion.texts[0])
        return choices, usages
    asked = [(number, position) for number, docs in enumerate(shown) for position in range(1, len(docs) + 1)]
    verdicts = caller.engine.complete(
        [caller.judge_document(rows[number], shown[number][position - 1]) for number, position in asked]
    )
    choices = [[] for _ in rows]
    for (number, position), completion in zip(asked, verdicts, strict=True):
        usages[number].add(completion)
        if completion.texts[0].lower().startswith("yes"):
            choices[number].append(position)
    return choices, usages


def answer_chunk(rows: list[Row], selector: str, callers: tuple[Caller, Caller], topn: int) -> list[Row]:
    """The rows answered; one whose selection cannot be read carries `error` instead of `response`."""
    chooser, generator = callers
    shown = [chooser.shown(row["question"], row["docs"][:topn]) for row in rows]
    if selector in BY_LLM:
        choices, usages = select_by_llm(selector, rows, shown, chooser)
    else:
        choices, usages = [select_by_rule(selector, docs) for docs in shown], [Usage() for _ in rows]
    readable = [number for number, choice in enumerate(choices) if isinstance(choice, list)]
    completions = generator.engine.complete([
        generator.answer(rows[number], [shown[number][position - 1] for position in choices[number]]) for number in readable
    ])
    answers = dict(zip(readable, completions, strict=True))
    results = []
    for number, (row, docs, choice, usage) in enumerate(zip(rows, shown, choices, usages, strict=True)):
        result = {**unanswered(row), "docs_shown": len(docs)}
        if number in answers:
            usage.add(answers[number])
            result |= {
                "id_list": choice,
                "final_docs": [docs[position - 1]["id"] for position in choice],
                "response": answers[number].texts[0],
            }
        else:
            result["error"] = f"no selection in the model's output {choice[:200]!r}; expected {format_ids([1, 2])} or None"
        results.append({**result, "usage": vars(usage)})
    return results


def open_output(args: Namespace, selector: str) -> Output:
    """The output files of one selector."""
    name = selector.replace(":", "")
    paths = {key: getattr(args, key).replace("{selector}", name) for key in ("output_json", "remain_output_json")}
    one = Namespace(**{**vars(args), **paths, "selector": selector})
    return Output(one, list(paths.values()), [args.input_json, *engine_inputs(args)])


def main(argv=None):
    args = parse_args(argv)
    for selector in args.selector:
        if not SELECTOR.fullmatch(selector):
            raise UserError(f"--selector {selector}: expected dynamic, none, all, top:K, monot5, adaptive or pointwise")
    if len(args.selector) > 1 and not ("{selector}" in args.output_json and "{selector}" in args.remain_output_json):
        raise UserError("several selectors need {selector} in --output-json and --remain-output-json")
    outputs = {selector: open_output(args, selector) for selector in args.selector}
    unfinished = {selector: out for selector, out in outputs.items() if not out.finished}
    if not unfinished:
        return
    total = count_rows(args.input_json, ("docs",), skip_malformed=args.on_error == "skip")

    callers = load_callers(args, both=any(selector in BY_LLM for selector in args.selector))
    for selector, out in unfinished.items():
        answer = partial(answer_chunk, selector=selector, callers=callers, topn=args.topn)
        work = partial(work_on_fitting, callers=callers, work=answer, fail=fail_unanswered)
        out.process(read_rows(args.input_json, ("docs",), args.dataset, out.reject), args.chunk_size, work, total, selector)
        out.finish_answers()


if __name__ == "__main__":
    stage.run(main)
