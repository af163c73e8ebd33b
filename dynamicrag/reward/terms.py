"""The reward of a trajectory: a weighted mean of terms in [0, 1]. The first five are those of DynamicRAG.

em          exact match with a gold answer (or containment, for models that answer in sentences)
bert        semantic similarity: BERTScore F1
rouge       textual similarity: ROUGE-L F
length      1 / (1 + k) for k documents (or for an answer of k tokens)
judge       grade of an LLM, in points divided by 100
score       the metric of the row's data set, as evaluate.py computes it
gain        the score minus that of the answer from a fixed list (baseline_response), from -1 to 1, moved into [0, 1]
likelihood  probability per token of the gold answer under the frozen generator (geometric mean over its tokens)

One more is no part of the mean, but a weight of the whole question:

boundary    1 if BOUNDARY of a question's trajectories are right, falling to 0 if all or none are
"""

import math
import statistics
from collections.abc import Mapping

from dynamicrag.evaluation.metrics import exact_match, match, score_row
from dynamicrag.rows.tasks import task_of_row
from dynamicrag.stage import UserError

TERMS = ("em", "bert", "rouge", "length", "judge", "score", "gain", "likelihood", "boundary")
READS = {"gain": ("baseline_response",), "likelihood": ("docs",)}  # keys of a row that only these terms need
BOUNDARY = 0.6  # share of right answers at which a question teaches most (BAR-RAG, arXiv 2602.03689)
ANSWER_MATCHES = {"exact": exact_match, "contains": match}


def parse_weights(text: str) -> dict[str, float]:
    """Parse weights such as `em=0.2,bert=0.2`. Terms that are left out have no weight. Raises UserError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        term, _equals, value = map(str.strip, part.partition("="))
        try:
            weight = float(value)
        except ValueError as error:
            raise UserError(f"--weights: {part!r}: expected TERM=NUMBER") from error
        if term not in TERMS or term in weights or not 0 <= weight < math.inf:
            raise UserError(f"--weights: {part!r}: expected one of {', '.join(TERMS)}, each once, with a finite "
                            "weight of at least 0")
        weights[term] = weight
    if sum(weight for term, weight in weights.items() if term != "boundary") <= 0:
        raise UserError("--weights: no term has a positive weight; give at least one besides boundary")
    return weights


def combine(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of the available terms: without a judge, the other weights are rescaled to sum to one.

    With a weight w of boundary, the mean is multiplied by (1 + w * boundary) / (1 + w).
    """
    used = {term: weight for term, weight in weights.items() if term in terms and weight > 0}
    of_question = used.pop("boundary", 0.0)
    total = sum(used.values())
    if total == 0:
        raise UserError("--weights: none of the weighted terms was computed; give another term a positive weight")
    mean = sum(weight * terms[term] for term, weight in used.items()) / total
    return mean * (1 + of_question * terms["boundary"]) / (1 + of_question) if of_question else mean


def correctness(response: str, row: Mapping, answer_match: str) -> float:
    """Return the em term: correctness by the rule of the row's data set.

    Labels are compared as labels, and the readings of ASQA are averaged, because neither can equal a whole answer.
    """
    metric = task_of_row(row).metric
    if metric == "accuracy" or (metric == "str_em" and row.get("qa_pairs")):
        score = score_row(metric, response, row)
        if score is not None:
            return score
    return ANSWER_MATCHES[answer_match](response, [answer for answer in row["answers"] if answer.strip()])


def length_term(k: int) -> float:
    """Return 1 for no document (or token), 1/2 for one, 1/3 for two, ..."""
    return 1 / (1 + k)


def score_of(response: str, row: Mapping, metric: str | None = None) -> float:
    """Return the score term: that of evaluate.py, by `metric` or else by the metric of the row's data set."""
    return score_row(metric or task_of_row(row).metric, response, row) or 0.0


def gain_term(score: float, baseline: float) -> float:
    """Return 1/2 for a score equal to that of the fixed list, 1 for the largest gain and 0 for the largest loss."""
    return 0.5 + (score - baseline) / 2


def boundary_term(right: float) -> float:
    """Return 1 if `right`, the share of right trajectories, is BOUNDARY. The value falls with the distance, to 0 if all or none are right."""
    return right / BOUNDARY if right <= BOUNDARY else (1 - right) / (1 - BOUNDARY)


def with_scores(row: Mapping, terms: list[dict[str, float]], weights: Mapping[str, float], metric: str | None = None) -> list[dict[str, float]]:
    """Return the terms of a row's trajectories with those terms added that compare them, if they have a weight."""
    asked = {term for term, weight in weights.items() if weight > 0}
    scores = [score_of(response, row, metric) for response in row["responses"]] if asked & {"score", "gain"} else []
    added: dict[str, list[float]] = {"score": scores} if "score" in asked else {}
    if "gain" in asked:
        baseline = score_of(row["baseline_response"], row, metric)
        added["gain"] = [gain_term(score, baseline) for score in scores]
    if "boundary" in asked and terms:
        added["boundary"] = [boundary_term(statistics.fmean(term["em"] for term in terms))] * len(terms)
    return [{**term, **{name: values[trajectory] for name, values in added.items()}} for trajectory, term in enumerate(terms)]
