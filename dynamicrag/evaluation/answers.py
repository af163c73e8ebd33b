"""Score answers per question, and summarise a run: score, cost, selection, and reasons for missing answers."""

import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dynamicrag.evaluation.grounding import Support, summarise_support
from dynamicrag.evaluation.means import Mean
from dynamicrag.evaluation.metrics import bootstrap_interval, score_row
from dynamicrag.evaluation.selections import Chosen, chosen_of, summarise_chosen
from dynamicrag.rows.gold import Matches
from dynamicrag.rows.row import Row
from dynamicrag.rows.tasks import task_of_row
from dynamicrag.stage import UserError, log

MISSING = "missing from the results"
COSTS = ("calls", "prompt_tokens", "generated_tokens")
# Reasons for a missing answer, with the prefixes of the row's `error` that identify them.
REASONS = {
    "no_selection": ("no selection in",), "no_answer": ("no answer in",),
    "question_too_long": ("the question alone is longer", "a prompt of"), "refused": ("refused by the server", "the server failed"), "missing": (MISSING,),
}


class Outcome(NamedTuple):
    """The result of one question. `reason` is None if it was answered.

    `documents` is None if the question was not answered or its row gives no documents. `usage` is the cost, whether or
    not it was answered; it is empty if the row gives none, and a value is None if it is not known.
    """

    score: float  # in [0, 1]
    metric: str
    group: str
    reason: str | None
    documents: int | None
    usage: dict[str, int | None]
    chosen: Chosen | None
    support: Support | None


def score_question(row: Row, metric: str | None, group_by: str, path: str) -> Outcome | None:
    """Score a row with `metric` or its data set's metric. None without a gold answer; 0 without a `response`."""
    metric = metric or task_of_row(row).metric
    response = row.get("response")
    answered = isinstance(response, str)
    score = score_row(metric, response if answered else "", row)
    if score is None:
        return None
    return Outcome(
        score, metric, str(row.get(group_by, "")),
        None if answered else unanswered_reason(row),
        _documents_of(row) if answered else None,
        row.get("usage") or {},
        chosen_of(row, path),
        support if isinstance(support := row.get("entity_support"), Support) else None,
    )


def _documents_of(row: Row) -> int | None:
    """Return how many documents the answer was generated from; None if the row does not say."""
    chosen = row.get("id_list") if row.get("id_list") is not None else row.get("final_docs")
    return None if chosen is None else len(chosen)


def unanswered_reason(row: Row) -> str:
    """Return one of REASONS, or "other" for an unknown error and for a response that is not a string."""
    error = str(row.get("error", ""))
    return next((reason for reason, beginnings in REASONS.items() if error.startswith(beginnings)), "other")


class Tally:
    """The outcomes of any number of questions, as sums and counts; of each question, only the score is kept (8 bytes)."""

    def __init__(self):
        self.scores = array("d")
        self.metrics: set[str] = set()
        self.reasons: Counter[str] = Counter()
        self.documents: Counter[int] = Counter()  # questions by number of documents
        self.usage: dict[str, Mean] = defaultdict(Mean)
        self.chosen: Counter[Chosen] = Counter()
        self.support: Counter[Support] = Counter()

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of one question."""
        self.scores.append(outcome.score)
        self.metrics.add(outcome.metric)
        self.reasons.update(filter(None, [outcome.reason]))
        self.documents.update([] if outcome.documents is None else [outcome.documents])
        self.chosen.update(filter(None, [outcome.chosen]))
        self.support.update(filter(None, [outcome.support]))
        for key, value in outcome.usage.items():
            mean = self.usage[key]
            if value is not None:
                mean.add(value)

    def score(self, seed: int) -> dict:
        """Return the number of questions, their mean score from 0 to 100, and its interval."""
        low, high = bootstrap_interval(self.scores, seed)
        return {"n": len(self.scores), "score": 100 * statistics.fmean(self.scores), "low": 100 * low, "high": 100 * high}

    def named_metrics(self) -> str:
        return "+".join(sorted(self.metrics))

    def mean_documents(self) -> float:
        return statistics.fmean(self.documents.elements()) if self.documents else 0.0


def summarise(
    rows: Iterable[Row], metric: str | None, group_by: str, seed: int, path: str = "the results", repeated: Mapping[str, int] | None = None,
    keep_scores: bool = True,
) -> tuple[dict, dict[str, float]]:
    """Return a summary with scores from 0 to 100 and costs per question, and the score of each question in [0, 1] by id.

    Each question has one row. Rows without `response` count as wrong and have no documents. A cost is the mean over the
    questions for which it is known, answered or not; `calls_known` etc. give their number, and the mean is None if there
    are none. Rows without a gold answer are left out and counted. `repeated` counts, per file, the repeated rows that
    the caller left out; it is read after `rows`. `selection` is present if the needed documents of some row are known,
    `entity_support` if the rows have it. Errors refer to the rows' file as `path`. Without `keep_scores`, the scores by
    id are empty. Raises UserError if no row has a gold answer.
    """
    # Score every row
    every, by_group, scores = Tally(), defaultdict(Tally), {}
    without_gold_answer, first_without, grounded = 0, "", False
    matches = Matches()
    for row in rows:
        # A value of another type is a key of the data set.
        grounded |= "entity_support" in row and isinstance(row.get("entity_support"), Support | None)
        outcome = score_question(row, metric, group_by, path)
        if outcome is None:
            without_gold_answer += 1
            first_without = first_without or row["id"]
            continue
        every.add(outcome)
        by_group[outcome.group].add(outcome)
        if keep_scores:
            scores[row["id"]] = outcome.score
        if (chosen := outcome.chosen) and (chosen.retrieved is not None or chosen.chosen):
            matches.add(outcome.group, chosen.needed, chosen.right if chosen.retrieved is None else chosen.retrieved)
    if not every.scores:
        raise UserError(f"{path}: no row has a gold answer to score against; give rows with answers, or --eval_file")
    if without_gold_answer:
        log.warning("%s: %d rows have no gold answer and are not counted; the first is %s", path, without_gold_answer, first_without)
    matches.warn(path)
    if by_group.keys() == {""} and group_by != "dataset":
        log.warning("%s: no row has the key %r of --group_by, so there are no groups", path, group_by)
    # The summary
    usage, known = every.usage, every.documents.total()
    summary = {
        "metric": every.named_metrics(),
        **every.score(seed),
        "unanswered": every.reasons.total(),
        "unanswered_by_reason": {reason: every.reasons[reason] for reason in (*REASONS, "other")},
        "without_gold_answer": without_gold_answer,
        "repeated": sum((repeated or {}).values()),
        "documents": every.mean_documents(),
        "documents_known": known,
        "none_share": every.documents[0] / known if known else 0.0,
        **{key: usage[key].value() for key in (*COSTS, *(usage.keys() - set(COSTS)))},
        **{f"{key}_known": usage[key].count for key in COSTS},
        "groups": {
            group: {"metrics": members.named_metrics(), **members.score(seed), "documents": members.mean_documents()}
            for group, members in sorted(by_group.items())
        },
    }
    if every.chosen:
        summary["selection"] = summarise_chosen(every.chosen)
    if grounded:
        summary["entity_support"] = summarise_support(list(every.support.elements()))
    return summary, scores
