"""dynamicrag/evaluation/metrics.py and the task table, against cases worked out by hand. test_metrics_reference.py compares with public references."""

import random

import pytest
from conftest import names, naming
from hypothesis import given
from hypothesis import strategies as st

from dynamicrag.evaluation import metrics
from dynamicrag.evaluation.metrics import METRIC_NAMES, METRICS, bootstrap_interval, paired_bootstrap, score_row
from dynamicrag.rows import tasks
from dynamicrag.rows.choices import Choice, choices_of, with_choices
from dynamicrag.rows.tasks import TASKS, target_answer, task_of, task_of_row

CASES = [
    # metric, response, answers, score
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
def test_a_metric_of_an_answer(metric, response, answers, score):
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
    assert metrics.match("anything", ["a"]) == 1  # found as a substring, since the metric is containment


def test_rouge_is_of_the_response_against_the_reference_and_not_the_other_way_round(monkeypatch):
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
def test_a_row_under_a_metric(metric, response, row, score):
    assert score_row(metric, response, row) == score


def test_every_data_set_has_a_metric_there_is_and_an_instruction():
    for task in TASKS.values():
        assert task.metric in METRIC_NAMES
        assert task.instruction and task.max_tokens > 0
    assert {name: task_of(name).metric for name in ("nq", "triviaqa", "hotpotqa", "2wikimqa", "fever", "eli5", "asqa")} == {
        "nq": "em", "triviaqa": "em", "hotpotqa": "em", "2wikimqa": "em", "fever": "accuracy", "eli5": "rouge", "asqa": "str_em",
    }
    assert task_of(None) == task_of("unheard of") == task_of("")


@pytest.mark.parametrize(
    ("name", "dataset", "metric"),
    [
        *((name, "asqa", "str_em") for name in ("ASQA", "asqa_eval_gtr_top100", "Asqa")), *((name, "eli5", "rouge") for name in ("ELI5", "eli5", "eli5_eval_bm25_top100")),
        *((name, "arc", "accuracy") for name in ("arc_challenge", "ARC-Challenge", "arc_c", "ARC", "ARC Challenge", "arc-c")), ("ARC-Easy", "arc_easy", "accuracy"),
        *((name, "nq", "em") for name in ("nq_open", "NQ", "NQ-open", "natural_questions", "Natural Questions", "NaturalQuestions")),
        *((name, "triviaqa", "em") for name in ("TriviaQA", "trivia_qa", "TRIVIAQA")), *((name, "hotpotqa", "em") for name in ("HotpotQA", "hotpot_qa")),
        *((name, "2wikimqa", "em") for name in ("2wikimultihopqa", "2WikiMultihopQA", "2wikimqa", "2WikiMQA")), ("PopQA", "popqa", "match"), ("FEVER", "fever", "accuracy"),
        ("MuSiQue", "musique", "f1"), ("Bamboogle", "bamboogle", "em"), ("SVAMP", "svamp", "em"), *((name, "webq", "em") for name in ("WebQ", "webquestions", "web_questions", "WebQuestions")),
        *((name, None, "em") for name in ("batch_3", "research", "nq_dev", "my_nq", "nq2", "trivia_night", "", "narc")),
    ],
)
def test_a_data_set_has_the_names_that_the_field_gives_it(name, dataset, metric):
    assert tasks.dataset_named(name) == dataset
    assert task_of(name).metric == metric
    assert tasks.derive_dataset("17", name) == dataset


def test_a_data_set_that_is_not_known_is_said_once_with_what_is_taken_instead(caplog, monkeypatch):
    monkeypatch.setattr(tasks, "_said", set())
    for name in ("nq", "HotpotQA", "unheard of", "unheard of", None, None, "other"):
        task_of(name)
    assert len(caplog.messages) == 3
    for message, name in zip(caplog.messages, ("'unheard of'", "'dataset'", "'other'"), strict=True):
        assert names(message, name, tasks.DEFAULT_TASK.instruction, "em")


def test_a_question_of_several_readings_is_asqas_whatever_its_data_set_is_called():
    readings = {"qa_pairs": [{"short_answers": ["x"]}, {"short_answers": ["y", "z"]}], "answers": ["x and y"]}
    for dataset in (None, "my own", "nq", "asqa"):
        assert task_of_row({"dataset": dataset, **readings}) == TASKS["asqa"]
        assert target_answer({"dataset": dataset, **readings}) == "x; y"
        assert task_of_row({"dataset": dataset, "qa_pairs": [{"short_answers": [" "]}]}) == task_of(dataset) == task_of_row({"dataset": dataset, "qa_pairs": None})
    assert task_of_row({"dataset": "factbook_ambiguous", **readings}) == TASKS["factbook_ambiguous"]


@pytest.mark.parametrize("dataset", TASKS)
def test_the_target_of_training_is_right_under_the_metric_of_evaluation(dataset):
    row = {"dataset": dataset, "answers": ["", "SUPPORTS", "other"], "qa_pairs": [{"short_answers": ["x"]}, {"short_answers": ["y"]}]}
    assert score_row(task_of_row(row).metric, target_answer(row), row) == 1
    del row["qa_pairs"]
    assert score_row(task_of(dataset).metric, target_answer(row), row) == (0.5 if task_of(dataset).metric == "str_em" else 1)



# ---------------------------------------------------------------- multiple choice


CHOICES = [Choice(label, text) for label, text in zip("ABCD", ["friction", "gravity", "magnetism", "wind from the sea"], strict=True)]
NUMBERED = [Choice(str(number), choice.text) for number, choice in enumerate(CHOICES, start=1)]


@pytest.mark.parametrize("choices", [[], CHOICES])
@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("C", "C"), ("c", "C"), ("C.", "C"), ("(C)", "C"), ("[C]", "C"), ("c) because", "C"), ("(C) magnetism", "C"), ("C: magnetism", "C"), ("C - magnetism", "C"),
        ("**C**", "C"), ("“C”", "C"), ("\n C\nThe magnet pulls.", "C"), ("C magnetism", "C"), ("C because it pulls", "C"), ("C, because it pulls", "C"),
        ("the answer is (C)", "C"), ("The answer is C.", "C"), ("The correct answer is **C**.", "C"), ("Answer: C", "C"), ("answer: c", "C"), ("Option C", "C"),
        ("The right choice is (C): magnetism", "C"), ("I choose C", "C"), ("It is C.", "C"), ("It’s C", "C"), ("C is correct", "C"), ("\\boxed{C}", "C"),
        ("A glass of water, so the answer is C", "C"), ("First I thought the answer is B. No: the answer is C", "C"), ("A, B and D are wrong; the answer is C", "C"),
        ("B is wrong, the answer is C", "C"), ("I am not sure, (C)", "C"), ("A", "A"), ("a", "A"), ("(A) because", "A"), ("A) An apple", "A"), ("A because it rubs", "A"),
        ("A, because it rubs", "A"), ("the answer is a", "A"), ("The answer is A.", "A"), ("A plant needs light", None), ("a plant needs light", None), ("A's", None),
        ("The answer is a plant", None), ("The answer is A plant", None), ("An apple", None), ("The answer is not C", None), ("I think so", None), ("B-movie", None), ("", None),
        ("...", None), ("Cats", None), ("(A) or (B), I cannot say", "A"), ("either (C) or (B)", None),
    ],
)
def test_the_choice_that_a_response_names(response, label, choices):
    assert {gold for gold in "ABCD" if metrics.accuracy(response, [gold], choices)} == ({label} if label else set())


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("gravity", "B"), ("Gravity.", "B"), ("It is gravity that holds them", "B"), ("A gravity", "B"), ("A friction", "A"), ("Wind from the  Sea", "D"), ("2", "B"),
        ("gravity, not friction", None), ("gravitation", None), ("5", None),
    ],
)
def test_the_text_of_a_choice_names_it(response, label):
    assert {gold for gold in "ABCD" if metrics.accuracy(response, [gold], CHOICES)} == ({label} if label else set())
    assert {gold for gold in "ABCD" if metrics.accuracy(response, [f" ({gold.lower()})."], CHOICES)} == ({label} if label else set())
    assert {choice.label for choice in CHOICES if metrics.accuracy(response, [choice.text.upper()], CHOICES)} == ({label} if label else set()), "gold is the text"


@pytest.mark.parametrize("choices", [[], NUMBERED])
@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("3", "3"), ("3.", "3"), ("(3)", "3"), ("3) magnetism", "3"), ("3 magnetism", "3"), ("The answer is 3", "3"), ("the answer is (3).", "3"), ("C", "3"), ("(C)", "3"),
        ("3.5 metres", None), ("30", None), ("3,000", None), ("", None), ("E", None),
    ],
)
def test_labels_may_be_numbers(response, label, choices):
    assert {gold for gold in "1234" if metrics.accuracy(response, [gold], choices)} == ({label} if label else set())


def test_a_number_that_is_the_text_of_a_choice_is_that_choice():
    counts = [Choice("A", "3"), Choice("B", "2"), Choice("C", "1")]
    assert metrics.accuracy("3", ["A"], counts) == 1 and metrics.accuracy("3", ["C"], counts) == 0


def test_choices_are_the_rows_or_those_its_question_lists():
    row = {"dataset": "arc", "answers": ["B"], "question": "Which is a metal?\nA: wood\nB: iron"}
    assert score_row("accuracy", "iron", row) == 1 and score_row("accuracy", "wood", row) == 0
    assert score_row("accuracy", "iron", {**row, "question": "Which is a metal?"}) == 0
    assert score_row("accuracy", "iron", {**row, "question": "?", "choices": {"text": ["wood", "iron"], "label": ["A", "B"]}}) == 1
    assert target_answer({**row, "answers": ["Iron"]}) == "B" == target_answer(row), "what is trained is what is asked for, the letter"


@pytest.mark.parametrize(
    "choices",
    [
        {"text": ["wood", "iron"], "label": ["A", "B"]}, {"text": ["wood", "iron"]}, ["wood", "iron"], {"A": "wood", "B": "iron"},
        [{"label": "A", "text": "wood"}, {"text": "iron", "label": "B"}],
    ],
)
def test_the_forms_of_choices(choices):
    assert choices_of({"choices": choices}) == [("A", "wood"), ("B", "iron")]


@pytest.mark.parametrize("choices", [5, "A", {"text": ["x", "y"], "label": ["A"]}, {"text": ["x", "y"], "label": ["A", "a"]}, [["x"]], [None], {"message": "x"}, [""]])
def test_other_forms_of_choices_are_refused(choices):
    with pytest.raises(ValueError, match=naming('"text"', '"label"')):
        choices_of({"choices": choices})


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("Which?\nA: wood\nB: iron", True), ("Which? (A) wood (B) iron", True), ("Which? a) Wood; b) Iron", True), ("Which? A. wood\n\nB. iron", True), ("Which?", False),
        ("Is wood or iron a metal?", False), ("Which?\nA: wood\nB: steel", False),
    ],
)
def test_choices_are_shown_once(question, shown):
    choices = [Choice("A", "wood"), Choice("B", "iron")]
    assert with_choices(question, choices) == (question if shown else f"{question}\nA: wood\nB: iron")
    assert with_choices(with_choices(question, choices), choices) == with_choices(question, choices)


# ---------------------------------------------------------------- FEVER, HotpotQA, typographic marks


NOT_ENOUGH = ["NEI", "nei.", "NOT_ENOUGH_INFO", "NOT ENOUGH INFO", "not enough information", "Not-enough-info", "NOTENOUGHINFO"]


def test_not_enough_info_is_one_label_however_it_is_written():
    for response in [*NOT_ENOUGH, "NOT ENOUGH INFO, the documents are silent", '"NEI"']:
        for answer in NOT_ENOUGH:
            assert metrics.accuracy(response, [answer]) == 1, (response, answer)
    for response in ("neither", "NOT ENOUGH", "not enough informants", "SUPPORTS", "", "There is NOT ENOUGH INFO"):
        assert metrics.accuracy(response, ["NEI"]) == 0 == metrics.accuracy(response, ["NOT ENOUGH INFO"]), response
    assert metrics.accuracy("NEI", ["SUPPORTS"]) == 0
    assert metrics.accuracy("supported", ["SUPPORTS"]) == 0 == metrics.accuracy("true", ["SUPPORTS"]), "other words are other labels"
    assert metrics.accuracy("True.", ["true"]) == 1 == metrics.accuracy("refuted", ["Refuted"])


@pytest.mark.parametrize("dataset", ["hotpotqa", "HotpotQA", "2wikimqa", "2WikiMultihopQA"])
@pytest.mark.parametrize(
    ("response", "answer", "official", "plain"),
    [
        ("yes", "yes", 1, 1), ("Yes.", "yes", 1, 1), ("yes it is", "yes", 0, 0.5), ("no", "no way", 0, 2 / 3), ("no", "yes", 0, 0), ("noanswer", "noanswer at all", 0, 0.5),
        ("yes men", "yes man", 0.5, 0.5),
    ],
)
def test_yes_and_no_are_whole_answers_in_hotpotqa_and_2wikimultihopqa(dataset, response, answer, official, plain):
    assert score_row("f1", response, {"dataset": dataset, "answers": [answer]}) == pytest.approx(official)
    for other in ("nq", "musique", None):
        assert score_row("f1", response, {"dataset": other, "answers": [answer]}) == pytest.approx(plain)


def test_typographic_quotes_and_dashes_are_those_of_ascii_in_every_metric():
    typographic, plain = "It’s “Rock ’n’ Roll” – 1914–1918, −5‑fold «x»", "It's \"Rock 'n' Roll\" - 1914-1918, -5-fold \"x\""
    for metric in METRICS:
        assert METRICS[metric](typographic, [plain]) == METRICS[metric](plain, [typographic]) == 1, metric
    assert score_row("str_em", f"well, {typographic}", {"qa_pairs": [{"short_answers": [plain]}]}) == 1
    assert metrics.normalise("5´ 。、") == "5 。、", "no other mark is taken away"


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
    """Two systems differ on few questions and always in the same direction. Without pairs, the spread would hide the difference."""
    own = [float(n % 2) for n in range(200)]
    others = [score if n % 20 else 0.0 for n, score in enumerate(own, start=1)]
    found = paired_bootstrap(own, others, 1)
    assert found == paired_bootstrap(own, others, 1)
    assert found.difference == pytest.approx(sum(own) / 200 - sum(others) / 200)
    assert 0 < found.low < found.difference < found.high and found.p < 0.01
    reverse = paired_bootstrap(others, own, 1)
    assert reverse.difference == -found.difference and reverse.p == pytest.approx(found.p, abs=0.01)
    assert paired_bootstrap(own, own, 1) == (0, 0, 0, 1)
