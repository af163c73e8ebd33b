"""Divide the questions of the data set openmix for experiments/openqa.sh.

The test set is openmix's, with fewer arithmetic questions (--test_cap), because they need no document. The dev set takes
questions of openmix's dev set in the proportions of the test set, and those of --dev_from_train from openmix's train set.
The remaining train questions give disjoint parts for the generator, for cloning and for RL, each with the same shares
(SHARES). All other train questions train the reranker, except --reranker_held_out of them, which calibrate and evaluate it.

Reads    DATA/{train,dev,test}.jsonl, or .jsonl.gz           rows with answers, gold_docs, dataset, and docs in some data sets
Writes   OUTPUT_DIR/{asked,reranker}_{own,searched}.jsonl     + part, held_out. reranker: the part of the reranker; asked: all
                                                             other parts; own: rows with docs; searched: rows that need a search

    .venv/bin/python experiments/openqa/splits.py --data data/openmix --output_dir runs/openqa/questions
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamicrag import stage
from dynamicrag.files.jsonio import write_json
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, derive_seed, log

# Shares of the data sets in each training part. Two thirds of the questions with several needed documents are used; the
# others train the reranker.
SHARES = {"nq": 0.52, "hotpotqa": 0.20, "2wikimqa": 0.17, "musique": 0.03, "svamp": 0.08}
NEEDS = ("answers", "gold_docs")


def counts_flag(text: str) -> dict[str, int]:
    """Parse NAME=COUNT,NAME=COUNT. Raises ArgumentTypeError."""
    try:
        return {name: int(count) for name, count in (part.split("=") for part in filter(None, text.split(",")))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=COUNT,NAME=COUNT") from error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--data", required=True, help="folder of openmix")
    parser.add_argument("--output_dir", required=True, help="folder of the files")
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--test_cap", type=counts_flag, default={"svamp": 60}, help="maximum number of test questions of a data set (default: svamp=60)")
    sizes.add_argument("--dev", type=int, default=300, help="dev questions")
    sizes.add_argument("--dev_from_train", type=counts_flag, default={"2wikimqa": 80, "musique": 30},
                       help="dev questions that are taken from train (default: 2wikimqa=80,musique=30)")
    sizes.add_argument("--generator", type=int, default=600, help="questions that train the generator")
    sizes.add_argument("--cloning", type=int, default=600, help="questions for behaviour cloning")
    sizes.add_argument("--rl", type=int, default=400, help="questions for reinforcement learning")
    sizes.add_argument("--reranker_held_out", type=int, default=200, help="questions of the reranker's part that do not train it")
    stage.add_seed_flag(parser)
    return parser.parse_args(argv)


def read_set(folder: Path, name: str) -> list[Row]:
    """Return the rows of DATA/NAME.jsonl, or of DATA/NAME.jsonl.gz. Raises UserError if there is neither."""
    path = next((path for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder / name}.jsonl: does not exist, and neither does {name}.jsonl.gz; set DATA to the folder of openmix (docs/openqa.md)")
    return list(read_rows(path, NEEDS))


def apportion(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Return whole numbers in proportion to `weights` that add up to `total`: the largest remainders are rounded up."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class Pool:
    """The questions of one file that no part has taken yet, in an order that depends only on the seed and their ids."""

    def __init__(self, rows: list[Row], path: str, seed: int):
        self.path = path
        self._rows: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: (derive_seed(seed, "split", row["id"]), row["id"])):
            self._rows.setdefault(row["dataset"], []).append(row)

    def counts(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self._rows.items()}

    def take(self, counts: Mapping[str, int], part: str) -> list[Row]:
        """Return and remove questions of each data set. Raises UserError if there are too few."""
        taken = []
        for name, count in counts.items():
            rows = self._rows.get(name, [])
            if len(rows) < count:
                raise UserError(f"{self.path}: has {len(rows)} questions of {name} left, but {part} needs {count}; give a smaller --{part}")
            taken += rows[:count]
            self._rows[name] = rows[count:]
        return taken


def divide(train: list[Row], dev: list[Row], test: list[Row], args: argparse.Namespace) -> dict[str, list[Row]]:
    """Return the rows of every part, each in random order."""
    of_test = Pool(test, "test", args.seed)
    sizes = {name: min(count, args.test_cap.get(name, count)) for name, count in of_test.counts().items()}
    of_train, of_dev = Pool(train, "train", args.seed), Pool(dev, "dev", args.seed)
    own_dev = apportion(args.dev - sum(args.dev_from_train.values()), {name: sizes[name] for name in of_dev.counts() if name in sizes})
    parts = {
        "dev": of_dev.take(own_dev, "dev") + of_train.take(args.dev_from_train, "dev_from_train"),
        **{part: of_train.take(apportion(getattr(args, part), SHARES), part) for part in ("generator", "cloning", "rl")},
        "test": of_test.take(sizes, "test"),
        "reranker": of_train.take(of_train.counts(), "reranker"),
    }
    return {part: random.Random(derive_seed(args.seed, part)).sample(rows, len(rows)) for part, rows in parts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    folder, output = Path(args.data), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    parts = divide(*(read_set(folder, name) for name in ("train", "dev", "test")), args)
    files: dict[str, list[dict]] = {f"{part}_{source}": [] for part in ("asked", "reranker") for source in ("own", "searched")}
    for part, rows in parts.items():
        for number, row in enumerate(rows):
            file = f"{'reranker' if part == 'reranker' else 'asked'}_{'own' if row.get('docs') else 'searched'}"
            files[file].append({**row, "part": part, "held_out": part != "reranker" or number < args.reranker_held_out})
        counts = Counter(row["dataset"] for row in rows)
        log.info("%s: %d questions: %s", part, len(rows), ", ".join(f"{name} {counts[name]}" for name in sorted(counts)))
    for file, rows in files.items():
        write_json(output / f"{file}.jsonl", rows)


if __name__ == "__main__":
    stage.run(main)
