"""The reward of a trajectory (DynamicRAG, section on reward functions): five terms in [0, 1], combined by weights.

em        exact match with a gold answer (or containment, for models that answer in sentences)
bert      semantic similarity: BERTScore F1
rouge     textual similarity: ROUGE-L F
length    1 / (1 + k) for k documents (or for an answer of k tokens)
judge     an LLM's grade out of 100, divided by 100
"""

import math
from collections.abc import Mapping

from dynamicrag.evaluation.metrics import exact_match, match, score_row
from dynamicrag.rows.tasks import task_of_row
from dynamicrag.stage import UserError

TERMS = ("em", "bert", "rouge", "length", "judge")
ANSWER_MATCHES = {"exact": exact_match, "contains": match}


def parse_weights(text: str) -> dict[str, float]:
    """Weights from `em=.2,bert=.2,...`; a term left out weighs nothing. Raises UserError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        term, _equals, value = map(str.strip, part.partition("="))
        try:
            weight = float(value)
        except ValueError as error:
            raise UserError(f"--weights: {part!r} is not TERM=NUMBER") from error
        if term not in TERMS or term in weights or not 0 <= weight < math.inf:
            raise UserError(f"--weights: {part!r}: terms are {', '.join(TERMS)}, each once; weights are finite and not negative")
        weights[term] = weight
    if sum(weights.values()) <= 0:
        raise UserError("--weights: at least one term needs a positive weight")
    return weights


def combine(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean of the terms there are: without a judge the other weights are rescaled to sum to one."""
    used = {term: weight for term, weight in weights.items() if term in terms and weight > 0}
    total = sum(used.values())
    if total == 0:
        raise UserError("--weights: none of the weighted terms was computed; give another term a positive weight")
    return sum(weight * terms[term] for term, weight in used.items()) / total


def correctness(response: str, row: Mapping, answer_match: str) -> float:
    """The em term: the data set's own notion of a right answer.

    Labels are compared as labels, and ASQA's readings are averaged: neither can equal a whole answer.
    """
    metric = task_of_row(row).metric
    if metric == "accuracy" or (metric == "str_em" and row.get("qa_pairs")):
        score = score_row(metric, response, row)
        if score is not None:
            return score
    return ANSWER_MATCHES[answer_match](response, [answer for answer in row["answers"] if answer.strip()])


def length_term(k: int) -> float:
    """1 for no document (or token), 1/2 for one, 1/3 for two, ..."""
    return 1 / (1 + k)
