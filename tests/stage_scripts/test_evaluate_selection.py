"""evaluate.py with gold documents: selected documents against needed ones, by hand and against plain sets."""

import json
from pathlib import Path

import pytest
from conftest import at
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from dynamicrag.evaluation.selections import chosen_of, summarise_chosen
from dynamicrag.stage import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_row(number: int, gold: str | None, final: str | None, docs: str = "abcd", **more) -> dict:
    """A document per letter. Without `final` the question was not answered."""
    row = {"id": f"q{number}", "question": "?", "answers": ["x"], "docs": [{"id": doc, "title": "", "text": doc} for doc in docs], **more}
    if gold is not None:
        row["gold_docs"] = list(gold)
    return row if final is None else {**row, "id_list": [docs.find(doc) + 1 for doc in final], "final_docs": list(final), "response": "x"}


def run(*rows: dict, name: str = "r") -> dict:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--results_file", f"{name}.jsonl"])
    return json.loads(Path(f"{name}.jsonl.metrics.json").read_text())["results"][name]


ROWS = [
    make_row(1, "ab", "acd", docs="acd"),  # precision 1/3, recall 1/2, F1 2/5; one of two gold documents was retrieved
    make_row(2, "a", "a"), make_row(3, "a", "", docs=""), make_row(4, "", ""), make_row(5, "", "a"), make_row(6, "abe", None), make_row(7, None, "a"),
]


def test_what_was_chosen_is_scored_against_what_is_needed():
    found = run(*ROWS)["selection"]
    assert (found["n"], found["needing_documents"]) == (6, 4)
    assert found["precision"] == pytest.approx(100 * (1 / 3 + 1 + 0 + 0) / 4)
    assert found["recall"] == pytest.approx(100 * (1 / 2 + 1 + 0 + 0) / 4)
    assert found["f1"] == pytest.approx(100 * (2 / 5 + 1 + 0 + 0) / 4)
    assert found["exact"] == pytest.approx(100 * 2 / 6)
    assert found["recall_ceiling"] == pytest.approx(100 * (1 / 2 + 1 + 0 + 2 / 3) / 4)
    assert (found["gold_documents"], found["gold_retrieved"], found["gold_chosen"]) == (7, 4, 2)
    assert found["needed_k"] == pytest.approx(7 / 6) and found["chosen_k"] == pytest.approx((3 + 1 + 0 + 0 + 1) / 5)
    assert found["by_needed_k"] == {
        "0": {"chosen_k": 0.5, "counts": {"0": 1, "1": 1}}, "1": {"chosen_k": 0.5, "counts": {"0": 1, "1": 1}},
        "2": {"chosen_k": 3, "counts": {"3": 1}}, "3": {"chosen_k": None, "counts": {"unanswered": 1}},
    }


def test_the_table_has_a_line_a_system_and_one_for_each_number_needed(capsys):
    run(*ROWS)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[3] == ["system", "n", "need some", "precision", "recall", "F1", "recall of all retrieved", "exact", "needed k", "chosen k"]
    assert lines[5] == ["r", "6", "4", "33.3", "37.5", "35.0", "54.2", "33.3", "1.17", "1.00"]
    assert lines[6] == ["system", "needed", "mean chosen", "0", "1", "3", "unanswered"]
    assert lines[8:] == [
        ["r", "0", "0.50", "1", "1", "0", "0"], ["r", "1", "0.50", "1", "1", "0", "0"], ["r", "2", "3.00", "0", "0", "1", "0"],
        ["r", "3", "", "0", "0", "0", "1"],
    ]


def test_numbers_of_documents_stand_in_the_order_of_numbers(capsys):
    letters = "abcdefghijkl"
    run(*(make_row(k, letters[:k], letters[:k], docs=letters) for k in (10, 2, 9, 1)))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[6] == ["system", "needed", "mean chosen", "1", "2", "9", "10"]
    assert [line[1] for line in lines[8:]] == ["1", "2", "9", "10"]


def test_without_gold_documents_there_is_no_such_table(capsys):
    found = run(make_row(1, None, "a"), make_row(2, None, "a", positive_ctxs=[]))
    assert "selection" not in found and "gold" not in capsys.readouterr().out


def test_of_two_systems_the_one_that_knows_is_in_the_table(capsys):
    run(make_row(1, None, "a"), name="one"), run(*ROWS, name="two")
    capsys.readouterr()
    evaluate.main(["--results_file", "one.jsonl", "two.jsonl"])
    table = capsys.readouterr().out.split("gold documents:")[1]
    assert "two" in table and "one" not in table


def test_questions_that_need_no_document_alone_have_no_recall():
    found = run(make_row(1, "", ""), make_row(2, "", "ab"))["selection"]
    assert [found[key] for key in ("precision", "recall", "f1", "recall_ceiling", "exact")] == [None, None, None, None, 50.0]


def test_dprs_contexts_are_read_and_ids_are_strings():
    first = {**make_row(1, None, "a"), "final_docs": [51, 8], "docs": [{"id": 51, "text": ""}, {"id": "8", "text": ""}], "positive_ctxs": [{"passage_id": "51"}, {"psg_id": 8}]}
    assert run(first)["selection"]["exact"] == 100
    assert run({**first, "positive_ctxs": [{"psg_id": 51}]})["selection"]["precision"] == 50


def test_rows_without_their_documents_have_no_ceiling():
    row = make_row(1, "a", "a")
    del row["docs"]
    found = run(row, make_row(2, "ab", "a", docs="a"))["selection"]
    assert (found["recall_ceiling"], found["recall"]) == (50, 75)


def test_an_answer_that_does_not_say_from_which_documents_is_left_out():
    row = make_row(1, "a", "a")
    del row["final_docs"]
    assert run(row, make_row(2, "a", "b"))["selection"]["n"] == 1


def test_a_question_without_gold_answer_is_left_out_here_too():
    assert run({**make_row(1, "a", "a"), "answers": []}, make_row(2, "a", "b"))["selection"]["n"] == 1


def test_a_missing_question_counts_as_not_chosen():
    rows = [make_row(1, "a", "a"), make_row(2, "ab", "a")]
    Path("asked.jsonl").write_text("".join(json.dumps(make_row(n, "ab", None)) + "\n" for n in range(1, 5)))
    Path("r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["--results_file", "r.jsonl", "--eval_file", "asked.jsonl"])
    found = json.loads(Path("r.jsonl.metrics.json").read_text())["results"]["r"]["selection"]
    assert (found["recall"], found["precision"], found["exact"]) == (37.5, 50, 25)
    assert found["by_needed_k"]["2"]["counts"] == {"1": 1, "unanswered": 2}


@pytest.mark.parametrize(("key", "value"), [("gold_docs", "51"), ("gold_docs", [{"id": "a"}]), ("final_docs", "a"), ("final_docs", [None]), ("final_docs", None)])
def test_what_is_no_list_of_ids_is_named(key, value):
    with pytest.raises(UserError, match=at(f"r.jsonl: row q1: key '{key}'")):
        run({**make_row(1, "a", "a"), key: value})


IDS = st.lists(st.sampled_from("abcdef"), max_size=8)


@given(st.lists(st.tuples(IDS, st.none() | IDS, IDS), min_size=1, max_size=8))
def test_measures_are_those_of_sets(questions):
    """An id that occurs twice is one document."""
    chosen = []
    precision, recall, f1, exact, ceiling = [], [], [], [], []
    for number, (gold, final, docs) in enumerate(questions):
        chosen.append(chosen_of(make_row(number, "".join(gold), None if final is None else "".join(final), "".join(docs)), "f"))
        needed, given, found = set(gold), set(final or ()), set(docs)
        exact.append(final is not None and needed == given)
        if needed:
            p = len(needed & given) / len(given) if given else 0
            r = len(needed & given) / len(needed)
            precision.append(p), recall.append(r), f1.append(2 * p * r / (p + r) if p + r else 0)
            ceiling.append(len(needed & found) / len(needed))
    summary = summarise_chosen(chosen)
    for key, values in {"precision": precision, "recall": recall, "f1": f1, "exact": exact, "recall_ceiling": ceiling}.items():
        assert summary[key] == (pytest.approx(100 * sum(values) / len(values)) if values else None)
    assert sum(sum(cell["counts"].values()) for cell in summary["by_needed_k"].values()) == summary["n"] == len(questions)
