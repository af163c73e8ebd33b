"""Metrics of an answer against its gold answers, each in [0, 1], best gold answer taken.

Normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces.
"""

from __future__ import annotations

import re
import statistics
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = {ord(character): None for character in string.punctuation}


def normalise(text: str) -> str:
    """SQuAD's normalised form, of NFKC text; what consists of articles and punctuation alone keeps its lower-cased words.

    SQuAD's script leaves nothing of "the", "A" or "?" and so takes them for equal to each other and to no answer at all.
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    bare = lowered.translate(_PUNCTUATION)
    return _without_articles(bare) or " ".join(bare.split()) or lowered.strip()


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(response: str, answers: Sequence[str]) -> float:
    """1 where the normalised response equals a normalised answer."""
    given = normalise(response)
    return float(any(given == normalise(answer) for answer in answers))


def match(response: str, answers: Sequence[str]) -> float:
    """1 where a normalised answer occurs in the normalised response; an empty response is wrong.

    A response of articles alone has nothing for an answer to occur in ("he" is not in "the"); it may equal one.
    """
    given = normalise(response)
    golds = [normalise(answer) for answer in answers]
    return float(bool(given) and (given in golds or any(gold in _without_articles(given) for gold in golds)))


def accuracy(response: str, answers: Sequence[str]) -> float:
    """1 where the response begins with the label. Articles stay: "A" is a choice, not an article."""
    given = response.lower().translate(_PUNCTUATION).split()
    labels = [answer.lower().translate(_PUNCTUATION).split() for answer in answers]
    return float(any(label and given[: len(label)] == label for label in labels))


def token_f1(response: str, answers: Sequence[str]) -> float:
    """F1 over the bags of normalised tokens: 2PR / (P + R), P = common / response tokens, R = common / answer tokens."""
    given = normalise(response).split()

    def f1(answer: str) -> float:
        gold = normalise(answer).split()
        common = sum((Counter(given) & Counter(gold)).values())
        return 2 * common / (len(given) + len(gold)) if common else 0.0

    return max(map(f1, answers))


def rouge_l(response: str, answers: Sequence[str]) -> float:
    """ROUGE-L F (Lin 2004), stemmed: longest common subsequence over the whole text. Words are runs of a-z and 0-9."""
    return max(_rouge("rougeL").score(answer, response)["rougeL"].fmeasure for answer in answers)


def rouge_lsum(response: str, answers: Sequence[str]) -> float:
    """ROUGE-Lsum F: union of sentence-wise longest common subsequences, for answers of several sentences."""
    response = split_sentences(response)
    return max(_rouge("rougeLsum").score(split_sentences(answer), response)["rougeLsum"].fmeasure for answer in answers)


def str_em(response: str, short_answers: Sequence[Sequence[str]]) -> float:
    """STR-EM of ASQA (Stelmakh et al. 2022): share of the readings one of whose short answers occurs in the response."""
    return sum(match(response, answers) for answers in short_answers) / len(short_answers)


@cache
def _rouge(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_StemmingOnce())


class _StemmingOnce:
    """rouge-score's own tokens, with stemming; a word that comes again is not stemmed again, which takes most of the time."""

    def __init__(self):
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(100_000)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        return tokenize(text, self)


def split_sentences(text: str) -> str:
    """One sentence a line, as ROUGE-Lsum wants it."""
    import punkt

    return "\n".join(punkt.sent_tokenize(text))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "match": match,
    "accuracy": accuracy,
    "f1": token_f1,
    "rouge": rouge_l,
    "rouge_lsum": rouge_lsum,
}
METRIC_NAMES = (*METRICS, "str_em")


def score_row(metric: str, response: str, row: dict) -> float | None:
    """One row under one metric, or None where the row has no gold answer to compare with."""
    answers = [answer for answer in row.get("answers") or [] if answer.strip()]
    if metric == "str_em":
        pairs = row.get("qa_pairs") or [{"short_answers": [answer]} for answer in answers]
        readings = [[answer for answer in pair["short_answers"] if answer.strip()] for pair in pairs]
        readings = [reading for reading in readings if reading]
        return str_em(response, readings) if readings else None
    return METRICS[metric](response, answers) if answers else None


def bootstrap_interval(scores: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `scores` (n,)."""
    low, high, _ = _bootstrap(scores, seed, resamples)
    return low, high


def _bootstrap(values: Sequence[float], seed: int, resamples: int) -> tuple[float, float, np.ndarray]:
    """The 95 % percentile interval of the mean of `values` (n,), and the means of all resamples (resamples,)."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high), means


class Comparison(NamedTuple):
    """Mean of one system less that of another over the same questions, with its 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(scores: Sequence[float], others: Sequence[float], seed: int, resamples: int = 10_000) -> Comparison:
    """Compare two systems question by question (Efron and Tibshirani 1993; Koehn 2004), scores (n,) in the same order.

    p is twice the smaller share of resamples in which the difference is not above, or not below, zero; it is at least
    2 / (resamples + 1), since no finite number of resamples shows more.
    """
    differences = [score - other for score, other in zip(scores, others, strict=True)]
    low, high, means = _bootstrap(differences, seed, resamples)
    tail = int(min((means <= 0).sum(), (means >= 0).sum()))
    return Comparison(statistics.fmean(differences), low, high, min(1.0, 2 * (tail + 1) / (resamples + 1)))
