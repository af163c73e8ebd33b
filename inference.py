"""Answer an evaluation file: the LLM selects the documents it needs and answers from them (two calls per question).

Other values of --selector are the baselines of the paper:
    dynamic      the LLM writes the identifiers of the documents it needs, in order (DynamicRAG)
    none, all    no document; all documents shown
    top:K        the first K documents
    monot5       documents that the reranker labelled relevant, best first
    adaptive     documents before the largest gap between neighbouring scores
    pointwise    the LLM is asked for each document whether it is needed
    gold         documents that the row names as needed (gold_docs, positive_ctxs): an upper bound for selectors

Several files and selectors may be given. The model is loaded once, and {input} and {selector} in the output paths stand
for the name of the file and the selector.

Reads    eval_data/nq.jsonl                      rows with docs
Writes   results/llama3_8b_nq.json               + id_list, final_docs, response, docs_shown, usage
         results/llama3_8b_nq_remain.json        rows that could not be answered, + error

    python inference.py --template template/llama3.jinja --llm-model DynamicRAG_llama3_8b \\
        --input-json eval_data/nq.jsonl --output-json results/llama3_8b_nq.json \\
        --remain-output-json results/llama3_8b_nq_remain.json
"""

import argparse
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dynamicrag import stage
from dynamicrag.llm.answering import AnswerRun, add_files_flags, answer_from, answer_runs, assemble_result, runs_of
from dynamicrag.llm.choosing import Choice, choose_among
from dynamicrag.llm.completion import Usage
from dynamicrag.llm.engine import add_engine_flags, engine_inputs
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import Builders, RequestBuilder, add_call_flags, load_builders
from dynamicrag.llm.templates import in_threads
from dynamicrag.rows.expert import expert_sequence
from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.rows.shown import DOCUMENTS_HELP, DOCUMENTS_SHOWN, check_shown
from dynamicrag.stage import UserError, options_from

SELECTOR = re.compile(r"dynamic|none|all|monot5|adaptive|pointwise|gold|top:[1-9]\d*")
BY_LLM = ("dynamic", "pointwise")
BY_KEYS_OF_ROWS = ("monot5", "adaptive", "gold")
VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def selector_flag(value: str) -> str:
    """Check a value of --selector and return it. Raises ArgumentTypeError."""
    if not SELECTOR.fullmatch(value):
        raise argparse.ArgumentTypeError(f"{value}: expected dynamic, none, all, top:K, monot5, adaptive, pointwise or gold")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    add_files_flags(parser.add_argument_group("files"), "eval_data/nq.jsonl", "results/llama3_8b_nq.json")
    choice = parser.add_argument_group("selection")
    choice.add_argument("--selector", nargs="+", type=selector_flag, default=["dynamic"],
                        help="one or more selectors of documents (see above)")
    choice.add_argument("--topn", "--n-docs", dest="topn", type=int, default=DOCUMENTS_SHOWN, help=DOCUMENTS_HELP)
    add_engine_flags(parser)
    add_call_flags(parser)
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def select_by_rule(selector: str, docs: list[Doc]) -> list[int]:
    """Return 1-based positions selected without an LLM. Raises UserError if scores that the rule needs are missing."""
    if selector == "none":
        return []
    if selector == "all":
        return list(range(1, len(docs) + 1))
    if selector.startswith("top:"):
        return list(range(1, min(int(selector.removeprefix("top:")), len(docs)) + 1))
    key = "rerank_score" if all("rerank_score" in doc for doc in docs) else "score"
    # Published data has labels only, with documents in order
    scored = any(doc.get("rerank_score") is not None for doc in docs)
    if selector == "monot5":
        key = "rerank_score" if scored else "rerank_label"
    values: list[Any] = [doc.get(key) for doc in docs]
    unscored = next((doc["id"] for doc, value in zip(docs, values, strict=True) if value is None), None)
    if unscored is not None:
        raise UserError(f"--selector {selector}: document {unscored} has no {key}; run reranker.py first")
    if selector == "monot5":
        labels = [doc.get("rerank_label") or str(value > 0.5).lower() for doc, value in zip(docs, values, strict=True)]
        relevant = [position for position, label in enumerate(labels, start=1) if label == "true"]
        return expert_sequence(docs, relevant, len(docs))
    best_first = sorted(range(1, len(docs) + 1), key=lambda position: -values[position - 1])
    scores = [values[position - 1] for position in best_first]
    gaps = [higher - lower for higher, lower in itertools.pairwise(scores)]
    return best_first[: gaps.index(max(gaps)) + 1] if gaps else best_first


def select_by_llm(selector: str, rows: list[Row], shown: list[list[Doc]], builder: RequestBuilder) -> tuple[list[Choice], list[Usage]]:
    """Return, for each question, the positions the LLM chose (or the reason why its output cannot be read), and the cost."""
    if selector == "dynamic":
        return choose_among(rows, shown, builder)
    usages = [Usage() for _ in rows]
    choices: list[Choice] = [[] for _ in rows]
    pairs = [(number, position) for number, docs in enumerate(shown) for position in range(1, len(docs) + 1)]
    verdicts = builder.ask([builder.judge_document(rows[number], shown[number][position - 1]) for number, position in pairs])
    for (number, position), completion in zip(pairs, verdicts, strict=True):
        usages[number].add(completion)
        verdict = VERDICT.match(completion.texts[0])
        choice = choices[number]
        if isinstance(choice, str):
            continue
        if not verdict:
            reason = completion.reason("selection") or f"no selection in the model's output {completion.texts[0][:200]!r}; expected Yes or No"
            choices[number] = f"{reason} (document {shown[number][position - 1]['id']})"
        elif verdict[1].lower() == "yes":
            choice.append(position)
    return choices, usages


def select_gold(row: Row, docs: list[Doc], path: str) -> list[int]:
    """Return 1-based positions of the documents that the row needs. Raises UserError if the row does not name them."""
    needed = needed_documents(row, path)
    if needed is None:
        raise UserError(f"{path}: row {row['id']}: has neither gold_docs nor positive_ctxs; add one, or omit "
                        "--selector gold")
    return [position for position, doc in enumerate(docs, start=1) if doc["id"] in needed]


def check_selectors(path: str, rows: Iterable[Row], selectors: list[str], topn: int) -> None:
    """Raise UserError for a row that lacks a key that a selector needs, before any question is answered."""
    for row in rows:
        docs = row["docs"][:topn]
        for selector in selectors:
            if selector == "gold":
                select_gold(row, docs, path)
                continue
            try:
                select_by_rule(selector, docs)
            except UserError as error:
                raise UserError(f"{path}: row {row['id']}: {error}") from error


def answer_rows(rows: list[Row], builders: Builders, selector: str, topn: int, path: str) -> list[Row]:
    """Return the answered rows of the file `path`, with at most `topn` documents shown.

    A row whose selection or answer cannot be read has `error` instead of `response`.
    """
    chooser, generator = builders
    shown = in_threads(lambda row: chooser.shown(row["question"], row["docs"][:topn]), rows)
    if selector in BY_LLM:
        choices, usages = select_by_llm(selector, rows, shown, chooser)
    else:
        usages = [Usage() for _ in rows]
        if selector == "gold":
            choices = [select_gold(row, docs, path) for row, docs in zip(rows, shown, strict=True)]
        else:
            choices = [select_by_rule(selector, docs) for docs in shown]
    chosen = {
        number: [docs[position - 1] for position in choice] for number, (docs, choice) in enumerate(zip(shown, choices, strict=True)) if isinstance(choice, list)
    }
    answers = answer_from(rows, chosen, generator)
    results = []
    for number, (row, docs, choice, usage) in enumerate(zip(rows, shown, choices, usages, strict=True)):
        selection = choice if isinstance(choice, str) else (choice, chosen[number])
        results.append(assemble_result(row, {"docs_shown": len(docs)}, selection, answers.get(number), usage))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    engine, calls = options_from(args, EngineOptions), options_from(args, CallOptions)

    def rows_of(path: str) -> Iterable[Row]:
        return read_rows(path, STAGE_KEYS["inference"].reads, reject=(lambda _: None) if args.on_error == "skip" else None)

    def load(runs: list[AnswerRun]) -> Builders:
        # Held-out rows have labels
        for path in dict.fromkeys(run.input_json for run in runs if run.value == "dynamic"):
            check_shown(path, rows_of(path), "--topn", args.topn)
        for path in dict.fromkeys(run.input_json for run in runs):
            if by_rule := [run.value for run in runs if run.input_json == path and run.value in BY_KEYS_OF_ROWS]:
                check_selectors(path, rows_of(path), by_rule, args.topn)
        return load_builders(engine, calls, both=any(run.value in BY_LLM for run in runs))

    def answer(rows: list[Row], builders: Builders, run: AnswerRun) -> list[Row]:
        return answer_rows(rows, builders, run.value, args.topn, run.input_json)

    answer_runs(runs_of(args, "selector"), calls, engine_inputs(engine, calls), load, answer)


if __name__ == "__main__":
    stage.run(main)
