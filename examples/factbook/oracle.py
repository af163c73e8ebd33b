"""Add every needed passage to the documents of an evaluation set, to see how later stages work without retrieval
errors.

A needed passage that is not among the first --n_docs documents replaces the last one that is not needed. If a question
needs more than --n_docs documents, all of them are shown.

Reads    --input_file     an evaluation set with docs and gold_docs
Writes   --output_file    the same rows with --n_docs docs, in the original order or shuffled

    python examples/factbook/oracle.py --input_file runs/demo_default/eval_data/test.jsonl \\
        --output_file runs/demo_default/eval_data/test_oracle.jsonl
"""

import argparse
import random
from collections.abc import Sequence

from warm_up import read_questions, show

from dynamicrag.files.jsonio import write_json
from dynamicrag.stage import ArgumentParser, derive_seed, log, run

ORDERS = ("retrieval", "shuffled")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument("--input_file", required=True, help="evaluation set after retrieval or reranking")
    group.add_argument("--passages", default="data/factbook/passages.jsonl", help="passages written by corpus.py")
    group.add_argument("--output_file", required=True, help="evaluation set with the needed passages")
    group.add_argument("--n_docs", type=int, default=5, help="documents shown to the LLM")
    group = parser.add_argument_group("order")
    group.add_argument("--order", choices=ORDERS,
                       default="retrieval", help="order of the documents: as in the input, or shuffled")
    group.add_argument("--seed", type=int, default=42, help="seed of the shuffled order")
    return parser.parse_args(argv)


def documents_shown(rows: list[dict], passages: dict[str, dict], n_docs: int, order: str, seed: int) -> list[list[dict]]:
    """Return the documents of each row, including every needed one, in one of ORDERS."""
    return [
        show(row, passages, n_docs, random.Random(derive_seed(seed, row["id"], order)) if order == "shuffled" else None)
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows, passages = read_questions(args.input_file, args.passages)
    shown = documents_shown(rows, passages, args.n_docs, args.order, args.seed)
    made = [row | {"docs": docs} for row, docs in zip(rows, shown, strict=True)]
    write_json(args.output_file, made)
    added = sum(not {*row["gold_docs"]} <= {doc["id"] for doc in row["docs"][:args.n_docs]} for row in rows)
    log.info("%s: %d questions; %d lacked a needed passage", args.output_file, len(made), added)


if __name__ == "__main__":
    run(main)
