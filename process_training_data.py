"""Convert reranked retrieval results to expert sequences for behaviour cloning (DynamicRAG, first training stage).

The reranker's labels determine which of the documents shown are relevant. With `--labels gold`, the documents that the
data set names as needed (gold_docs, DPR's positive_ctxs) are relevant, ordered by reranker score. A seeded sample of
the questions becomes expert rows, each with the sequence of identifiers that the LLM learns to write. All other
questions are used for generator SFT and DPO. Every row is labelled, used or not: a row without labels would teach the
generator that nothing was found. Published training data has labels without scores; the order of the documents is then
used instead of scores.

Reads    output/retrieval_data_rerank.jsonl                       rows with docs, rerank_label and rerank_score
Writes   training_data/retrieval_data_rerank_sequence.jsonl       + true_id, false_id, true_count, sequence, sequence_length
         training_data/retrieval_data_rerank_normal.jsonl         + true_id, false_id, true_count

    python process_training_data.py
"""

import argparse
import itertools
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

from dynamicrag import stage
from dynamicrag.rows.expert import EXPERT_LENGTH, expert_sequence, unjudged_position
from dynamicrag.rows.gold import needed_documents
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import STAGE_KEYS, Row
from dynamicrag.rows.shown import DOCUMENTS_HELP, DOCUMENTS_SHOWN
from dynamicrag.stage import UserError, log

PUBLISHED_EXPERT_ROWS = 30_000  # of 150,000
EXPERT_SHARE = 5  # in a smaller data set, one fifth of the rows become expert rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", default="output/retrieval_data_rerank.jsonl", help="reranked rows")
    files.add_argument(
        "--sequence_file", default="training_data/retrieval_data_rerank_sequence.jsonl", help="expert rows"
    )
    files.add_argument("--normal_file", default="training_data/retrieval_data_rerank_normal.jsonl", help="all other rows")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--targets", choices=["expert", "padded"], default="expert",
        help="one sequence per question, or the published recipe: one per length, filled with irrelevant documents",
    )
    recipe.add_argument("--labels", choices=["reranker", "gold"],
                        default="reranker", help="source of the relevance labels")
    recipe.add_argument("--n_docs", type=int, default=DOCUMENTS_SHOWN, help=DOCUMENTS_HELP)
    recipe.add_argument("--max_length", type=int, default=EXPERT_LENGTH, help="maximum length of a sequence")
    recipe.add_argument("--max_per_length", type=int, default=2000, help="maximum number of expert rows of one length")
    recipe.add_argument("--max_rows", type=int,
                        help="maximum number of expert rows (default: 30,000, or one fifth of a smaller data set)")
    stage.add_common_flags(parser)
    args = parser.parse_args(argv)
    if args.n_docs < 1:
        parser.error("--n_docs must be at least 1")
    return args


def label(row: Row, n_docs: int, gold: set[str] | None = None) -> Row:
    """Add 1-based positions of relevant and irrelevant documents among the first n_docs, by `gold` or else by the reranker's labels."""
    labels = [doc.get("rerank_label") == "true" if gold is None else doc["id"] in gold for doc in row["docs"][:n_docs]]
    true_id = [position for position, relevant in enumerate(labels, start=1) if relevant]
    false_id = [position for position, relevant in enumerate(labels, start=1) if not relevant]
    return {**row, "true_id": true_id, "false_id": false_id, "true_count": len(true_id)}


def padded_sequence(true_id: list[int], false_id: list[int], length: int, rng: random.Random) -> list[int]:
    """Return the published recipe's target: shuffled relevant documents, then random irrelevant ones up to `length`."""
    return rng.sample(true_id, len(true_id)) + rng.sample(false_id, length - len(true_id))


def lengths_of(row: Row, targets: str, max_length: int) -> list[int]:
    """Return the sequence lengths for which a labelled row has a target."""
    if targets == "expert":
        return [min(row["true_count"], max_length)]
    return list(range(row["true_count"], min(max_length, len(row["true_id"]) + len(row["false_id"])) + 1))


def choose_expert(lengths: Sequence[int], max_rows: int, max_per_length: int, rng: random.Random) -> bytearray:
    """Return 1 for each member of a random subset of the candidates within both limits, and 0 for all others."""
    per_length: Counter[int] = Counter()
    chosen, count = bytearray(len(lengths)), 0
    for candidate in stage.shuffled(len(lengths), rng):
        if count == max_rows:
            break
        if per_length[lengths[candidate]] < max_per_length:
            per_length[lengths[candidate]] += 1
            chosen[candidate] = 1
            count += 1
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output = Output(vars(args), [args.sequence_file, args.normal_file], [args.input_file])
    if output.finished:
        return

    # Label every row. The file is read twice, because only numbers of candidates are in memory.
    def labelled(reject=None):
        for row in read_rows(args.input_file, STAGE_KEYS["process_training_data"].reads, reject=reject):
            shown = row["docs"][: args.n_docs]
            unjudged = next((n for n, doc in enumerate(shown, start=1) if "rerank_label" not in doc), unjudged_position(shown, range(1, len(shown) + 1)))
            if unjudged is not None:
                raise UserError(
                    f"{args.input_file}: row {row['id']}: document {shown[unjudged - 1]['id']} has neither rerank_label nor rerank_score; run reranker.py first"
                )
            gold = needed_documents(row, args.input_file) if args.labels == "gold" else None
            if args.labels == "gold" and gold is None:
                raise UserError(f"{args.input_file}: row {row['id']}: has neither gold_docs nor positive_ctxs; add "
                                "one, or give --labels reranker")
            yield label(row, args.n_docs, gold)

    # Count, and collect the lengths of the candidates. Only this first reading records malformed rows.
    candidates, rows, unscored = array("I"), 0, 0
    for row in labelled(output.reject):
        rows += 1
        unscored += bool(row["docs"]) and row["docs"][0].get("rerank_score") is None
        candidates.extend(lengths_of(row, args.targets, args.max_length))
    if not rows:
        raise UserError(f"{args.input_file}: contains no usable row; give a file with at least one valid row")
    if unscored:
        log.warning("%s: %d of %d rows have documents without rerank_score; the order of the documents is used instead",
                    args.input_file, unscored, rows)
    # Choose the expert rows
    max_rows = args.max_rows
    if max_rows is None:
        max_rows = min(PUBLISHED_EXPERT_ROWS, max(1, rows // EXPERT_SHARE))
        if max_rows < PUBLISHED_EXPERT_ROWS:
            log.warning("%s: %d rows are fewer than the published 150,000; one fifth of them, %d, become expert rows",
                        args.input_file, rows, max_rows)
    chosen = choose_expert(candidates, max_rows, args.max_per_length, random.Random(args.seed))

    # Write expert rows and others
    def divided() -> Iterator[tuple[str, Row]]:
        choices = iter(chosen)
        for row in labelled(output.ignore):
            lengths = [length for length in lengths_of(row, args.targets, args.max_length) if next(choices)]
            for length in lengths:
                if args.targets == "expert":
                    sequence = expert_sequence(row["docs"], row["true_id"], args.max_length)
                    yield args.sequence_file, {**row, "sequence": sequence, "sequence_length": length}
                else:
                    rng = random.Random(stage.derive_seed(args.seed, row["id"], length))
                    sequence = padded_sequence(row["true_id"], row["false_id"], length, rng)
                    yield args.sequence_file, {**row, "id": f"{row['id']}/{length}", "sequence": sequence, "sequence_length": length}
            if not lengths:
                yield args.normal_file, row

    expert, normal = output.publish_each([args.sequence_file, args.normal_file], divided())
    lengths = Counter(itertools.compress(candidates, chosen))
    log.info("expert rows by length: %s", ", ".join(f"{length}: {lengths[length]}" for length in sorted(lengths)))
    output.finish(expert=expert, others=normal)


if __name__ == "__main__":
    stage.run(main)
