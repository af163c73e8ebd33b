"""construct_dpo.py: preference pairs from rewarded trajectories."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import construct_dpo
from dynamicrag.jsonio import read_json
from dynamicrag.prompts import Prompts
from dynamicrag.selection import format_ids, parse_ids
from dynamicrag.stage import UserError
from dynamicrag.tasks import task_of

PROMPTS = Prompts()


def make_row(trajectories: list[tuple[list[int], str, float, float]], number: int = 1, docs_shown: int = 5, **more) -> dict:
    """Trajectories are (identifiers, response, reward, em)."""
    docs = [{"id": f"d{n}", "title": f"title {n}", "text": f"text {n}", "score": 0.5} for n in range(1, 8)]
    ids, responses, scores, ems = map(list, zip(*trajectories, strict=True)) if trajectories else ([], [], [], [])
    return {
        "id": f"q{number}", "question": f"what is {number}?", "answers": [f"gold {number}"], "docs": docs, "docs_shown": docs_shown,
        "id_lists": ids, "responses": responses, "response_scores": scores, "score_terms": [{"em": em} for em in ems], **more,
    }


RIGHT = ([1], "gold 1", 0.9, 1.0)
WRONG = ([2, 3], "bad", 0.3, 0.0)
WORSE = ([4], "worse", 0.1, 0.0)


def reranker(row, margin=0.0):
    pair = construct_dpo.reranker_pair(row, PROMPTS, margin)
    return pair and (pair["chosen"], pair["rejected"])


def generator(row, chosen_from="gold"):
    pair = construct_dpo.generator_pair(row, PROMPTS, chosen_from)
    return pair and (pair["chosen"], pair["rejected"])


# ---------------------------------------------------------------- reranker pairs


@pytest.mark.parametrize(
    ("trajectories", "margin", "pair"),
    [
        ([WRONG, RIGHT, WORSE], 0.0, ("[1]", "[4]")),
        ([RIGHT], 0.0, None), ([], 0.0, None), ([RIGHT, RIGHT], 0.0, None),
        ([([1], "a", 0.5, 0.0), ([2], "b", 0.5, 0.0)], 0.0, None),  # equal rewards
        ([([1], "a", 0.5, 0.0), ([1, 2], "a", 0.4, 0.0)], 0.0, ("[1]", "[1], [2]")),  # behaviour 17: equal answers
        ([([], "a", 0.5, 0.0), ([1], "a", 0.4, 0.0)], 0.0, ("None", "[1]")),
        ([([1], "a", 0.75, 0.0), ([2], "b", 0.5, 0.0)], 0.25, None),  # not further apart than the margin
        ([([1], "a", 0.75, 0.0), ([2], "b", 0.25, 0.0)], 0.25, ("[1]", "[2]")),
        ([([1], "a", 0.5, 0.0), ([2], "b", 0.5, 0.0), ([3], "c", 0.1, 0.0), ([4], "d", 0.1, 0.0)], 0.0, ("[1]", "[3]")),
        ([([2, 1], "a", 0.5, 0.0), ([1, 2], "b", 0.4, 0.0)], 0.0, ("[2], [1]", "[1], [2]")),  # order alone
    ],
)
def test_a_reranker_pair_is_the_best_against_the_worst_selection(trajectories, margin, pair):
    assert reranker(make_row(trajectories), margin) == pair


def test_a_reranker_pair_asks_about_the_documents_that_were_shown():
    pair = construct_dpo.reranker_pair(make_row([RIGHT, WORSE], docs_shown=5), PROMPTS, 0.0)
    assert set(pair) == {"instruction", "input", "chosen", "rejected", "system"}
    assert pair["input"] == ""
    assert re.findall(r"^\[(\d+)\] title", pair["instruction"], re.MULTILINE) == ["1", "2", "3", "4", "5"]


# ---------------------------------------------------------------- generator pairs


@pytest.mark.parametrize(
    ("trajectories", "gold", "best"),
    [
        ([RIGHT, WRONG, WORSE], ("gold 1", "worse"), ("gold 1", "worse")),
        ([RIGHT], None, None), ([], None, None),  # behaviour 19: right answers are never rejected
        ([([1], "GOLD 1", 0.9, 1.0), ([2], "gold 1", 0.1, 1.0), WRONG], ("gold 1", "bad"), ("GOLD 1", "bad")),
        ([RIGHT, ([2], "", 0.0, 0.0)], None, None), ([RIGHT, ([2], " \n", 0.0, 0.0), WRONG], ("gold 1", "bad"), ("gold 1", "bad")),
        ([WRONG, WORSE], ("gold 1", "worse"), ("bad", "worse")),
        ([WORSE], ("gold 1", "worse"), None),  # the best is the worst
        ([([1], "x", 0.2, 0.0), ([2], "y", 0.2, 0.0)], ("gold 1", "x"), None),
        ([([1], "y", 0.3, 0.0), ([2], "x", 0.3, 0.0), ([3], "x", 0.3, 0.0)], ("gold 1", "y"), None),
        ([([1], "", 0.9, 0.0), WORSE], ("gold 1", "worse"), None),  # the best response is empty
        ([RIGHT, ([1], "gold 1 ", 0.1, 0.5)], None, None),
    ],
)
def test_a_generator_pair_rejects_the_lowest_scoring_wrong_response(trajectories, gold, best):  # behaviours 16, 19
    row = make_row(trajectories)
    assert generator(row) == gold
    assert generator(row, "best") == best


def test_a_generator_pair_shows_the_best_trajectorys_documents_in_its_order():
    row = make_row([([5, 2], "gold 1", 0.9, 1.0), WORSE], dataset="fever")
    pair = construct_dpo.generator_pair(row, PROMPTS, "gold")
    docs = [row["docs"][4], row["docs"][1]]
    assert pair["instruction"] == PROMPTS.generator("what is 1?", docs, task_of("fever").instruction)[1]["content"]
    assert "SUPPORTS" in pair["instruction"]


def test_a_best_trajectory_without_documents_makes_a_question_without_documents():
    pair = construct_dpo.generator_pair(make_row([([], "gold 1", 0.9, 1.0), WORSE]), PROMPTS, "gold")
    assert "title" not in pair["instruction"]


trajectory = st.tuples(
    st.lists(st.integers(1, 5), max_size=4, unique=True), st.sampled_from(["gold 1", "a", "b", " a", "", "c d"]),
    st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 0.9]),
)


@given(trajectories=st.lists(trajectory, max_size=8), margin=st.sampled_from([0.0, 0.2]), chosen_from=st.sampled_from(["gold", "best"]))
def test_every_pair_prefers_the_better_and_never_something_to_itself(trajectories, margin, chosen_from):  # behaviours 17, 19
    row = make_row([(ids, response, reward, float(response == "gold 1")) for ids, response, reward in trajectories])
    scores = row["response_scores"]

    pair = construct_dpo.reranker_pair(row, PROMPTS, margin)
    written = [format_ids(ids) for ids in row["id_lists"]]
    if pair is None:
        apart = {
            (a, b) for a, x in zip(written, scores, strict=True) for b, y in zip(written, scores, strict=True)
            if a != b and x == max(scores) and y == min(scores) and x - y > margin
        }
        assert not apart or len(set(written)) < len(written)
    else:
        assert pair["chosen"] != pair["rejected"]
        ids = [parse_ids(pair[side], 5).ids for side in ("chosen", "rejected")]
        rewards = [{s for i, s in zip(row["id_lists"], scores, strict=True) if i == wanted} for wanted in ids]
        assert max(rewards[0]) == max(scores)
        assert min(rewards[1]) == min(scores)
        assert max(scores) - min(scores) > margin

    pair = construct_dpo.generator_pair(row, PROMPTS, chosen_from)
    if pair is not None:
        assert pair["chosen"].strip() != pair["rejected"].strip()
        assert pair["chosen"].strip() and pair["rejected"].strip()
        assert pair["rejected"] in row["responses"]
        assert pair["rejected"] != "gold 1"
        if chosen_from == "best":
            of = {side: [s for r, s in zip(row["responses"], scores, strict=True) if r == pair[side]] for side in ("chosen", "rejected")}
            assert max(of["chosen"]) > min(of["rejected"])
        else:
            assert pair["chosen"] == "gold 1"
    elif chosen_from == "gold":
        assert not any(response.strip() and response != "gold 1" for response in row["responses"])


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


def test_one_question_is_enough_for_both_sets():  # behaviour 20
    assert tuple(map(len, make([make_row([RIGHT, WORSE])]))) == (1, 1)


def test_nothing_leaks_from_one_question_into_the_next():  # behaviour 19
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


def test_questions_without_trajectories_cost_nothing_else():  # behaviour 15
    assert tuple(map(len, make([make_row([], 2), make_row([RIGHT, WORSE])]))) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([make_row([])], "0 reranker pairs and 0 generator pairs from 1 questions"),
        ([make_row([RIGHT])], "0 reranker pairs and 0"),
        ([make_row([RIGHT, ([2], "gold 1", 0.1, 1.0)])], "1 reranker pairs and 0 generator pairs"),
        ([make_row([([1], "x", 0.1, 0.0), ([1], "x", 0.1, 0.0)])], "0 reranker pairs and 1 generator pairs"),
    ],
)
def test_a_missing_set_is_an_error_and_not_an_empty_file(rows, says):  # behaviour 20
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


@pytest.mark.parametrize(
    ("broken", "key"),
    [
        ({"response_scores": [0.1]}, "response_scores"), ({"responses": ["a"]}, "responses"), ({"score_terms": []}, "score_terms"),
        ({"id_lists": [[1], [8]]}, r"id_lists\[1\]"), ({"id_lists": [[0], [1]]}, r"id_lists\[0\]"), ({"id_lists": [1, 2]}, "id_lists"),
        ({"responses": ["a", None]}, "responses"), ({"response_scores": ["a", "b"]}, "response_scores"), ({"docs": None}, "docs"),
        ({"docs_shown": "5"}, "docs_shown"), ({"docs_shown": 1}, r"id_lists\[1\]"), ({"docs_shown": 9}, "docs_shown"),
        ({"score_terms": [{}, {"em": 1.0}]}, r"score_terms\[0\]\.em"), ({"answers": []}, "answers"),
    ],
)
def test_lists_that_are_not_parallel_or_name_no_document_are_refused(broken, key):
    with pytest.raises(UserError, match=rf"training_data/llama3_8b_output_dpo\.jsonl:2: key '{key}"):
        make([make_row([RIGHT, WORSE]), {**make_row([RIGHT, WORSE], 2), **broken}])
