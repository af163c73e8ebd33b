"""Write SFT rows from the best of a question's trajectories (best-of-n, also called rejection sampling or RAFT).

Reranker: the prompt is the question with its documents, the target is the selection with the highest reward; of several,
the one with the fewest documents, then the first. Generator: the prompt is the question with the documents of this
selection, the target is the gold answer (or the trajectory's own, --generator-chosen best). Questions whose rewards do
not differ are left out, because they say nothing about the choice (--keep-equal keeps them). If a row exceeds the
trainer's cutoff_len, whole documents are removed from the end. A row that names a removed document, or still does not
fit, is left out and counted.

Reads    training_data/llama3_8b_output_dpo.jsonl              rows with id_lists, responses, response_scores, score_terms
Writes   training_data/llama3_8b_reranker_best_of_n.json       LLaMA-Factory rows: instruction, input, output, system
         training_data/llama3_8b_generator_best_of_n.json      the same for the generator

    python construct_best_of_n.py
"""

import argparse
from collections.abc import Sequence
from functools import partial

from dynamicrag import stage
from dynamicrag.llm.recipe import add_length_flags
from dynamicrag.reward.single_rows import Single, add_file_flags, best_trajectory, make_single_rows
from dynamicrag.reward.trajectories import add_keep_mean_flag
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.rows.tasks import target_answer

NEEDS = STAGE_KEYS["construct_best_of_n"].reads


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    add_file_flags(parser, "best_of_n")
    questions = parser.add_argument_group("questions")
    questions.add_argument("--keep-equal", action="store_true", help="use questions whose rewards do not differ, too")
    add_keep_mean_flag(questions)
    questions.add_argument("--generator-chosen", choices=["gold", "best"], default="gold", help="target of the generator: the gold answer, or the best trajectory's")
    add_length_flags(parser, "recipes/llama3_8b/best_of_n.yaml")
    stage.add_common_flags(parser)
    return parser.parse_args(argv)


def best_of(row: Row, role: str, keep_equal: bool = False, generator_chosen: str = "gold") -> list[Single]:
    """Return the best trajectory of a row as a training example; none if the rewards do not differ or the target is empty."""
    if not keep_equal and len(set(row["response_scores"])) < 2:
        return []
    best = best_trajectory(row)
    answer = target_answer(row) if generator_chosen == "gold" else row["responses"][best]
    return [Single(row["id_lists"][best], answer)] if role == "reranker" or answer.strip() else []


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    make_single_rows(args, NEEDS, partial(best_of, keep_equal=args.keep_equal, generator_chosen=args.generator_chosen))


if __name__ == "__main__":
    stage.run(main)
