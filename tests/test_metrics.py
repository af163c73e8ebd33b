"""dynamicrag/metrics.py and the task table: each metric against cases worked out by hand (test_metrics_reference.py: against references)."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamicrag import metrics
from dynamicrag.metrics import METRIC_NAMES, METRICS, bootstrap_interval, paired_bootstrap, score_row
from dynamicrag.tasks import TASKS, target_answer, task_of, task_of_row

CASES = [
    # metric, response, answers, score (behaviour 25)
    ("em", "The Eiffel Tower!", ["eiffel tower"], 1), ("em", "Eiffel  Tower", ["eiffel\ntower"], 1), ("em", "Eiffel", ["Eiffel Tower"], 0),
    ("em", "x", ["y", "X."], 1), ("em", "", ["a"], 0), ("em", "...", ["x"], 0), ("em", "the", ["a"], 0), ("em", "the", ["the"], 1),
    ("em", "A", ["a"], 1), ("em", "A", ["B"], 0), ("em", "", ["..."], 0), ("em", "São Tomé", ["são tomé"], 1), ("em", "ﬁve", ["five"], 1),
    ("em", "U.S.", ["US"], 1), ("em", "two-thirds", ["twothirds"], 1), ("em", "anthem", ["them"], 0), ("em", "é", ["e"], 0),
    ("match", "It is the Eiffel Tower, I think.", ["Eiffel tower"], 1), ("match", "", ["a"], 0), ("match", "", ["x", ""], 0),
    ("match", "...", ["x"], 0), ("match", "the", ["x"], 0), ("match", "Paris", ["Paris, France"], 0), ("match", "in 1999 or so", ["2000", "1999"], 1),
    ("match", " \n", ["x"], 0), ("match", "the", ["he"], 0), ("match", "The", ["the"], 1), ("match", "A", ["a", "x"], 1), ("match", "A", ["An"], 0),
    ("accuracy", "A", ["A"], 1), ("accuracy", "A", ["B"], 0), ("accuracy", "a) because", ["A"], 1), ("accuracy", "(B) An apple", ["A"], 0),
    ("accuracy", "An apple", ["A"], 0), ("accuracy", "SUPPORTS", ["SUPPORTS"], 1), ("accuracy", "supports.", ["SUPPORTS"], 1),
    ("accuracy", "REFUTES, not SUPPORTS", ["SUPPORTS"], 0), ("accuracy", "NOT ENOUGH INFO", ["NOT ENOUGH INFO"], 1),
    ("accuracy", "NOT ENOUGH", ["NOT ENOUGH INFO"], 0), ("accuracy", "", ["A"], 0), ("accuracy", "...", ["A"], 0), ("accuracy", "A", ["..."], 0),
    ("f1", "the cat sat", ["cat sat down"], 2 * 2 / (2 + 3)), ("f1", "cat cat", ["cat"], 2 / 3), ("f1", "cats", ["cat"], 0), ("f1", "", ["cat"], 0),
    ("f1", "...", ["cat"], 0), ("f1", "abc", ["cab"], 0), ("f1", "sat cat", ["cat sat", "dog"], 1), ("f1", "x", ["y", "x z"], 2 / 3),
    ("rouge", "the cat", ["the cat"], 1), ("rouge", "", ["cat"], 0), ("rouge", "...", ["cat"], 0), ("rouge", "cat", ["..."], 0),
    ("rouge", "a b", ["a b c d"], 2 * 1 * 0.5 / 1.5), ("rouge", "running", ["run"], 1), ("rouge", "x", ["y", "x"], 1),
    ("rouge_lsum", "One two. Three four.", ["One two. Three four."], 1), ("rouge_lsum", "", ["cat"], 0), ("rouge_lsum", "...", ["cat"], 0),
    ("rouge_lsum", "Three four. One two.", ["One two. Three four."], 1),
]


@pytest.mark.parametrize(("metric", "response", "answers", "score"), CASES)
def test_a_metric_of_an_answer(metric, response, answers, score):  # behaviour 25
    assert METRICS[metric](response, answers) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS)
@given(response=st.text(max_size=30), answers=st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_a_score_lies_between_0_and_1_whatever_the_text(metric, response, answers):
    score = score_row(metric, response, {"answers": answers})
    if any(answer.strip() for answer in answers):
        assert 0 <= score <= 1
    else:
        assert score is None


def test_a_gold_answer_of_punctuation_is_not_in_every_response():
    assert metrics.match("anything", ["..."]) == 0
    assert metrics.match("anything", ["a"]) == 1  # as a substring; the metric is containment


def test_rouge_is_of_the_response_against_the_reference_and_not_the_other_way_round(monkeypatch):  # behaviour 25
    seen = []

    class Scorer:
        def score(self, target, prediction):
            seen.append((target, prediction))
            return {kind: type("Score", (), {"fmeasure": 0.5}) for kind in ("rougeL", "rougeLsum")}

    monkeypatch.setattr(metrics, "_rouge", lambda kind, any_script: Scorer())
    metrics.rouge_l("the response", ["the reference"])
    metrics.rouge_lsum("the response", ["the reference"])
    assert seen == [("the reference", "the response")] * 2


@pytest.mark.parametrize("metric", METRICS)
def test_the_best_gold_answer_counts_and_their_order_does_not(metric):
    answers = ["zebra", "the cat sat", "dog"]
    scores = [METRICS[metric]("the cat sat", [answer]) for answer in answers]
    assert METRICS[metric]("the cat sat", answers) == METRICS[metric]("the cat sat", answers[::-1]) == max(scores) == 1


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("metric", "response", "row", "score"),
    [
        ("em", "gold", {"answers": ["", "gold"]}, 1), ("em", "", {"answers": ["", "gold"]}, 0),  # an empty reference is skipped
        ("match", "anything", {"answers": [""]}, None), ("rouge", "x", {"answers": ["", " "]}, None), ("rouge", "x", {"answers": ["", "x"]}, 1),
        ("em", "x", {"answers": []}, None), ("em", "x", {}, None), ("em", "x", {"answers": None}, None), ("f1", "", {"answers": [" "]}, None),
        ("str_em", "one and two", {"qa_pairs": [{"short_answers": ["One", "1"]}, {"short_answers": ["three"]}]}, 0.5),
        ("str_em", "one and two", {"qa_pairs": [{"short_answers": ["One"]}, {"short_answers": [""]}, {"short_answers": []}]}, 1),
        ("str_em", "", {"qa_pairs": [{"short_answers": ["One"]}]}, 0), ("str_em", "x", {"qa_pairs": [{"short_answers": [""]}]}, None),
        ("str_em", "one", {"answers": ["one", "two"]}, 0.5), ("str_em", "one", {"qa_pairs": [], "answers": ["one"]}, 1), ("str_em", "x", {}, None),
    ],
)
def test_a_row_under_a_metric(metric, response, row, score):  # behaviour 25
    assert score_row(metric, response, row) == score


def test_every_data_set_has_a_metric_there_is_and_an_instruction():  # behaviour 27
    for task in TASKS.values():
        assert task.metric in METRIC_NAMES
        assert task.instruction and task.max_tokens > 0
    assert {name: task_of(name).metric for name in ("nq", "triviaqa", "hotpotqa", "2wikimqa", "fever", "eli5", "asqa")} == {
        "nq": "em", "triviaqa": "em", "hotpotqa": "em", "2wikimqa": "em", "fever": "accuracy", "eli5": "rouge", "asqa": "str_em",
    }
    assert task_of(None) == task_of("unheard of") == task_of("")


@pytest.mark.parametrize("dataset", TASKS)
def test_the_target_of_training_is_right_under_the_metric_of_evaluation(dataset):
    row = {"dataset": dataset, "answers": ["", "SUPPORTS", "other"], "qa_pairs": [{"short_answers": ["x"]}, {"short_answers": ["y"]}]}
    assert score_row(task_of_row(row).metric, target_answer(row), row) == 1
    del row["qa_pairs"]
    assert score_row(task_of(dataset).metric, target_answer(row), row) == (0.5 if task_of(dataset).metric == "str_em" else 1)


# ---------------------------------------------------------------- the interval


def test_an_interval_is_seeded():
    scores = [float(n % 3 == 0) for n in range(50)]
    assert bootstrap_interval(scores, 1) == bootstrap_interval(scores, 1) != bootstrap_interval(scores, 2)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_scores_have_no_spread(value):
    assert bootstrap_interval([value] * 20, 1) == pytest.approx((value, value))
    assert bootstrap_interval([value], 1) == pytest.approx((value, value))


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(3)
    covered = 0
    for seed in range(100):
        low, high = bootstrap_interval([float(rng.random() < 0.4) for _ in range(80)], seed, resamples=200)
        assert 0 <= low <= high <= 1
        covered += low <= 0.4 <= high
    assert 86 <= covered <= 100


def test_more_questions_make_a_narrower_interval():
    few, many = ([float(n % 2) for n in range(count)] for count in (20, 2000))
    widths = [high - low for low, high in (bootstrap_interval(few, 1), bootstrap_interval(many, 1))]
    assert widths[0] > 5 * widths[1]


def test_a_paired_comparison_finds_no_difference_where_there_is_none_about_as_often_as_it_says():
    rng = random.Random(4)
    found = [
        paired_bootstrap([float(rng.random() < 0.4) for _ in range(60)], [float(rng.random() < 0.4) for _ in range(60)], seed, resamples=200)
        for seed in range(200)
    ]
    assert 0.88 < sum(one.low <= 0 <= one.high for one in found) / 200 <= 0.99
    assert sum(one.p < 0.05 for one in found) < 24


def test_a_paired_comparison_uses_the_pairs():
    """Two systems that differ on few questions, always the same way: unpaired, the difference would drown in the spread."""
    own = [float(n % 2) for n in range(200)]
    others = [score if n % 20 else 0.0 for n, score in enumerate(own, start=1)]
    found = paired_bootstrap(own, others, 1)
    assert found == paired_bootstrap(own, others, 1)
    assert found.difference == pytest.approx(sum(own) / 200 - sum(others) / 200)
    assert 0 < found.low < found.difference < found.high and found.p < 0.01
    reverse = paired_bootstrap(others, own, 1)
    assert reverse.difference == -found.difference and reverse.p == pytest.approx(found.p, abs=0.01)
    assert paired_bootstrap(own, own, 1) == (0, 0, 0, 1)
