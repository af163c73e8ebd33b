"""Compare two systems over seeds and questions that are both samples: crossed random effects, groups of equal weight, and Holm's
correction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

LEVEL = 0.95


class Crossed(NamedTuple):
    """A mean difference with its 95 % interval and two-sided p, for new questions and models of new seeds.

    With one seed, the variance between seeds cannot be estimated: `seed_variance` and `question_variance` are None,
    `rest_variance` is the variance between questions, and interval and p describe new questions for this one model.
    """

    mean: float
    low: float
    high: float
    p: float
    seed_variance: float | None
    question_variance: float | None
    rest_variance: float
    df: float


def crossed(differences: np.ndarray) -> Crossed:
    """Return the mean of `differences` [seeds, questions] with its interval from a crossed random-effects model.

    Each cell is the sum of a mean, an effect of its seed, an effect of its question and a rest. Variance components are
    ANOVA moments (Searle, Casella and McCulloch 1992); a negative one counts as 0. The variance of the mean is
    seed / S + question / Q + rest / (S Q), and its degrees of freedom are Satterthwaite's (1946). Raises ValueError if
    there are fewer than two questions, or no seed.
    """
    cells = np.asarray(differences, dtype=np.float64)
    if cells.ndim != 2 or cells.shape[0] < 1 or cells.shape[1] < 2:
        raise ValueError(f"expected [seeds, questions] with at least two questions, found the shape {cells.shape}")
    seeds, questions = cells.shape
    mean = float(cells.mean())
    if seeds == 1:
        between = float(cells.var(ddof=1))
        return _interval(mean, None, None, between, between / questions, questions - 1)

    by_seed, by_question = cells.mean(axis=1), cells.mean(axis=0)
    rest = cells - by_seed[:, None] - by_question[None, :] + mean
    degrees = {"seed": seeds - 1, "question": questions - 1, "rest": (seeds - 1) * (questions - 1)}
    squares = {
        "seed": questions * float(by_seed.var(ddof=1)),
        "question": seeds * float(by_question.var(ddof=1)),
        "rest": float((rest**2).sum()) / degrees["rest"],
    }
    seed_variance = max(0.0, (squares["seed"] - squares["rest"]) / questions)
    question_variance = max(0.0, (squares["question"] - squares["rest"]) / seeds)
    # The variance of the mean, as a sum of mean squares: a component that counts as 0 leaves the sum.
    weights = {"seed": float(seed_variance > 0), "question": float(question_variance > 0)}
    weights["rest"] = 1 - weights["seed"] - weights["question"]
    variance = sum(weights[name] * squares[name] for name in squares) / cells.size
    uncertainty = sum((weights[name] * squares[name] / cells.size) ** 2 / degrees[name] for name in squares)
    df = variance**2 / uncertainty if uncertainty else float(degrees["rest"])
    return _interval(mean, seed_variance, question_variance, squares["rest"], variance, df)


def _interval(
    mean: float, seed_variance: float | None, question_variance: float | None, rest_variance: float, variance: float, df: float,
) -> Crossed:
    """Return the result for a mean of this variance; without variance, the interval is the mean itself."""
    error = max(variance, 0.0) ** 0.5
    half = float(student_t.ppf((1 + LEVEL) / 2, df)) * error
    if error:
        p = 2 * float(student_t.sf(abs(mean) / error, df))
    else:
        p = 0.0 if mean else 1.0
    return Crossed(mean, mean - half, mean + half, p, seed_variance, question_variance, rest_variance, float(df))


def balanced(differences: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return cells for `crossed` that give the mean over groups of equal weight; `groups` names each question's group.

    The variance between questions is that within groups, because the groups are not a sample. Therefore an effect of a
    seed on one group is part of the seed's effect.
    """
    cells, names = np.asarray(differences, dtype=np.float64), np.asarray(groups)
    within, means = np.zeros_like(cells), []
    for group in sorted(set(groups)):
        members = names == group
        means.append(cells[:, members].mean(axis=1, keepdims=True))
        count = int(members.sum())
        lost = (count / (count - 1)) ** 0.5 if count > 1 else 1.0  # one degree of freedom per group
        within[:, members] = (cells[:, members] - means[-1]) * lost * len(names) / count
    return within / len(means) + np.mean(means, axis=0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values corrected for their number (Holm 1979), in the given order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
