"""Write the generator's SFT set: question and its relevant documents in, the gold answer out.

Reads    training_data/training_data_sft.jsonl          rows with docs, true_id and answers
Writes   training_data/generator_sft_training.json      LLaMA-Factory rows: instruction, input, output, system

    python construct_generator_sft.py
"""

from collections.abc import Iterator

from dynamicrag import stage
from dynamicrag.output import Output
from dynamicrag.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.records import Row, count_rows, read_rows
from dynamicrag.stage import UserError, log
from dynamicrag.tasks import target_answer

NEEDS = ("docs", "true_id")


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/training_data_sft.jsonl", help="labelled rows")
    files.add_argument("--output_file", default="training_data/generator_sft_training.json", help="SFT set")
    add_prompts_flag(files)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--max_docs", type=int, default=14, help="most relevant documents shown, best rerank score first")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def sft_row(row: Row, prompts: Prompts, max_docs: int) -> dict[str, str]:
    """One SFT example. A question none of whose documents is relevant is answered without documents."""
    relevant = sorted(row["true_id"], key=lambda position: -row["docs"][position - 1]["rerank_score"])[:max_docs]
    docs = [row["docs"][position - 1] for position in relevant]
    messages = prompts.generator(row["question"], docs, prompts.instruction(row.get("dataset")), relevant)
    return training_row(messages, output=target_answer(row))


def main(argv=None):
    args = parse_args(argv)
    out = Output(args, [args.output_file], [args.input_file, *filter(None, [args.prompts])])
    if out.finished:
        return
    prompts = Prompts(args.prompts)
    unanswered = 0

    def examples() -> Iterator[dict[str, str]]:
        nonlocal unanswered
        for row in read_rows(args.input_file, NEEDS, reject=out.reject):
            unjudged = next((p for p in row["true_id"] if row["docs"][p - 1].get("rerank_score") is None), None)
            if unjudged is not None:
                raise UserError(f"{args.input_file}: row {row['id']}: docs[{unjudged - 1}] has no rerank_score; run reranker.py")
            if any(answer.strip() for answer in row.get("answers") or ()):
                yield sft_row(row, prompts, args.max_docs)
            else:
                unanswered += 1

    count_rows(args.input_file, NEEDS, skip_malformed=bool(out.reject))
    count = out.publish(args.output_file, examples())
    if unanswered:
        log.warning("%d rows have no gold answer and train nothing", unanswered)
    out.finish(examples=count)


if __name__ == "__main__":
    stage.run(main)
