"""Evaluate all seeds of the evidence run: the scores of each selector, and where selection gains and loses.

Every question is answered by the models of every seed. Differences are by question and seed, and their intervals
describe new questions and models of new seeds (crossed random effects, dynamicrag/evaluation/crossed.py). The fixed
number of documents is the best one on the dev questions, or on the test questions if a seed has no dev answers, which
favours the fixed number.

Reads    SEEDS                              files written by experiments/evidence_seed.py
Writes   OUTPUT_DIR/evidence.md             the tables
         OUTPUT_DIR/evidence.json           the differences, unrounded

    .venv/bin/python experiments/evidence.py \\
        --seeds runs/evidence_reranker/seed_1.json runs/evidence_reranker/seed_2.json runs/evidence_reranker/seed_3.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson
from evidence_systems import NAMES, fixed_number, read_seeds, read_systems
from evidence_tables import choice_table, difference_table, differences, kind_table, rounds_table, system_table

from dynamicrag import stage
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import log


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--seeds", nargs="+", required=True, help="one file per seed")
    parser.add_argument("--output_dir", default="runs/evidence_reranker", help="folder of evidence.md and evidence.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    seeds = read_seeds(args.seeds)
    systems = read_systems(seeds, args.seeds)
    best, decided_by = fixed_number(seeds, systems, args.seeds[0])
    kinds = [*seeds[0]["questions"].values()]
    compared = differences(systems, best, kinds)
    choices, rounds = [seed["choice"] for seed in seeds], [seed["rounds"] for seed in seeds]
    text = "\n\n".join([
        f"{len(kinds)} questions, seeds: {len(seeds)}, labels for training: {seeds[0]['labels']}. Scores are each kind's own metric, 0 to 100. "
        f"The best fixed number, {NAMES['retrieved', best]}, was chosen on the {decided_by} questions. Intervals describe new questions "
        f"{'and models of new seeds' if len(seeds) > 1 else 'for this one model'}.",
        system_table(systems),
        f"Differences, by question and seed:\n\n{difference_table(compared)}",
        f"By kind: score, and documents used in brackets:\n\n{kind_table(systems, best, kinds)}",
        *([f"Exact selections if every needed document is among the five shown:\n\n{choice_table(choices)}"] if all(choices) else []),
        *([f"Rounds of sampling, reward and DPO; correlations are over trajectories:\n\n{rounds_table(rounds)}"] if all(rounds) else []),
    ])
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_writer(folder / "evidence.md") as file:
        file.write(f"{text}\n".encode())
    with atomic_writer(folder / "evidence.json") as file:
        figures = {
            "seeds": args.seeds, "labels": seeds[0]["labels"], "best_fixed": best, "fixed_chosen_on": decided_by,
            "compared": {name: {"by_question": found.by_question._asdict(), "by_kind": found.by_kind._asdict(), "seeds": found.seeds} for name, found in compared.items()},
        }
        file.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    print(text)
    log.info("%s and evidence.json", folder / "evidence.md")


if __name__ == "__main__":
    stage.run(main)
