"""Write the generator's SFT set: the prompt is the question with its relevant documents, the target is the gold answer.

With --documents top:K, the prompt shows the first K documents instead, as in retrieval-augmented generation with a
fixed number of documents.

If a row exceeds the trainer's cutoff_len, whole documents are removed from the end. A row that still does not fit is
left out and counted.

Reads    training_data/training_data_sft.jsonl          rows with docs, true_id and answers
Writes   training_data/generator_sft_training.json      LLaMA-Factory rows: instruction, input, output, system

    python construct_generator_sft.py
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dynamicrag import stage
from dynamicrag.llm.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.llm.recipe import LengthOptions, add_length_flags, check_columns, resolve_length_flags
from dynamicrag.llm.training_rows import Fitted, TrainingWindow, load_window
from dynamicrag.models.chat_templates import Messages
from dynamicrag.rows.expert import best_first, unjudged_position
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, read_rows
from dynamicrag.rows.row import STAGE_KEYS, Doc, Row
from dynamicrag.rows.tasks import target_answer
from dynamicrag.stage import UserError, log, options_from

NEEDS = STAGE_KEYS["construct_generator_sft"].reads


def documents_flag(value: str) -> str:
    """Check the value of --documents and return it. Raises ArgumentTypeError."""
    if not re.fullmatch(r"labelled|top:[1-9]\d*", value):
        raise argparse.ArgumentTypeError(f"{value}: expected labelled or top:K")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/training_data_sft.jsonl", help="labelled rows")
    files.add_argument("--output_file", default="training_data/generator_sft_training.json", help="SFT set")
    add_prompts_flag(files)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--documents", type=documents_flag, default="labelled", metavar="labelled|top:K",
                        help="documents in the prompt: the relevant ones, or the first K whatever their labels")
    recipe.add_argument("--max_docs", type=int, default=14,
                        help="maximum number of relevant documents, best rerank score first")
    add_length_flags(parser, "recipes/llama3_8b/sft.yaml")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def sft_row(row: Row, prompts: Prompts, max_docs: int, documents: str = "labelled") -> dict[str, Any] | None:
    """Return one SFT example. A question without relevant documents is answered without documents."""
    return fit(row, prompts, max_docs, TrainingWindow(), documents).row


def fit(row: Row, prompts: Prompts, max_docs: int, window: TrainingWindow, documents: str = "labelled") -> Fitted:
    """Return one SFT example with the relevant documents that fit the window; no row if none of them fits."""
    if documents == "labelled":
        positions = best_first(row["docs"], row["true_id"])[:max_docs]
    else:
        positions = list(range(1, min(int(documents.removeprefix("top:")), max_docs, len(row["docs"])) + 1))
    relevant = [row["docs"][position - 1] for position in positions]
    instruction, answer = prompts.instruction(row), target_answer(row)

    def build(docs: Sequence[Doc]) -> Messages:
        return prompts.generator(row["question"], docs, instruction, positions[: len(docs)])

    shown = window.documents(build, relevant, answer)
    if shown is None or (relevant and not shown):
        return Fitted(None)
    return Fitted(training_row(build(shown), output=answer), len(relevant) - len(shown))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    inputs = [args.input_file, *filter(None, [args.prompts]), *resolve_length_flags(args)]
    output = Output(vars(args), [args.output_file], inputs)
    if output.finished:
        return
    prompts = Prompts(args.prompts)
    unanswered, first_unanswered, unscored = 0, "", 0

    def answered() -> Iterator[Row]:
        nonlocal unanswered, first_unanswered, unscored
        for row in read_rows(args.input_file, NEEDS, reject=output.reject):
            if not any(answer.strip() for answer in row.get("answers") or ()):
                unanswered += 1
                first_unanswered = first_unanswered or row["id"]
                continue
            if (unjudged := unjudged_position(row["docs"], row["true_id"])) is not None:
                raise UserError(f"{args.input_file}: row {row['id']}: docs[{unjudged - 1}] has no rerank_score; run "
                                "reranker.py first")
            unscored += bool(row["true_id"]) and row["docs"][row["true_id"][0] - 1].get("rerank_score") is None
            yield row

    total = count_rows(args.input_file, NEEDS, skip_malformed=bool(output.reject))
    window = load_window(options_from(args, LengthOptions))
    fitted = window.kept(answered(), lambda row: [fit(row, prompts, args.max_docs, window, args.documents)], total, "training rows", args.input_file)
    count = output.publish(args.output_file, (result.row for result in fitted))
    if unanswered:
        log.warning("%s: %d rows have no gold answer and are not used; the first is %s", args.input_file, unanswered, first_unanswered)
    if unscored:
        log.warning("%s: %d rows have relevant documents without rerank_score; the order of the documents is used instead",
                    args.input_file, unscored)
    check_columns(args.train_recipe, args.output_file)
    output.finish(examples=count, **window.counts())


if __name__ == "__main__":
    stage.run(main)
