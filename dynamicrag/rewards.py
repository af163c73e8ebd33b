"""The reward of a trajectory (DynamicRAG, section on reward functions): five terms in [0, 1], combined by weights.

em        exact match with a gold answer (or containment, for models that answer in sentences)
bert      semantic similarity: BERTScore F1
rouge     textual similarity: ROUGE-L F
length    1 / (1 + k) for k documents
judge     an LLM's grade out of 100, divided by 100
"""

import math
from collections.abc import Mapping, Sequence

from dynamicrag.metrics import exact_match, match, score_row
from dynamicrag.stage import UserError
from dynamicrag.tasks import task_of

UNLIMITED = 1_000_000
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
    metric = task_of(row.get("dataset")).metric
    if metric == "accuracy" or (metric == "str_em" and row.get("qa_pairs")):
        score = score_row(metric, response, row)
        if score is not None:
            return score
    return ANSWER_MATCHES[answer_match](response, [answer for answer in row["answers"] if answer.strip()])


def length_term(k: int) -> float:
    """1 for no document, 1/2 for one, 1/3 for two, ..."""
    return 1 / (1 + k)


class BertScore:
    """BERTScore F1 (Zhang et al. 2020) with one encoder, loaded once, over unique pairs in batches."""

    def __init__(self, model: str, layer: int | None, device: str, batch_size: int = 64):
        """`model` is an encoder folder or a name bert-score knows. Raises UserError where it cannot be loaded."""
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model)
            layer = layer or model2layers.get(model) or config.num_hidden_layers
            self._scorer = BERTScorer(model_type=model, num_layers=layer, lang="en", device=device, batch_size=batch_size)
        except (OSError, ValueError, AssertionError) as error:
            raise UserError(f"--bert_model {model}: no encoder could be loaded: {error}") from error
        tokenizer = self._scorer._tokenizer
        if tokenizer.model_max_length > UNLIMITED:  # not in its files; RoBERTa does not use two of its positions
            tokenizer.model_max_length = config.max_position_embeddings - 2

    def score(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """F1 of each (response, gold answers), best gold answer, clipped to [0, 1]; an empty response scores 0."""
        unique = sorted({(response, gold) for response, golds in pairs for gold in golds if response.strip() and gold.strip()})
        scores: dict[tuple[str, str], float] = {}
        if unique:
            _, _, f1 = self._scorer.score([response for response, _ in unique], [gold for _, gold in unique])
            scores = {pair: min(max(value, 0.0), 1.0) for pair, value in zip(unique, f1.tolist(), strict=True)}
        return [max((scores.get((response, gold), 0.0) for gold in golds), default=0.0) for response, golds in pairs]
