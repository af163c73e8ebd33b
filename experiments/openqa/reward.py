"""Give every trajectory the reward of the experiment: the mean of token F1 and exact match, minus a cost per document.

Reads    INPUT_FILE      rows with id_lists, responses, answers (answer.py)
Writes   OUTPUT_FILE     + response_scores, score_terms: em, f1, length

    .venv/bin/python experiments/openqa/reward.py --input_file runs/openqa/seed_1/samples.jsonl --output_file runs/openqa/seed_1/rewards.jsonl
"""

import argparse
import statistics
from collections.abc import Sequence

from dynamicrag import stage
from dynamicrag.evaluation.metrics import score_row
from dynamicrag.files.jsonio import write_json
from dynamicrag.reward.terms import length_term
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import log


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--input_file", required=True, help="answered trajectories")
    parser.add_argument("--output_file", required=True, help="rewarded trajectories")
    parser.add_argument("--cost", type=float, default=0.02, help="cost of a document")
    return parser.parse_args(argv)


def rewarded(row: Row, cost: float) -> Row:
    """Return the row with the terms and the reward of each trajectory."""
    terms = [
        {"em": score_row("em", response, row) or 0.0, "f1": score_row("f1", response, row) or 0.0, "length": length_term(len(set(ids)))}
        for ids, response in zip(row["id_lists"], row["responses"], strict=True)
    ]
    scores = [(term["em"] + term["f1"]) / 2 - cost * len(set(ids)) for ids, term in zip(row["id_lists"], terms, strict=True)]
    return {**row, "response_scores": scores, "score_terms": terms}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows = [rewarded(row, args.cost) for row in read_rows(args.input_file, ("answers", "id_lists", "responses"))]
    write_json(args.output_file, rows)
    differing = sum(len({tuple(sorted(term.items())) for term in row["score_terms"]}) > 1 for row in rows)
    mean = statistics.fmean(score for row in rows for score in row["response_scores"])
    log.info("%s: mean reward %.3f; %d of %d questions have trajectories of different reward", args.output_file, mean, differing, len(rows))


if __name__ == "__main__":
    stage.run(main)
