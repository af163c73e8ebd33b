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
         training_data/llama3_8b_generator_kto.json      the same for the generator

    python construct_kto.py
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial

from dynamicrag import stage
from dynamicrag.llm.recipe import add_length_flags
from dynamicrag.reward.single_rows import Single, add_file_flags, make_single_rows
from dynamicrag.reward.trajectories import add_keep_mean_flag
from dynamicrag.rows.row import STAGE_KEYS, Row

NEEDS = STAGE_KEYS["construct_kto"].reads
EQUAL = 1e-9  # rewards that differ by less are the mean of the question, apart from rounding


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    add_file_flags(parser, "kto")
    questions = parser.add_argument_group("questions")
    add_keep_mean_flag(questions)
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
    # The trainer estimates KL from each output under the prompt before it, which must be another question's
    make_single_rows(args, NEEDS, partial(tagged, min_distance=args.min_distance), mixed=True)


if __name__ == "__main__":
    stage.run(main)
