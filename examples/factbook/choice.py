"""Evaluate the selections of a checkpoint when every needed document is shown, independently of retrieval.

The needed documents are shown together with the retriever's best other documents, in the retriever's order and
shuffled, in the reranker's prompt. A selection is exact if it names the needed documents and no others.

Reads    --input_file     retriever.py's output for the questions
Writes   --output_file    {order of the documents: {"all": means, "kinds": {kind: means}}}; the means are evaluate.py's of selections

    python examples/factbook/choice.py --model runs/demo_default/DynamicRAG_smollm2_135m/sft \
        --input_file runs/demo_default/output/retrieval_test.jsonl --output_file choice.json
"""


import argparse
from collections.abc import Sequence

import orjson
from oracle import ORDERS, documents_shown
from warm_up import read_questions

from dynamicrag.evaluation.selections import Chosen, summarise_chosen
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.llm.engine import Request, VllmEngine
from dynamicrag.llm.options import EngineOptions
from dynamicrag.llm.prompts import Prompts
from dynamicrag.rows.identifiers import ids_pattern, parse_ids
from dynamicrag.stage import ArgumentParser, derive_seed, log, run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--model", required=True, help="folder of the checkpoint")
    group.add_argument("--input_file", required=True, help="questions with retrieved docs")
    group.add_argument("--output_file", required=True, help="means of the selections as JSON")
    group.add_argument("--passages", default="data/factbook/passages.jsonl", help="passages written by corpus.py")
    group.add_argument("--template", default="template/smollm2.jinja", help="chat template of the checkpoint")
    group.add_argument("--prompts", metavar="FILE",
                       help="prompts that the checkpoint was trained with (default: the default prompts)")
    group = parser.add_argument_group("questions")
    group.add_argument("--questions", type=int, default=500,
                       help="maximum number of questions, from the start of the file")
    group.add_argument("--n_docs", type=int, default=5, help="number of documents shown")
    group.add_argument("--seed", type=int, default=42, help="seed of the shuffled order")
    return parser.parse_args(argv)


def choices(engine: VllmEngine, rows: list[dict], shown: list[list[dict]], prompts: Prompts, seed: int) -> list[Chosen]:
    """Return the selection of each question from the documents `shown`, compared with the documents it needs."""
    completions = engine.complete([
        Request(prompts.reranker(row["question"], docs), derive_seed(seed, row["id"]), 64, pattern=ids_pattern(len(docs), prompts.notation))
        for row, docs in zip(rows, shown, strict=True)
    ])
    chosen = []
    for row, docs, completion in zip(rows, shown, completions, strict=True):
        ids = {docs[position - 1]["id"] for position in parse_ids(completion.texts[0], len(docs), notation=prompts.notation).ids}
        needed = set(row["gold_docs"])
        chosen.append(Chosen(len(needed), len(ids), len(ids & needed), len(needed)))
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows, passages = read_questions(args.input_file, args.passages)
    rows, prompts = rows[:args.questions], Prompts(args.prompts)
    engine = VllmEngine(EngineOptions(args.model, args.template, max_model_len=2048))
    found = {}
    for order in ORDERS:
        shown = documents_shown(rows, passages, args.n_docs, order, args.seed)
        chosen = choices(engine, rows, shown, prompts, args.seed)
        by_kind = {kind: summarise_chosen([one for one, row in zip(chosen, rows, strict=True) if row["kind"] == kind]) for kind in sorted({row["kind"] for row in rows})}
        found[order] = {"all": summarise_chosen(chosen), "kinds": by_kind}
    with atomic_writer(args.output_file) as file:
        file.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
    log.info("%s: %d questions, exact %s", args.output_file, len(rows), ", ".join(f"{order} {found[order]['all']['exact']:.1f}" for order in ORDERS))


if __name__ == "__main__":
    run(main)
