"""Gate 0: is there anything to learn? Answer dev questions from every small set of documents, with two wordings of the prompt.

An effect of the documents must be in the answers to both wordings; everything else is an accident of one prompt. Two
figures decide. The first is the share of the variance of token F1 within a question that repeats: the covariance of the
sets' effects under both wordings, divided by their mean variance. The second is the headroom: the F1 of the best set,
minus the F1 of the best fixed number of documents. The best set is chosen under one wording and scored under the other;
it differs from the fixed number only if it is better. If the headroom is under --min_headroom points or the share is
under --min_share, no training can find the right set, and the verdict is "stop".

Reads    INPUT_FILE                  lists of the dev questions
         STORE, SECOND_STORE         answers of the generator with the two wordings; missing ones are generated
Writes   OUTPUT_FILE                 figures, and the verdict "go" or "stop"
         standard output             the table

    .venv/bin/python experiments/openqa/gate.py --input_file runs/openqa/lists/dev.jsonl --generator runs/openqa/generator/model/sft \\
        --store runs/openqa/answers/1.jsonl --second_store runs/openqa/answers/2.jsonl \\
        --second_prompts experiments/openqa/wording_2.yaml --output_file runs/openqa/gate.json
"""

import argparse
import itertools
from collections.abc import Sequence

import numpy as np
import orjson
from splits import Pool, apportion
from store import AnswerStore, Set, add_store_flags, open_store

from dynamicrag import stage
from dynamicrag.evaluation.metrics import score_row
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.rows.records import read_rows
from dynamicrag.rows.row import Row
from dynamicrag.stage import UserError, derive_seed, log

RESAMPLES = 1000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("--input_file", required=True, help="lists of the dev questions")
    parser.add_argument("--output_file", required=True, help="figures and verdict")
    parser.add_argument("--questions", type=int, default=100, help="number of questions, in the data sets' proportions")
    add_store_flags(parser)
    group = parser.add_argument_group("second wording")
    group.add_argument("--second_store", required=True, help="file of its answers")
    group.add_argument("--second_prompts", required=True, help="YAML file of its prompts")
    group = parser.add_argument_group("verdict")
    group.add_argument("--min_headroom", type=float, default=3.0, help="points of token F1 that the best set must have over the best fixed number")
    group.add_argument("--min_share", type=float, default=1 / 3, help="share of the variance that must repeat")
    stage.add_seed_flag(parser)
    return parser.parse_args(argv)


def sets_of(n_docs: int) -> list[Set]:
    """Return the sets of a list of n documents: none, singles, pairs, triples of the first four, and the first 5, 6, ..."""
    positions = range(1, n_docs + 1)
    small = [chosen for k in (0, 1, 2) for chosen in itertools.combinations(positions, k)]
    triples = list(itertools.combinations(positions[:4], 3))
    return [*small, *triples, *(tuple(positions[:k]) for k in range(4, n_docs + 1))]


def effects(scores: np.ndarray) -> np.ndarray:
    """Return the scores [questions, sets] without the mean of each question."""
    return scores - scores.mean(axis=1, keepdims=True)


def repeated_share(first: np.ndarray, second: np.ndarray) -> float:
    """Return the covariance of the effects under both wordings divided by their mean variance; 0 without variance."""
    one, two = effects(first), effects(second)
    variance = (np.square(one).mean() + np.square(two).mean()) / 2
    return float((one * two).mean() / variance) if variance else 0.0


def best_sets(chosen_by: np.ndarray, fixed: int) -> np.ndarray:
    """Return, per question, the set with the highest score; column `fixed` if it has that score, otherwise the smallest set."""
    best = chosen_by.argmax(axis=1)  # the first of equal sets, which is the smallest
    return np.where(chosen_by[:, fixed] >= chosen_by.max(axis=1), fixed, best)


def headroom(first: np.ndarray, second: np.ndarray, prefixes: Sequence[int]) -> np.ndarray:
    """Return, per question, the score of the best set minus that of the best prefix of the list, as the mean of both directions.

    `prefixes` are the columns of the first 0, 1, 2, ... documents. The best one is that of both wordings together.
    """
    gains = []
    fixed = max(prefixes, key=lambda column: first[:, column].mean() + second[:, column].mean())
    for chosen_by, scored in ((first, second), (second, first)):
        chosen = best_sets(chosen_by, fixed)
        gains.append(scored[np.arange(len(scored)), chosen] - scored[:, fixed])
    return np.mean(gains, axis=0)


def interval(value, count: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of value(numbers of the questions) over resampled questions."""
    rng = np.random.default_rng(seed)
    low, high = np.quantile([value(rng.integers(0, count, count)) for _ in range(RESAMPLES)], (0.025, 0.975))
    return float(low), float(high)


def judge(scores: Sequence[np.ndarray], sets: Sequence[Set], args: argparse.Namespace) -> dict:
    """Return the figures and the verdict, from the scores [questions, sets] in [0, 1] of the two wordings."""
    first, second = scores
    prefixes = [number for number, chosen in enumerate(sets) if chosen == tuple(range(1, len(chosen) + 1))]
    small = [number for number, chosen in enumerate(sets) if len(chosen) <= 2]
    shown = [number for number, chosen in enumerate(sets) if chosen]
    share, room = repeated_share(first, second), 100 * headroom(first, second, prefixes)
    reasons = []
    if room.mean() < args.min_headroom:
        reasons.append(f"the best set has {room.mean():.1f} points of F1 over the best fixed number, fewer than {args.min_headroom:g}")
    if share < args.min_share:
        reasons.append(f"{share:.2f} of the variance within a question repeats, less than {args.min_share:.2f}")
    hindsight = [100 * (of_wording.max(axis=1).mean() - max(of_wording[:, column].mean() for column in prefixes)) for of_wording in scores]
    return {
        "questions": len(first), "sets": len(sets),
        "repeated share": share,
        "repeated share interval": interval(lambda numbers: repeated_share(first[numbers], second[numbers]), len(first), args.seed),
        "repeated share without none": repeated_share(first[:, shown], second[:, shown]),
        "headroom": float(room.mean()),
        "headroom interval": interval(lambda numbers: room[numbers].mean(), len(room), args.seed),
        "headroom in hindsight": float(np.mean(hindsight)),
        "best of up to two": [100 * float(of_wording[:, small].max(axis=1).mean()) for of_wording in scores],
        "questions with any effect": float(np.mean([(np.ptp(of_wording, axis=1) > 0).mean() for of_wording in scores])),
        "by number": {str(len(sets[column])): [100 * float(of_wording[:, column].mean()) for of_wording in scores] for column in prefixes},
        "verdict": "stop" if reasons else "go", "reasons": reasons,
    }


def table(figures: dict) -> str:
    """Return the figures as Markdown tables."""
    numbers = figures["by number"]
    fixed = markdown_table(["token F1 from the first documents", *numbers],
                           [[f"wording {place + 1}", *(f"{scores[place]:.1f}" for scores in numbers.values())] for place in (0, 1)])
    low, high = figures["repeated share interval"]
    low_room, high_room = figures["headroom interval"]
    return fixed + "\n\n" + markdown_table(["figure", "value"], [
        ["questions, sets per question", f"{figures['questions']}, {figures['sets']}"],
        ["questions in which the set matters", f"{figures['questions with any effect']:.2f}"],
        ["share of the variance within a question that repeats", f"{figures['repeated share']:.2f} ({low:.2f} to {high:.2f})"],
        ["the same without the empty set", f"{figures['repeated share without none']:.2f}"],
        ["best set minus best fixed number, F1", f"{figures['headroom']:.1f} ({low_room:.1f} to {high_room:.1f})"],
        ["the same in hindsight, under one wording", f"{figures['headroom in hindsight']:.1f}"],
        ["best set of at most two documents in hindsight, F1", " and ".join(f"{value:.1f}" for value in figures["best of up to two"])],
        ["verdict", figures["verdict"]],
    ])


def sample(rows: list[Row], count: int, path: str, seed: int) -> list[Row]:
    """Return `count` of the rows, in the proportions of their data sets; all rows if there are no more."""
    pool = Pool(rows, path, derive_seed(seed, "gate"))
    return pool.take(apportion(min(count, len(rows)), pool.counts()), "questions")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    every = list(read_rows(args.input_file, ("docs", "answers")))
    n_docs = max((len(row["docs"]) for row in every), default=0)
    rows = sample([row for row in every if len(row["docs"]) == n_docs], args.questions, args.input_file, args.seed)
    if not rows:
        raise UserError(f"{args.input_file}: contains no row with documents; make it with experiments/openqa.sh")
    sets = sets_of(n_docs)
    pairs = [(row, chosen) for row in rows for chosen in sets]
    scores = []
    for store in (open_store(args), AnswerStore(args.second_store, args.generator, args.template, args.second_prompts, args.max_model_len)):
        answers = store.answers(pairs)
        f1 = [score_row("f1", answer.response, row) or 0.0 for answer, (row, _) in zip(answers, pairs, strict=True)]
        scores.append(np.array(f1).reshape(len(rows), len(sets)))
        store.close()
    figures = judge(scores, sets, args)
    print(table(figures))
    for reason in figures["reasons"]:
        log.warning("gate 0: %s", reason)
    with atomic_writer(args.output_file) as file:
        file.write(orjson.dumps(figures, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    stage.run(main)
