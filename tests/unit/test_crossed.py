"""Intervals over seeds and questions: figures of the evidence run, models that were simulated, and Holm's correction."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from dynamicrag.evaluation.crossed import balanced, crossed, holm

EVIDENCE = Path(__file__).resolve().parents[2] / "docs/evidence"


def scores(model: str, selector: str, shown: str = "retrieved") -> np.ndarray:
    seeds = [json.loads((EVIDENCE / f"seed_{seed}.json").read_text()) for seed in (1, 2, 3)]
    key = (model, selector, shown)
    return 100 * np.array([one["scores"] for seed in seeds for one in seed["systems"] if (one["model"], one["selector"], one["shown"]) == key])


@pytest.mark.parametrize(("one", "other", "expected"), [
    (("dpo", "dynamic"), ("dpo", "top3"), (1.25, -0.17, 2.67)),
    (("dpo", "dynamic"), ("dpo", "all"), (1.37, -0.22, 2.96)),
    (("dpo", "dynamic"), ("dpo", "top2"), (1.57, 0.26, 2.88)),
    (("dpo", "dynamic"), ("dpo", "monot5"), (2.01, 0.55, 3.47)),
    (("dpo", "dynamic"), ("sft", "dynamic"), (1.99, 0.71, 3.26)),
])
def test_the_evidence_run_has_the_figures_that_were_computed_from_it_apart(one, other, expected):
    """Computed once with another program, which took the normal quantile instead of Student's: the same without seed variance."""
    found = crossed(scores(*one) - scores(*other))
    half = 1.96 * (found.seed_variance / 3 + found.question_variance / 500 + found.rest_variance / 1500) ** 0.5
    assert (found.mean, found.mean - half, found.mean + half) == pytest.approx(expected, abs=0.01)
    assert (found.low, found.high) == pytest.approx(expected[1:], abs=0.01) if not found.seed_variance else found.high - found.low > 3 * half


def test_seed_variance_of_three_seeds_leaves_few_degrees_of_freedom():
    found = crossed(scores("dpo", "dynamic") - scores("sft", "dynamic"))
    assert found.seed_variance == pytest.approx(0.043, abs=0.001) and found.df == pytest.approx(2.29, abs=0.01)
    assert (found.low, found.high, found.p) == pytest.approx((-0.495, 4.466, 0.078), abs=0.001)


def test_the_components_of_the_difference_from_top_3():
    found = crossed(scores("dpo", "dynamic") - scores("dpo", "top3"))
    assert found.seed_variance == 0 and (found.question_variance, found.rest_variance) == pytest.approx((34, 684), abs=0.5)
    assert found.df == 499


def test_a_model_solved_by_hand():
    """Mean squares: seed 16, question 2, rest 0. Both components count: 16 + 2 over 6 cells."""
    found = crossed(np.array([[0.0, 1, 2], [0, 1, 2]]) + np.array([[0.0], [8 / 3**0.5 / 2**0.5]]))
    squares = {"seed": 16.0, "question": 2.0}
    assert found.seed_variance == pytest.approx(16 / 3) and found.question_variance == pytest.approx(1) and found.rest_variance == pytest.approx(0)
    assert found.df == pytest.approx(18**2 / (squares["seed"] ** 2 / 1 + squares["question"] ** 2 / 2))


@pytest.mark.parametrize("components", [(0.0, 1.0, 5.0), (1.0, 1.0, 5.0), (0.3, 0.0, 1.0), (0.0, 0.0, 1.0)])
def test_the_interval_covers_the_mean_for_new_seeds_and_questions(components):
    """0.93 to 0.99 of 1,000 simulated experiments with five seeds."""
    rng, (seed, question, rest) = np.random.default_rng(1), components
    runs = [
        crossed(seed**0.5 * rng.normal(size=(5, 1)) + question**0.5 * rng.normal(size=(1, 40)) + rest**0.5 * rng.normal(size=(5, 40)))
        for _ in range(1000)
    ]
    covered = np.mean([run.low <= 0 <= run.high for run in runs])
    assert 0.93 <= covered <= 0.99
    assert np.mean([run.p < 0.05 for run in runs]) == pytest.approx(1 - covered)


def test_one_seed_gives_the_interval_over_questions_and_says_so():
    differences = np.random.default_rng(2).normal(0.3, 1, size=(1, 50))
    found, expected = crossed(differences), ttest_1samp(differences[0], 0)
    interval = expected.confidence_interval()
    assert found.seed_variance is None and found.question_variance is None and found.df == 49
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_differences_without_variance_are_their_own_interval(value, p):
    found = crossed(np.full((3, 4), value))
    assert (found.mean, found.low, found.high, found.p) == (value, value, value, p)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (3, 1), (2, 2, 2)])
def test_another_shape_than_seeds_and_questions_is_refused(shape):
    with pytest.raises(ValueError, match=r"\["):
        crossed(np.zeros(shape))


def test_groups_of_equal_weight_give_the_mean_of_their_means():
    differences = np.array([[1.0, 1, 1, 5], [2, 2, 2, 6]])
    found = crossed(balanced(differences, ["a", "a", "a", "b"]))
    assert found.mean == pytest.approx(3.5) and found.seed_variance == pytest.approx(0.5)
    assert (found.question_variance, found.rest_variance) == pytest.approx((0, 0))


def test_the_variance_of_a_mean_of_groups_is_that_within_groups():
    """Of groups with 20 and 60 questions: a quarter of the sum of the variances of both means."""
    rng = np.random.default_rng(5)
    groups = [rng.normal(0, 1, 20), rng.normal(9, 3, 60)]
    found = crossed(balanced(np.concatenate(groups)[None], ["a"] * 20 + ["b"] * 60))
    expected = sum(group.var(ddof=1) / len(group) for group in groups) / 4
    assert found.rest_variance / 80 == pytest.approx(expected * 80 / 79)


def test_groups_of_equal_size_change_no_mean_and_take_their_own_differences_out_of_the_variance():
    rng, groups = np.random.default_rng(4), ["a", "b"] * 50
    differences = rng.normal(size=(3, 100)) + np.where(np.array(groups) == "a", 2, -2)
    plain, by_group = crossed(differences), crossed(balanced(differences, groups))
    assert by_group.mean == pytest.approx(plain.mean)
    assert plain.question_variance > 3 and by_group.question_variance < 0.5


@pytest.mark.parametrize(("p_values", "expected"), [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.5, 0.9], [1.0, 1.0]), ([0.045], [0.045]), ([], []), ([0.02, 0.02], [0.04, 0.04]),
])
def test_holm_multiplies_the_smallest_p_most_and_keeps_the_order(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)
