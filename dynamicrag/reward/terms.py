"""The reward of a trajectory (DynamicRAG, section on reward functions): a weighted mean of five terms in [0, 1].

em        exact match with a gold answer (or containment, for models that answer in sentences)
bert      semantic similarity: BERTScore F1
rouge     textual similarity: ROUGE-L F
length    1 / (1 + k) for k documents (or for an answer of k tokens)
judge     grade of an LLM, in points divided by 100
"""

import math
from collections.abc import Mapping

from dynamicrag.evaluation.metrics import exact_match, match, score_row
from dynamicrag.rows.tasks import task_of_row
from dynamicrag.stage import UserError

TERMS = ("em", "bert", "rouge", "length", "judge")
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
    if sum(weights.values()) <= 0:
        raise UserError("--weights: no term has a positive weight; give at least one")
    return weights


def combine(terms: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of the available terms: without a judge, the other weights are rescaled to sum to one."""
    used = {term: weight for term, weight in weights.items() if term in terms and weight > 0}
    total = sum(used.values())
    if total == 0:
        raise UserError("--weights: none of the weighted terms was computed; give another term a positive weight")
    return sum(weight * terms[term] for term, weight in used.items()) / total


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
