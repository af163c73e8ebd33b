"""Write the reranker's behaviour-cloning set: question and documents in, the expert's identifiers out.

Reads    training_data/retrieval_data_rerank_sequence.jsonl   rows with docs and sequence
Writes   training_data/reranker_bc_training.json              LLaMA-Factory rows: instruction, input, output, system

    python reranker_sequence.py
"""

from dynamicrag import stage
from dynamicrag.output import Output
from dynamicrag.prompts import Prompts, add_prompts_flag, training_row
from dynamicrag.records import Row, count_rows, read_rows
from dynamicrag.selection import format_ids

NEEDS = ("docs", "true_id", "false_id", "sequence")


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input_file", default="training_data/retrieval_data_rerank_sequence.jsonl", help="expert rows"
    )
    files.add_argument("--output_file", default="training_data/reranker_bc_training.json", help="SFT set")
    add_prompts_flag(files)
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def sft_row(row: Row, prompts: Prompts) -> dict[str, str]:
    """One SFT example. The documents shown are exactly those that were labelled."""
    shown = row["docs"][: len(row["true_id"]) + len(row["false_id"])]
    return training_row(prompts.reranker(row["question"], shown), output=format_ids(row["sequence"]))


def main(argv=None):
    args = parse_args(argv)
    out = Output(args, [args.output_file], [args.input_file, *filter(None, [args.prompts])])
    if out.finished:
        return
    prompts = Prompts(args.prompts)
    count_rows(args.input_file, NEEDS, skip_malformed=bool(out.reject))
    rows = read_rows(args.input_file, NEEDS, reject=out.reject)
    out.finish(examples=out.publish(args.output_file, (sft_row(row, prompts) for row in rows)))


if __name__ == "__main__":
    stage.run(main)
