"""Metrics of a response against its gold answers, each in [0, 1]; the best gold answer counts.

Normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles, single spaces. In every
metric, typographic quotes and dashes are equal to their ASCII forms.
"""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from dynamicrag.rows.choices import Choice, chosen_label, gold_label, shown_choices
from dynamicrag.rows.tasks import CHOICE, known_task, readings_of
from dynamicrag.rows.text import composed

if TYPE_CHECKING:
    import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = {ord(character): None for character in string.punctuation}
# FEVER's third label, in the spellings of its own and other files.
_NOT_ENOUGH = re.compile(r"\W*(?:nei|not[\s_-]*enough[\s_-]*info(?:rmation)?)(?![^\W_])", re.IGNORECASE)
# Scripts without spaces are compared by character (with its marks), all others by word.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_ANY_WORD = rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{N}}\p{{M}}])+"


def normalise(text: str) -> str:
    """Return SQuAD's normalised form of a text.

    If only articles and punctuation would be removed, words are kept in lower case. SQuAD's script reduces "the", "A"
    and "?" to nothing, so that they equal each other.
    """
    lowered = composed(text).lower()
    bare = lowered.translate(_PUNCTUATION)
    return _without_articles(bare) or " ".join(bare.split()) or lowered.strip()


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(response: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalised response equals a normalised answer."""
    given = normalise(response)
    return float(any(given == normalise(answer) for answer in answers))


def match(response: str, answers: Sequence[str]) -> float:
    """Return 1 if a normalised answer occurs in the normalised response. An empty response is wrong.

    In a response that consists of articles only, an answer must match completely ("he" is not in "the").
    """
    given = normalise(response)
    golds = [normalise(answer) for answer in answers]
    return float(bool(given) and (given in golds or any(gold in _without_articles(given) for gold in golds)))


def accuracy(response: str, answers: Sequence[str], choices: Sequence[Choice] = ()) -> float:
    """Return 1 if the response names the right label: the choice it names (choices.chosen_label), or the label at its start."""
    return float(any(_names_label(response, answer, choices) for answer in answers))


def _names_label(response: str, answer: str, choices: Sequence[Choice]) -> bool:
    if label := gold_label(answer, choices):
        return chosen_label(response, label, choices) == label
    if _NOT_ENOUGH.fullmatch(answer.strip().rstrip(string.punctuation)):
        return _NOT_ENOUGH.match(response) is not None
    given, label = (composed(text).lower().translate(_PUNCTUATION).split() for text in (response, answer))
    return bool(label) and given[: len(label)] == label


def token_f1(response: str, answers: Sequence[str], whole_answers: Sequence[str] = ()) -> float:
    """Return F1 over bags of normalised tokens: 2PR / (P + R), P = common / response tokens, R = common / answer tokens.

    If one side is one of `whole_answers` (HotpotQA: yes, no, noanswer), F1 is 0 unless both sides are equal.
    """
    given = normalise(response).split()

    def f1(answer: str) -> float:
        gold = normalise(answer).split()
        if given != gold and any(" ".join(side) in whole_answers for side in (given, gold)):
            return 0.0
        common = sum((Counter(given) & Counter(gold)).values())
        return 2 * common / (len(given) + len(gold)) if common else 0.0

    return max(map(f1, answers))


def rouge_l(response: str, answers: Sequence[str]) -> float:
    """Return ROUGE-L F (Lin 2004): longest common subsequence over the whole text.

    Words are those of rouge-score: stemmed sequences of a-z and 0-9. If the answer has other letters, words are
    sequences of any letters, digits and marks, with a-z stemmed too. In scripts without spaces (Chinese, Japanese,
    Thai, ...), each character is a word.
    """
    return max(_scorer("rougeL", answer).score(answer, response)["rougeL"].fmeasure for answer in answers)


def rouge_lsum(response: str, answers: Sequence[str]) -> float:
    """Return ROUGE-Lsum F: union of longest common subsequences by sentence, for long answers; words as in rouge_l."""
    response = split_sentences(response)
    scores = []
    for answer in map(split_sentences, answers):
        scores.append(_scorer("rougeLsum", answer).score(answer, response)["rougeLsum"].fmeasure)
    return max(scores)


def str_em(response: str, short_answers: Sequence[Sequence[str]]) -> float:
    """Return ASQA's STR-EM (Stelmakh et al. 2022): the share of readings with a short answer that occurs in the response."""
    return sum(match(response, answers) for answers in short_answers) / len(short_answers)


def _scorer(kind: str, answer: str):
    """Return rouge-score's scorer; with words of any script if the answer has letters that rouge-score drops."""
    return _rouge(kind, not answer.isascii() and any(character.isalpha() and not character.isascii() for character in answer))


@cache
def _rouge(kind: str, any_script: bool):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_StemmingOnce(any_script))


class _StemmingOnce:
    """The tokens of rouge-score with cached stemming, which otherwise takes most of the time.

    With `any_script`, words are matches of _ANY_WORD in the composed text; ASCII words are stemmed like in rouge-score.
    """

    def __init__(self, any_script: bool):
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(100_000)(PorterStemmer().stem)
        self.any_script = any_script

    def tokenize(self, text: str) -> list[str]:
        import regex
        from rouge_score.tokenize import tokenize

        if not self.any_script:
            return tokenize(text, self)
        words = regex.findall(_ANY_WORD, composed(text).lower())
        return [self.stem(word) if word.isascii() and len(word) > 3 else word for word in words]


def split_sentences(text: str) -> str:
    """Return the text with one sentence per line, as ROUGE-Lsum requires."""
    import punkt

    sentences = "\n".join(punkt.sent_tokenize(text))
    # The English tokenizer does not know these marks.
    return re.sub(r"(?<=[。！？।])[^\S\n]*(?=[^\s。！？।])", "\n", sentences)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "match": match,
    "accuracy": accuracy,
    "f1": token_f1,
    "rouge": rouge_l,
    "rouge_lsum": rouge_lsum,
}
METRIC_NAMES = (*METRICS, "str_em")


def score_row(metric: str, response: str, row: Mapping) -> float | None:
    """Score one row with one metric; None if the row has no gold answer."""
    answers = [answer for answer in row.get("answers") or [] if answer.strip()]
    if metric == "str_em":
        readings = readings_of(row) or [[answer] for answer in answers]
        return str_em(response, readings) if readings else None
    if not answers:
        return None
    task = known_task(row.get("dataset"))
    if metric == "accuracy" and (row.get("choices") or (task and task.instruction == CHOICE)):
        return accuracy(response, answers, shown_choices(row))
    if metric == "f1" and task:
        return token_f1(response, answers, task.whole_answers)
    return METRICS[metric](response, answers)


def bootstrap_interval(scores: Sequence[float], seed: int, resamples: int = 1000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `scores`, [n]."""
    low, high, _ = _bootstrap(scores, seed, resamples)
    return low, high


def _bootstrap(values: Sequence[float], seed: int, resamples: int) -> tuple[float, float, np.ndarray]:
    """Return the 95 % percentile interval of the mean of `values` [n], and the means of all resamples [resamples]."""
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.array([sample[generator.integers(0, len(sample), len(sample))].mean() for _ in range(resamples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high), means


class Comparison(NamedTuple):
    """The mean of one system minus that of another on the same questions, with 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(scores: Sequence[float], others: Sequence[float], seed: int, resamples: int = 10_000) -> Comparison:
    """Compare two systems by question (Efron and Tibshirani 1993; Koehn 2004). Both scores are [n], in the same order.

    p is twice the smaller of two shares: the resamples with a difference of at most 0, and of at least 0. It is at
    least 2 / (resamples + 1), because a finite number of resamples cannot show more.
    """
    differences = [score - other for score, other in zip(scores, others, strict=True)]
    low, high, means = _bootstrap(differences, seed, resamples)
    tail = int(min((means <= 0).sum(), (means >= 0).sum()))
    return Comparison(statistics.fmean(differences), low, high, min(1.0, 2 * (tail + 1) / (resamples + 1)))
