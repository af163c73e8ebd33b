"""Choose the documents from which the generator learns to answer: none, the first 1 to 6, or the needed ones among others.

The generator is trained on every kind of context that a selector may give it, so that no selector has an advantage. The
rows go to construct_generator_sft.py, which writes the prompts. Two files are written, one for each wording of the
prompt (docs/openqa.md).

Reads    INPUT_FILE                   reranked rows (reranker.py --sort) with gold_docs and part
Writes   OUTPUT_DIR/contexts_1.jsonl  half of the rows of the part `generator`, + true_id, false_id: the documents of the context
         OUTPUT_DIR/contexts_2.jsonl  the other half

    .venv/bin/python experiments/openqa/contexts.py --input_file runs/openqa/reranked.jsonl --output_dir runs/openqa/generator
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.files.jsonio import write_json
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, derive_seed, log

# Kinds of context and their shares. The last one has the needed documents that the search gave, and up to two others.
KINDS = {"none": 0.15, "top": 0.5, "needed": 0.35}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--input_file", required=True, help="reranked rows")
    parser.add_argument("--output_dir", required=True, help="folder of the contexts")
    parser.add_argument("--n_docs", type=int, default=6, help="maximum number of documents in a context")
    stage.add_seed_flag(parser)
    return parser.parse_args(argv)


def context_of(row: Row, n_docs: int, rng: random.Random) -> tuple[str, list[int]]:
    """Return the kind of a row's context, and the 1-based positions of its documents, ascending."""
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    positions = list(range(1, len(row["docs"]) + 1))
    if kind == "none":
        return kind, []
    if kind == "top":
        return kind, positions[: rng.randint(1, n_docs)]
    needed = [position for position in positions if row["docs"][position - 1]["id"] in row["gold_docs"]][:n_docs]
    others = [position for position in positions[: 2 * n_docs] if position not in needed]
    return kind, sorted(needed + rng.sample(others, min(rng.randint(0, 2), len(others), n_docs - len(needed))))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    halves: tuple[list[dict], list[dict]] = ([], [])
    kinds: Counter[tuple[str, int]] = Counter()
    for number, row in enumerate(row for row in read_rows(args.input_file, ("docs", "gold_docs", "answers")) if row["part"] == "generator"):
        kind, chosen = context_of(row, args.n_docs, random.Random(derive_seed(args.seed, "context", row["id"])))
        kinds[kind, len(chosen)] += 1
        others = [position for position in range(1, len(row["docs"]) + 1) if position not in chosen]
        halves[number % 2].append({**row, "true_id": chosen, "false_id": others})
    if not halves[1]:
        raise UserError(f"{args.input_file}: has fewer than two rows of the part generator; make it with experiments/openqa.sh")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(halves, start=1):
        write_json(folder / f"contexts_{number}.jsonl", rows)
    log.info("contexts by kind and number of documents: %s", ", ".join(f"{kind} {k}: {kinds[kind, k]}" for kind, k in sorted(kinds)))


if __name__ == "__main__":
    stage.run(main)
