"""Write rows for KTO from rewarded trajectories: single outputs that are desirable or not, without pairs.

Reranker: every set of documents that was selected for a question is one row. Its reward is the mean of its trajectories'
rewards. It is desirable if this is above the mean reward of all the question's trajectories, and undesirable if it is
below; a set at the mean is left out, and so are questions whose rewards do not differ. The selection is written in the
order of the set's best trajectory. Generator: every answer of a question is one row, with the documents that it was given
from. It is desirable if its correctness (em) is above the mean of the question, and undesirable if it is below: the reward
itself also judges the choice of documents. If a row exceeds the trainer's cutoff_len, whole documents are removed from the
end. A row that names a removed document, or still does not fit, is left out and counted.

Reads    training_data/llama3_8b_output_dpo.jsonl        rows with id_lists, responses, response_scores, score_terms
Writes   training_data/llama3_8b_reranker_kto.json       LLaMA-Factory rows: instruction, input, output, system, kto_tag
         training_data/llama3_8b_generator_kto.json      likewise

    python construct_kto.py
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from construct_dpo import bounds, check_docs_shown, complete, warn_of_defaults
from dynamicrag import stage
from dynamicrag.llm.prompts import add_prompts_flag
from dynamicrag.llm.recipe import LengthOptions, add_length_flags
from dynamicrag.llm.training_rows import load_window
from dynamicrag.reward.preferences import worth_learning_from
from dynamicrag.reward.single_rows import Single, add_role_flags, output_of, say_rows, write_single_rows
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.stage import options_from

NEEDS = STAGE_KEYS["construct_kto"].reads
EQUAL = 1e-9  # rewards that differ by less are the mean of the question, apart from rounding


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="training_data/llama3_8b_output_dpo.jsonl", help="rewarded trajectories")
    add_role_flags(files, "kto")
    add_prompts_flag(files)
    questions = parser.add_argument_group("questions")
    questions.add_argument(
        "--keep-mean", metavar="LO,HI", type=bounds, default=(0.0, 1.0),
        help="use only questions whose trajectories have a mean correctness (em) in this range, such as 0.01,0.99",
    )
    questions.add_argument("--min-distance", type=float, default=0.0, help="minimum distance from the question's mean, of reward or correctness")
    add_length_flags(parser, "recipes/llama3_8b/kto.yaml")
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if not args.min_distance >= 0:
        parser.error("--min-distance must be at least 0")
    return args


def tagged(row: Row, role: str, min_distance: float = 0.0) -> list[Single]:
    """Return the desirable and undesirable outputs of a row, in the order of its trajectories, each with `kto_tag`."""
    lists, scores = row["id_lists"], row["response_scores"]
    if role == "generator":
        scores = [terms["em"] for terms in row["score_terms"]]
    equal: dict[object, list[int]] = {}  # the trajectories with the same set of documents, or with the same documents and answer
    for trajectory, ids in enumerate(lists):
        key = frozenset(ids) if role == "reranker" else (*ids, row["responses"][trajectory])
        equal.setdefault(key, []).append(trajectory)
    mean, singles = statistics.fmean(scores or [0.0]), []
    for trajectories in equal.values():
        distance = statistics.fmean(scores[trajectory] for trajectory in trajectories) - mean
        best = max(trajectories, key=lambda trajectory: (scores[trajectory], -trajectory))
        if abs(distance) > max(EQUAL, min_distance) and (role == "reranker" or row["responses"][best].strip()):
            singles.append(Single(lists[best], row["responses"][best], {"kto_tag": distance > 0}))
    return singles


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = output_of(args)
    if output.finished:
        return
    window, defaults, questions = load_window(options_from(args, LengthOptions)), Counter(), Counter()

    # Read once for the counts and the malformed rows, then once per role
    def read(reject, defaults: Counter) -> Iterator[Row]:
        rows = read_rows(args.input_file, NEEDS, reject=reject, complete=partial(complete, defaults=defaults))
        return (row for row in check_docs_shown(rows, args.input_file) if worth_learning_from(row, args.keep_mean))

    for row in read(output.reject, defaults):
        questions["kept"] += 1
        questions["differing"] += len(set(row["response_scores"])) > 1
    warn_of_defaults(defaults, args.input_file)
    # The trainer estimates KL from each output under the prompt before it, which must be another question's
    singles = partial(tagged, min_distance=args.min_distance)
    counts, sizes = write_single_rows(args, output, lambda: read(output.ignore, Counter()), singles, window, mixed=True)
    output.finish(**questions, **say_rows(args, counts, sizes, window))


if __name__ == "__main__":
    stage.run(main)
