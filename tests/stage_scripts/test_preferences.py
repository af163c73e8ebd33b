"""construct_dpo.py: preference pairs from rewarded trajectories."""

import json
import re
from pathlib import Path

import pytest
from conftest import logged, naming
from hypothesis import given
from hypothesis import strategies as st
from trajectories import RIGHT, WORSE, WRONG, make_row, trajectory

import construct_dpo
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts
from dynamicrag.reward.preferences import generator_pair, reranker_pairs, worth_learning_from
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.tasks import task_of
from dynamicrag.stage import UserError

PROMPTS = Prompts()


def reranker(row, margin=0.0, which="best-worst", most=None):
    """The chosen and the rejected text of each pair."""
    pairs = reranker_pairs(row, which, margin, most)
    return [(format_ids(row["id_lists"][pair.chosen]), format_ids(row["id_lists"][pair.rejected])) for pair in pairs]


def generator(row, chosen_from="gold", reject_first=False):
    pair = generator_pair(row, chosen_from, reject_first)
    return pair and pair[1:]


def training_rows(make, row, *flags):
    return [made for made, _ in make([row], PROMPTS, construct_dpo.parse_args(list(flags)))]


# ---------------------------------------------------------------- reranker pairs


@pytest.mark.parametrize(
    ("trajectories", "margin", "pair"),
    [
        ([WRONG, RIGHT, WORSE], 0.0, ("[1]", "[4]")),
        ([RIGHT], 0.0, None), ([], 0.0, None), ([RIGHT, RIGHT], 0.0, None),
        ([([1], "a", 0.5, 0.0), ([2], "b", 0.5, 0.0)], 0.0, None),  # equal rewards
        ([([1], "a", 0.5, 0.0), ([1, 2], "a", 0.4, 0.0)], 0.0, ("[1]", "[1], [2]")),  # equal answers
        ([([], "a", 0.5, 0.0), ([1], "a", 0.4, 0.0)], 0.0, ("None", "[1]")),
        ([([1], "a", 0.75, 0.0), ([2], "b", 0.5, 0.0)], 0.25, None),  # the difference is not larger than the margin
        ([([1], "a", 0.75, 0.0), ([2], "b", 0.25, 0.0)], 0.25, ("[1]", "[2]")),
        ([([1], "a", 0.5, 0.0), ([2], "b", 0.5, 0.0), ([3], "c", 0.1, 0.0), ([4], "d", 0.1, 0.0)], 0.0, ("[1]", "[3]")),
        ([([2, 1], "a", 0.5, 0.0), ([1, 2], "b", 0.4, 0.0)], 0.0, ("[2], [1]", "[1], [2]")),  # only the order differs
    ],
)
def test_a_reranker_pair_is_the_best_against_the_worst_selection(trajectories, margin, pair):
    assert reranker(make_row(trajectories), margin) == ([pair] if pair else [])


def test_a_reranker_pair_asks_about_the_documents_that_were_shown():
    [pair] = training_rows(construct_dpo.reranker_rows, make_row([RIGHT, WORSE], docs_shown=5))
    assert set(pair) == {"instruction", "input", "chosen", "rejected", "system"}
    assert pair["input"] == ""
    assert re.findall(r"^\[(\d+)\] title", pair["instruction"], re.MULTILINE) == ["1", "2", "3", "4", "5"]


# ---------------------------------------------------------------- generator pairs


@pytest.mark.parametrize(
    ("trajectories", "gold", "best"),
    [
        ([RIGHT, WRONG, WORSE], ("gold 1", "worse"), ("gold 1", "worse")),
        ([RIGHT], None, None), ([], None, None),  # right answers are never rejected
        ([([1], "GOLD 1", 0.9, 1.0), ([2], "gold 1", 0.1, 1.0), WRONG], ("gold 1", "bad"), ("GOLD 1", "bad")),
        ([RIGHT, ([2], "", 0.0, 0.0)], None, None), ([RIGHT, ([2], " \n", 0.0, 0.0), WRONG], ("gold 1", "bad"), ("gold 1", "bad")),
        ([WRONG, WORSE], ("gold 1", "worse"), ("bad", "worse")),
        ([WORSE], ("gold 1", "worse"), None),  # the best one is also the worst one
        ([([1], "x", 0.2, 0.0), ([2], "y", 0.2, 0.0)], ("gold 1", "x"), None),
        ([([1], "y", 0.3, 0.0), ([2], "x", 0.3, 0.0), ([3], "x", 0.3, 0.0)], ("gold 1", "y"), None),
        ([([1], "", 0.9, 0.0), WORSE], ("gold 1", "worse"), None),  # the best response is empty
        ([RIGHT, ([1], "gold 1 ", 0.1, 0.5)], None, None),
    ],
)
def test_a_generator_pair_rejects_the_lowest_scoring_wrong_response(trajectories, gold, best):
    row = make_row(trajectories)
    assert generator(row) == gold
    assert generator(row, "best") == best


def test_a_generator_pair_shows_the_best_trajectorys_documents_in_its_order():
    row = make_row([([5, 2], "gold 1", 0.9, 1.0), WORSE], dataset="fever")
    [pair] = training_rows(construct_dpo.generator_rows, row)
    docs = [row["docs"][4], row["docs"][1]]
    assert pair["instruction"] == PROMPTS.generator("what is 1?", docs, task_of("fever").instruction)[1]["content"]
    assert "SUPPORTS" in pair["instruction"]


def test_a_best_trajectory_without_documents_makes_a_question_without_documents():
    [pair] = training_rows(construct_dpo.generator_rows, make_row([([], "gold 1", 0.9, 1.0), WORSE]))
    assert "title" not in pair["instruction"]


@given(
    trajectories=st.lists(trajectory, max_size=8), margin=st.sampled_from([0.0, 0.2]), most=st.sampled_from([None, 1, 3]),
    which=st.sampled_from(["best-worst", "all", "top-bottom:1", "top-bottom:2", "top-bottom:9"]),
)
def test_every_pair_prefers_the_better_selection(trajectories, margin, which, most):
    row = make_row([(ids, response, reward, float(response == "gold 1")) for ids, response, reward in trajectories])
    scores, pairs = row["response_scores"], reranker_pairs(row, which, margin, most)
    for pair in pairs:
        assert row["id_lists"][pair.chosen] != row["id_lists"][pair.rejected]
        assert pair.margin == scores[pair.chosen] - scores[pair.rejected] > margin
    written = [pair[:2] for pair in pairs]
    assert len({str([row["id_lists"][t] for t in pair]) for pair in written}) == len(written), "no pair twice"
    assert [pair.margin for pair in pairs] == sorted((pair.margin for pair in pairs), reverse=True)
    everything = reranker_pairs(row, "all", margin)
    assert set(pairs) <= set(everything)
    assert len(pairs) <= (most or 99)
    if which != "all":
        assert bool(pairs) == bool(everything), "the widest pair of all is the best against the worst"
    if pairs and everything:
        assert pairs[0].margin == everything[0].margin


@given(trajectories=st.lists(trajectory, max_size=8), chosen_from=st.sampled_from(["gold", "best"]), first=st.booleans())
def test_every_answer_rejected_is_wrong_and_of_this_question(trajectories, chosen_from, first):
    row = make_row([(ids, response, reward, float(response == "gold 1")) for ids, response, reward in trajectories])
    scores = row["response_scores"]
    pair = generator_pair(row, chosen_from, first)
    if pair is not None:
        best, chosen, rejected = pair
        assert scores[best] == max(scores)
        assert chosen.strip() != rejected.strip()
        assert chosen.strip() and rejected.strip()
        assert rejected in row["responses"]
        assert rejected != "gold 1"
        if chosen_from == "best" and not first:
            assert scores[best] > min(s for r, s in zip(row["responses"], scores, strict=True) if r == rejected)
        if chosen_from == "gold":
            assert chosen == "gold 1"
    elif chosen_from == "gold" and not first:
        assert not any(response.strip() and response != "gold 1" for response in row["responses"])


FOUR = [([1], "gold 1", 0.9, 1.0), ([2], "a", 0.5, 0.0), ([3], "b", 0.4, 0.0), ([4], "c", 0.1, 0.0)]


@pytest.mark.parametrize(
    ("which", "most", "pairs"),
    [
        ("best-worst", None, ["14"]), ("all", None, ["14", "13", "12", "24", "34", "23"]), ("all", 2, ["14", "13"]),
        ("top-bottom:1", None, ["14"]), ("top-bottom:2", None, ["14", "13", "24", "23"]), ("top-bottom:3", None, ["14", "13", "12", "24", "34", "23"]),
    ],
)
def test_which_pairs_of_a_question_are_made(which, most, pairs):
    assert reranker(make_row(FOUR), which=which, most=most) == [(f"[{better}]", f"[{worse}]") for better, worse in pairs]


@pytest.mark.parametrize(
    ("ems", "dataset", "keep_mean", "kept"),
    [
        ([1, 1], "nq", (0.01, 0.99), False), ([0, 0], "nq", (0.01, 0.99), False), ([1, 0], "nq", (0.01, 0.99), True),
        ([1, 1], "nq", (0.0, 1.0), True), ([0.5, 0.5], "asqa", (0.01, 0.99), True), ([1, 0, 0, 0], "nq", (0.3, 0.7), False),
        ([0, 0], "eli5", (0.01, 0.99), True), ([], "nq", (0.0, 1.0), False), ([], "eli5", (0.0, 1.0), False),
    ],
)
def test_a_question_that_always_succeeds_or_always_fails_teaches_nothing(ems, dataset, keep_mean, kept):
    row = make_row([([n + 1], "x", 0.1 * n, em) for n, em in enumerate(ems)], dataset=dataset)
    assert worth_learning_from(row, keep_mean) is kept


# ---------------------------------------------------------------- the stage


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(rows: list[dict], *flags: str) -> tuple[list[dict], list[dict]]:
    path = Path("training_data/llama3_8b_output_dpo.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    construct_dpo.main(["--overwrite", *flags])
    return tuple(
        [row for _, row in read_json(f"training_data/llama3_8b_{kind}_dpo.json")] for kind in ("reranker", "generator")
    )


def test_one_question_is_enough_for_both_sets():
    assert tuple(map(len, make([make_row([RIGHT, WORSE])]))) == (1, 1)


def test_nothing_leaks_from_one_question_into_the_next():
    rows = [
        make_row([([1], f"gold {n}", 0.9, 1.0), ([2], f"bad {n}", 0.1, 0.0)] if n % 3 else [([1], f"gold {n}", 0.9, 1.0)], n)
        for n in range(1, 13)
    ]
    reranker_pairs, generator_pairs = make(rows)
    assert len(reranker_pairs) == len(generator_pairs) == 8
    for pair in generator_pairs:
        asked = re.search(r"what is (\d+)\?", pair["instruction"])[1]
        assert (pair["chosen"], pair["rejected"]) == (f"gold {asked}", f"bad {asked}")
    assert {pair["system"] for pair in generator_pairs} != {pair["system"] for pair in reranker_pairs}


def test_questions_without_trajectories_cost_nothing_else():
    assert tuple(map(len, make([make_row([], 2), make_row([RIGHT, WORSE])]))) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([make_row([])], naming("reranker", 0, 1)),
        ([make_row([RIGHT])], naming("reranker", 1)),
        ([make_row([RIGHT, ([2], "gold 1", 0.1, 1.0)])], naming("generator", 1)),
        ([make_row([([1], "x", 0.1, 0.0), ([1], "x", 0.1, 0.0)])], naming("reranker", 1)),
    ],
)
def test_a_missing_set_is_an_error_and_not_an_empty_file(rows, says):
    with pytest.raises(UserError, match=says):
        make(rows)
    assert not list(Path("training_data").glob("*_dpo.json"))


def test_caps_take_a_seeded_sample_in_the_order_of_the_questions():
    rows = [make_row([RIGHT, WORSE], n) for n in range(1, 41)]
    everything = make(rows)
    flags = ["--max-reranker-pairs", "7", "--max-generator-pairs", "9"]
    first, again = make(rows, *flags), make(rows, *flags)
    other = make(rows, *flags, "--seed", "1")
    assert tuple(map(len, everything)) == (40, 40)
    assert tuple(map(len, first)) == (7, 9)
    assert first == again
    assert first != other
    for whole, some in zip(everything, first, strict=True):
        assert some == [pair for pair in whole if pair in some]
    assert first[0] != everything[0][:7]


def test_the_published_recipe_divides_the_questions_and_rejects_the_first_other_answer(monkeypatch):
    rows = [make_row([([2], "gold 0", 0.5, 0.0), RIGHT, WORSE], n) for n in range(1, 11)]
    rows.insert(0, make_row([([1], "a", 0.5, 0.0), ([2], "b", 0.5, 0.0)], 99))  # equal scores are not counted
    reranker_set, generator_set = make(rows, "--recipe", "published")
    asked = [[int(re.search(r"what is (\d+)\?", pair["instruction"])[1]) for pair in pairs] for pairs in (generator_set, reranker_set)]
    assert asked == [[1, 2], list(range(3, 11))]
    assert {pair["rejected"] for pair in generator_set} == {"gold 0"}
    assert {(pair["chosen"], pair["rejected"]) for pair in reranker_set} == {("[1]", "[4]")}
    monkeypatch.setattr(construct_dpo, "PUBLISHED_QUESTIONS", 11)
    monkeypatch.setattr(construct_dpo, "PUBLISHED_GENERATOR_QUESTIONS", 4)
    assert tuple(map(len, make(rows, "--recipe", "published"))) == (6, 4), "the published number, whatever share is eligible"


@pytest.mark.parametrize(
    "flags",
    [
        ["--pairs", "best"], ["--pairs", "top-bottom:0"], ["--pairs", "top-bottom"], ["--keep-mean", ".5"], ["--keep-mean", ".9,.1"],
        ["--keep-mean", "0,2"], ["--keep-mean", "a,b"], ["--min-margin", "-1"], ["--max-pairs-per-question", "0"],
        ["--max-reranker-pairs", "0"], ["--max-generator-pairs", "-1"], ["--min-margin", "nan"], ["--recipe", "published", "--pairs", "all"], ["--recipe", "published", "--min-margin", ".1"],
    ],
)
def test_flags_that_make_no_sense_are_refused(flags):
    with pytest.raises(SystemExit):
        construct_dpo.parse_args(flags)


def test_a_question_asked_twice_makes_its_pairs_once():
    twice = {**make_row([RIGHT, WORSE]), "id": "another"}
    assert tuple(map(len, make([make_row([RIGHT, WORSE]), twice]))) == (1, 1)


def test_questions_are_filtered_before_pairs_are_made():
    rows = [make_row([RIGHT, WORSE], 1), make_row([WRONG, WORSE], 2), make_row([RIGHT, ([1, 2], "gold 3", 0.5, 1.0)], 3)]
    pairs = make(rows, "--keep-mean", ".01,.99")
    assert [["what is 1?" in pair["instruction"] for pair in of_kind] for of_kind in pairs] == [[True], [True]]
    counts = read_manifest("training_data/llama3_8b_reranker_dpo.json")["counts"]
    assert {name: counts[name] for name in ("questions", "kept", "reranker_pairs", "generator_pairs")} == {
        "questions": 3, "kept": 1, "reranker_pairs": 1, "generator_pairs": 1,
    }


def test_the_report_says_what_the_pairs_teach(caplog):
    caplog.set_level("INFO")
    rows = [
        make_row([RIGHT, WRONG], 1, gold_docs=["d1"]), make_row([([1, 2], "x", 0.5, 0.0), ([3], "y", 0.42, 0.0)], 2, gold_docs=["d1", "d3"]),
        make_row([([], "gold 3", 0.9, 1.0), ([1], "gold 3", 0.85, 1.0), WORSE], 3),
    ]
    make(rows)
    summary = read_manifest("training_data/llama3_8b_reranker_dpo.json")["summary"]
    assert summary["all"] == pytest.approx({
        "pairs": 3, "margin": (0.6 + 0.08 + 0.8) / 3, "k chosen": 1, "k rejected": 4 / 3, "None": 1 / 3, "shorter": 2 / 3,
        "equally right": 1 / 3, "only shorter": 0, "same documents": 0, "gold in chosen": 1 / 2, "gold in rejected": 0,
    })
    assert {line: summary[line]["pairs"] for line in summary if line != "groups"} == {"all": 3, "0.05 to 0.10": 1, "0.40 to 1.00": 2}
    assert summary["0.05 to 0.10"]["gold in chosen"] == 0
    assert "| 0.40 to 1.00 | 2 " in caplog.text
    make([{**row, "gold_docs": []} for row in rows])
    assert read_manifest("training_data/llama3_8b_reranker_dpo.json")["summary"]["all"]["gold in chosen"] is None


REORDERED = [([1, 2], "gold 1", 0.9, 1.0), ([2, 1], "bad", 0.1, 0.0), ([3], "bad", 0.5, 0.0), ([1, 2], "gold 1", 0.9, 1.0)]


@pytest.mark.parametrize(("by", "pairs"), [("order", [("[1], [2]", "[2], [1]")]), ("set", [("[1], [2]", "[3]")])])
def test_the_same_documents_in_another_order_are_a_pair_only_by_order(by, pairs, caplog):
    caplog.set_level("INFO")
    reranker_set, _ = make([make_row(REORDERED)], "--pair-by", by)
    assert [(pair["chosen"], pair["rejected"]) for pair in reranker_set] == pairs
    same = read_manifest("training_data/llama3_8b_reranker_dpo.json")["summary"]["all"]["same documents"]
    assert same == (by == "order") and ("--pair-by set" in caplog.text) == (by == "order")


@pytest.mark.parametrize(("flags", "rejected"), [((), "[3]"), (("--recipe", "published"), "[2], [1]"), (("--pair-by", "order"), "[2], [1]")])
def test_pairs_are_by_set_unless_the_recipe_is_the_published_one(flags, rejected):
    rows = [make_row(REORDERED[:3], n) for n in range(1, 7)]
    reranker_set, _ = make(rows, *flags)
    assert {(pair["chosen"], pair["rejected"]) for pair in reranker_set} == {("[1], [2]", rejected)}


def test_the_published_recipe_pairs_by_order_only():
    with pytest.raises(SystemExit, match="2"):
        construct_dpo.main(["--recipe", "published", "--pair-by", "set"])


@given(trajectories=st.lists(trajectory, max_size=8), which=st.sampled_from(["best-worst", "all", "top-bottom:2"]))
def test_no_pair_by_set_is_of_equal_sets(trajectories, which):
    row = make_row([(ids, response, reward, float(response == "gold 1")) for ids, response, reward in trajectories])
    pairs = reranker_pairs(row, which, 0.0, by="set")
    sets = [(frozenset(row["id_lists"][pair.chosen]), frozenset(row["id_lists"][pair.rejected])) for pair in pairs]
    assert all(chosen != rejected for chosen, rejected in sets) and len(set(sets)) == len(sets)


def test_pairs_and_the_length_of_their_targets_are_reported_by_role_and_group(caplog):
    caplog.set_level("INFO")
    rows = [make_row([RIGHT, WORSE], 1, kind="one"), make_row([([1, 2], "gold 2", 0.9, 1.0), ([3], "worse", 0.1, 0.0)], 2, kind="two"),
            make_row([([1, 3], "gold 3", 0.9, 1.0), ([3], "worse", 0.1, 0.0)], 3, kind="two")]
    make(rows, "--group_by", "kind")
    groups = read_manifest("training_data/llama3_8b_reranker_dpo.json")["summary"]["groups"]
    assert groups["reranker"] == {
        "one": {"pairs": 1, "target length": len("[1]" "[4]")}, "two": {"pairs": 2, "target length": len("[1], [2]" "[3]" "[1], [3]" "[3]")},
    }
    assert groups["generator"]["two"] == {"pairs": 2, "target length": len("gold 2" "worse" "gold 3" "worse")}
    assert re.search(r"\| +\| two +\| 2 +\| 22 +\|", caplog.text) and re.search(r"\| reranker +\| all +\| 3 +\|", caplog.text)


def test_the_length_of_the_targets_is_reported_by_role():
    make([make_row([RIGHT, WORSE], 1), make_row([([1, 2], "gold 2", 0.9, 1.0), ([3], "worse", 0.1, 0.0)], 2)])
    counts = read_manifest("training_data/llama3_8b_reranker_dpo.json")["counts"]
    assert counts["reranker_target_characters"] == len("[1]" "[4]" "[1], [2]" "[3]")
    assert counts["generator_target_characters"] == len("gold 1" "worse" "gold 2" "worse")


def test_rows_of_other_tools_without_docs_shown_and_terms_are_completed_and_it_is_said(caplog):
    whole = [make_row([RIGHT, WRONG, WORSE], n, docs_shown=7) for n in (1, 2)]
    for row in whole:
        row["responses"][0], row["docs_shown"] = f"gold {row['id'][1:]}", 7
    bare = [{key: value for key, value in row.items() if key not in ("docs_shown", "score_terms")} for row in whole]
    assert make(bare) == make(whole)
    assert [key for key in ("docs_shown", "score_terms") if logged(caplog, key, 2) == 1] == ["docs_shown", "score_terms"]
    make([{**row, "true_id": [1], "false_id": [2, 3, 4]} for row in bare])
    [pair, _] = [row for _, row in read_json("training_data/llama3_8b_reranker_dpo.json")]
    assert len(re.findall(r"^\[\d+\] title", pair["instruction"], re.MULTILINE)) == 4, "those labelled are those shown"


def test_more_documents_shown_than_labelled_are_refused_with_both_numbers():
    row = {**make_row([RIGHT, WORSE], docs_shown=6), "true_id": [1], "false_id": [2, 3, 4]}
    with pytest.raises(UserError, match=naming("row q1", "docs_shown", 6, "--topn 4", "--n_docs 6")):
        make([row])
    assert make([{**row, "docs_shown": 4}]), "fewer may have fitted the window"


SHORT = ([1], "gold 1", 0.9, 1.0)
AS_RIGHT, WRONG_LONG, WRONG_SHORT = ([1, 2], "gold 1", 0.5, 1.0), ([1, 2], "x", 0.5, 0.0), ([2], "x", 0.5, 0.0)


@pytest.mark.parametrize(
    ("rejected", "shares"),
    [
        ([AS_RIGHT] * 3, ["100", "100"]), ([WRONG_LONG] * 3, ["100", "0"]), ([AS_RIGHT, AS_RIGHT, AS_RIGHT, WRONG_SHORT, WRONG_SHORT], ["60", "60"]),
        ([WRONG_LONG, WRONG_LONG, AS_RIGHT, WRONG_SHORT, WRONG_SHORT], None), ([WRONG_SHORT] * 3, None),
    ],
)
def test_pairs_that_teach_brevity_are_warned_of(rejected, shares, caplog):
    wrong = ([3], "y", 0.6, 0.0)  # for the generator's pair
    make([make_row([SHORT, other, wrong], number) for number, other in enumerate(rejected, start=1)])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING" and "--min-margin" in record.getMessage()]
    assert [re.findall(r"(\d+) %", warning) for warning in warnings] == ([shares] if shares else []), "of the pairs, and of those that differ in nothing else"


def test_pairs_that_contradict_each_other_are_made_once():
    row = make_row([([1], "gold 1", 0.9, 1.0), ([2], "x", 0.1, 0.0)])
    other = {**row, "id": "again", "response_scores": [0.1, 0.9]}
    [pair], _ = make([row, other])
    assert (pair["chosen"], pair["rejected"]) == ("[1]", "[2]")


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        ({"response_scores": [0.1]}, "response_scores"), ({"responses": ["a"]}, "responses"), ({"score_terms": []}, "score_terms"),
        ({"id_lists": [[1], [8]]}, r"id_lists\[1\]"), ({"id_lists": [[0], [1]]}, r"id_lists\[0\]"), ({"id_lists": [1, 2]}, "id_lists"),
        ({"responses": ["a", None]}, "responses"), ({"response_scores": ["a", "b"]}, "response_scores"), ({"docs": None}, "docs"),
        ({"docs_shown": "5"}, "docs_shown"), ({"docs_shown": 1}, r"id_lists\[1\]"), ({"docs_shown": 9}, "docs_shown"),
        ({"score_terms": [{}, {"em": 1.0}]}, r"score_terms\[0\]\.em"), ({"score_terms": [{"em": "1.0"}, {"em": 1.0}]}, r"score_terms\[0\]\.em"),
        ({"score_terms": [{"em": 1.0}, {"em": 1.0, "bert": 1.0}]}, r"score_terms\[1\]"), ({"score_terms": [{"em": 1.0}, {"em": 1.1}]}, r"score_terms\[1\]\.em"), ({"answers": []}, "answers"),
    ],
)
def test_lists_that_are_not_parallel_or_name_no_document_are_refused(broken, key):
    with pytest.raises(UserError, match=rf"training_data/llama3_8b_output_dpo\.jsonl:2: key '{key}"):
        make([make_row([RIGHT, WORSE]), {**make_row([RIGHT, WORSE], 2), **broken}])
