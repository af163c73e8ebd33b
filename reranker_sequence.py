"""Write the reranker's behaviour-cloning set: the prompt is a question with documents, the target the expert's
identifiers.

If a row exceeds the trainer's cutoff_len, whole documents are removed from the end. A row whose target names a removed
document is left out and counted.

Reads    training_data/retrieval_data_rerank_sequence.jsonl   rows with docs and sequence
Writes   training_data/reranker_bc_training.json              LLaMA-Factory rows: instruction, input, output, system

    python reranker_sequence.py
"""

import argparse
from collections.abc import Sequence
from typing import Any

from dynamicrag import stage
from dynamicrag.llm.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.llm.recipe import LengthOptions, add_length_flags, check_columns, resolve_length_flags
from dynamicrag.llm.training_rows import Fitted, TrainingWindow, load_window
from dynamicrag.models.chat_templates import Messages
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.stage import options_from

NEEDS = STAGE_KEYS["reranker_sequence"].reads


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input_file", default="training_data/retrieval_data_rerank_sequence.jsonl", help="expert rows"
    )
    files.add_argument("--output_file", default="training_data/reranker_bc_training.json", help="SFT set")
    add_prompts_flag(files)
    add_length_flags(parser, "recipes/llama3_8b/sft.yaml")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def sft_row(row: Row, prompts: Prompts) -> dict[str, Any] | None:
    """Return one SFT example. It shows exactly the labelled documents."""
    return fit(row, prompts, TrainingWindow()).row


def fit(row: Row, prompts: Prompts, window: TrainingWindow) -> Fitted:
    """Return one SFT example with the labelled documents that fit the window; no row if the target names another one."""
    labelled = row["docs"][: len(row["true_id"]) + len(row["false_id"])]
    target = format_ids(row["sequence"], prompts.notation)

    def build(docs: Sequence[Doc]) -> Messages:
        return prompts.reranker(row["question"], docs)

    shown = window.documents(build, labelled, target)
    if shown is None or (len(shown) < len(labelled) and (max(row["sequence"], default=0) > len(shown) or not shown)):
        return Fitted(None)
    return Fitted(training_row(build(shown), output=target), len(labelled) - len(shown))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    inputs = [args.input_file, *filter(None, [args.prompts]), *resolve_length_flags(args)]
    output = Output(vars(args), [args.output_file], inputs)
    if output.finished:
        return
    prompts = Prompts(args.prompts)
    total = count_rows(args.input_file, NEEDS, skip_malformed=bool(output.reject))
    window = load_window(options_from(args, LengthOptions))
    rows = read_rows(args.input_file, NEEDS, reject=output.reject)
    fitted = window.kept(rows, lambda row: [fit(row, prompts, window)], total, "training rows", args.input_file)
    examples = output.publish(args.output_file, (result.row for result in fitted))
    check_columns(args.train_recipe, args.output_file)
    output.finish(examples=examples, **window.counts())


if __name__ == "__main__":
    stage.run(main)
