"""Preferences among the trajectories of a question: pairs of selections and pairs of answers (DynamicRAG, DPO)."""

import itertools
import random
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from dynamicrag.rows.row import Row
from dynamicrag.rows.seen import Seen
from dynamicrag.rows.tasks import target_answer, task_of_row

PAIRS = re.compile(r"best-worst|all|top-bottom:([1-9]\d*)")


class Pair(NamedTuple):
    """Two trajectories of a row by 0-based position. The chosen one has the higher reward."""

    chosen: int
    rejected: int
    margin: float


def reranker_pairs(row: Row, which: str, min_margin: float, most: int | None = None, by: str = "order") -> list[Pair]:
    """Return the reranker pairs of a row, widest margin first. Equal selections count once; equal rewards form no pair.

    With `by` set, selections of the same documents in another order are equal too. The first such trajectory is used.
    """
    scores = row["response_scores"]
    key = frozenset if by == "set" else tuple
    distinct = {key(ids): trajectory for trajectory, ids in reversed(list(enumerate(row["id_lists"])))}.values()
    ranked = sorted(distinct, key=lambda trajectory: (-scores[trajectory], trajectory))
    if which == "all":
        candidates = itertools.combinations(ranked, 2)
    else:
        m = int(which.partition(":")[2] or 1)  # of top-bottom:M
        worst_first = sorted(distinct, key=lambda trajectory: (scores[trajectory], trajectory))
        candidates = itertools.product(ranked[:m], worst_first[:m])
    pairs = [Pair(better, worse, scores[better] - scores[worse]) for better, worse in candidates]
    pairs = [pair for pair in pairs if pair.margin > min_margin]
    return sorted(pairs, key=lambda pair: -pair.margin)[:most]


def generator_pair(row: Row, chosen_from: str, reject_first: bool = False) -> tuple[int, str, str] | None:
    """Return (trajectory whose documents are shown, chosen answer, rejected answer); None if no response is wrong.

    The documents are those of the best trajectory. The chosen answer is its answer (`chosen_from` best) or the gold
    answer. The rejected one is the wrong response with the lowest reward, or the first one (`reject_first`).
    """
    scores, responses = row["response_scores"], row["responses"]
    wrong = [t for t, terms in enumerate(row["score_terms"]) if terms["em"] < 1 and responses[t].strip()]
    if not wrong:
        return None
    best = max(range(len(scores)), key=lambda t: (scores[t], -t))
    worst = wrong[0] if reject_first else min(wrong, key=lambda t: (scores[t], t))
    chosen = target_answer(row) if chosen_from == "gold" else responses[best]
    if chosen.strip() == responses[worst].strip() or not chosen.strip():
        return None
    if chosen_from == "best" and scores[best] == scores[worst]:
        return None
    return best, chosen, responses[worst]


def worth_learning_from(row: Row, keep_mean: tuple[float, float]) -> bool:
    """Return whether the mean correctness of the row's trajectories is in the interval `keep_mean`.

    If the data set is scored by ROUGE, no answer is right or wrong, and every row is kept.
    """
    if not row["score_terms"] or task_of_row(row).metric == "rouge":
        return bool(row["score_terms"])
    low, high = keep_mean
    return low <= statistics.fmean(terms["em"] for terms in row["score_terms"]) <= high


def capped(items: Iterable, most: int | None, seed: int) -> Iterator:
    """Yield a random sample of at most `most` items, in their own order.

    Reservoir sampling: only the sample is in memory.
    """
    if most is None:
        yield from items
        return
    rng, sample = random.Random(seed), []
    for number, item in enumerate(items):
        place = number if number < most else rng.randrange(number + 1)
        if place < most:
            sample[place : place + 1] = [(number, item)]
    yield from (item for _, item in sorted(sample, key=lambda numbered: numbered[0]))


def distinct(pairs: Iterable[tuple[dict[str, str], Mapping]]) -> Iterator[tuple[dict[str, str], Mapping]]:
    """Yield the first of equal or contradictory pairs, because a data set may contain a question twice."""
    seen = Seen()
    for row, about in pairs:
        if seen.add("\x1f".join([row["instruction"], *sorted([row["chosen"], row["rejected"]])])) is None:
            yield row, about
