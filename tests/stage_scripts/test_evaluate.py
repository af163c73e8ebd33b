"""evaluate.py: the rows that count, the metric of each data set, and the table."""

import errno
import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
from conftest import at, logged, names, naming

import evaluate
import evaluate_retrieval
import inference
import top_inference
from dynamicrag.evaluation import results as result_files
from dynamicrag.evaluation.answers import unanswered_reason
from dynamicrag.llm.engine import Completion
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import RequestBuilder, work_on_fitting
from dynamicrag.rows import tasks
from dynamicrag.rows.row import fail_unanswered
from dynamicrag.stage import UserError


def make_row(number: int, response: str | None = "gold", **more) -> dict:
    row = {"id": f"q{number}", "question": "?", "answers": ["gold"], **more}
    return row if response is None else {"id_list": [1], **row, "response": response}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path: str, rows: list[dict], remain: list[dict] | None = None) -> str:
    """Write a result file, and its remain file and manifest if there are any."""
    Path(path).write_text(json.dumps(rows) if path.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
    if remain is not None:
        write(f"remain_{path}", remain)
        Path(f"{path}.manifest.json").write_text(json.dumps({"outputs": [path, f"elsewhere/remain_{path}"]}))
    return path


def ask(count: int) -> str:
    """Write an evaluation file of the first `count` questions."""
    return write("asked.jsonl", [make_row(number, None) for number in range(1, count + 1)])


def run(*files: str, **flags) -> dict:
    """Run the stage. Returns the results of the metrics file. Keyword arguments are flags."""
    given = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    evaluate.main(["--results_file", *files, *given])
    return json.loads(Path(flags.get("output_file", f"{files[0]}.metrics.json")).read_text())["results"]


# ---------------------------------------------------------------- the denominator


RIGHT, WRONG = [make_row(n) for n in range(1, 7)], [make_row(n, "bad") for n in range(7, 9)]
FAILED = [make_row(n, None, error="no selection") for n in range(9, 11)]


@pytest.mark.parametrize(
    ("rows", "remain", "asked", "n", "score", "unanswered"),
    [
        (RIGHT + WRONG, None, None, 8, 75.0, 0),
        (RIGHT + WRONG, [], None, 8, 75.0, 0),
        (RIGHT + WRONG, FAILED, None, 10, 60.0, 2),
        (RIGHT + WRONG, FAILED, 10, 10, 60.0, 2),
        (RIGHT + WRONG, None, 12, 12, 50.0, 4),
        (RIGHT + WRONG, FAILED, 12, 12, 50.0, 4),
        (RIGHT + FAILED, None, None, 8, 75.0, 2),  # failed rows in the result file itself
        ([], FAILED, None, 2, 0.0, 2),
        (RIGHT + WRONG, [make_row(1, None), *FAILED], None, 10, 60.0, 2),  # answered in one file, failed in the other
        (RIGHT[:3], None, 3, 3, 100.0, 0),
        ([make_row(1, "")], None, None, 1, 0.0, 0),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_whatever_was_asked_is_in_the_denominator(rows, remain, asked, n, score, unanswered, suffix):
    write(f"r.{suffix}", rows, remain)
    flags = {"eval_file": ask(asked)} if asked else {}
    found = run(f"r.{suffix}", metric="em", **flags)["r"]
    assert (found["n"], found["score"], found["unanswered"]) == (n, score, unanswered)
    assert found["low"] <= score <= found["high"]


def test_a_run_that_answered_nothing_scores_nothing_and_does_not_fail():
    write("r.jsonl", [], FAILED)
    found = run("r.jsonl")["r"]
    assert (found["n"], found["score"], found["unanswered"], found["documents"], found["none_share"]) == (2, 0.0, 2, 0.0, 0.0)


def test_rows_of_other_questions_do_not_stand_in_for_missing_ones():
    """The evaluation file has twelve questions. Ten of them have no answer, and nine answers belong to no question."""
    ask(12)
    write("r.json", [make_row(1), make_row(2), *(make_row(n) for n in range(100, 109))])
    with pytest.raises(UserError, match=at("r.json", "q100", "asked.jsonl")):
        run("r.json", eval_file="asked.jsonl")


def test_a_missing_question_is_wrong_in_its_own_data_set_too():
    write("asked.jsonl", [make_row(n, None, dataset="nq" if n < 3 else "fever") for n in range(1, 6)])
    write("r.json", [make_row(1, dataset="nq"), make_row(3, dataset="fever")])
    groups = run("r.json", eval_file="asked.jsonl")["r"]["groups"]
    assert {name: (group["n"], round(group["score"], 1)) for name, group in groups.items()} == {"fever": (3, 33.3), "nq": (2, 50.0)}


@pytest.mark.parametrize(
    ("rows", "remain", "asked", "n", "score", "unanswered", "repeats", "first"),
    [
        (RIGHT + WRONG, FAILED, None, 10, 60.0, 2, 0, None),
        ([*RIGHT, *RIGHT[:2], *WRONG], None, None, 8, 75.0, 0, 2, ("q1", "r.jsonl")),
        ([*RIGHT, *WRONG, *RIGHT, *WRONG], [], None, 8, 75.0, 0, 8, ("q1", "r.jsonl")),  # the same shard twice
        ([make_row(1, "bad"), make_row(1)], None, None, 1, 0.0, 0, 1, ("q1", "r.jsonl")),  # the first row counts, even if it is wrong
        ([make_row(1), make_row(1, "bad"), make_row(1, "bad")], None, None, 1, 100.0, 0, 2, ("q1", "r.jsonl")),
        ([make_row(1, None, error="no selection"), make_row(1)], None, None, 1, 0.0, 1, 1, ("q1", "r.jsonl")),
        (RIGHT + WRONG, [make_row(3, None), *FAILED], None, 10, 60.0, 2, 1, ("q3", "remain_r.jsonl")),  # answered and failed
        (RIGHT + WRONG, [*FAILED, *FAILED], None, 10, 60.0, 2, 2, ("q9", "remain_r.jsonl")),
        ([*RIGHT, *RIGHT[2:4], *WRONG], [*FAILED, make_row(8, None)], None, 10, 60.0, 2, 3, ("q3", "r.jsonl")),
        ([*RIGHT, *RIGHT[2:4], *WRONG], [*FAILED, FAILED[1]], 15, 15, 40.0, 7, 3, ("q3", "r.jsonl")),  # all rows, and five that are missing
        ([*RIGHT, *WRONG, *WRONG], None, 12, 12, 50.0, 4, 2, ("q7", "r.jsonl")),
        ([], [*FAILED, *FAILED], None, 2, 0.0, 2, 2, ("q9", "remain_r.jsonl")),
    ],
)
def test_a_question_answered_more_than_once_counts_once_and_is_said(rows, remain, asked, n, score, unanswered, repeats, first, caplog):
    write("r.jsonl", rows, remain)
    flags = {"eval_file": ask(asked)} if asked else {}
    found = run("r.jsonl", metric="em", **flags)["r"]
    assert (found["n"], found["score"], found["unanswered"]) == (n, score, unanswered)
    assert sum(group["n"] for group in found["groups"].values()) == n
    if repeats:
        assert logged(caplog, "r.jsonl", repeats, *first) == 1
    if asked:
        assert logged(caplog, "r.jsonl", asked - len({row["id"] for row in rows + (remain or [])}), asked) == 1
    assert logged(caplog) - logged(caplog, "'response'") == bool(repeats) + bool(asked) + (remain is None and not asked)


def test_a_repeated_row_is_counted_once_in_what_it_cost_and_chose():
    write("r.jsonl", [make_row(1, id_list=[1], usage={"calls": 2}), make_row(2, id_list=[1, 2, 3], usage={"calls": 4}), make_row(1, id_list=[], usage={"calls": 90})])
    found = run("r.jsonl")["r"]
    assert (found["documents"], found["none_share"], found["calls"]) == (2.0, 0.0, 3.0)


def test_a_question_asked_twice_is_refused():
    write("r.jsonl", RIGHT)
    write("asked.jsonl", [*RIGHT, RIGHT[0]])
    with pytest.raises(UserError, match=at("asked.jsonl:7: key 'id'", "'q1'", 1)):
        run("r.jsonl", eval_file="asked.jsonl")


# ---------------------------------------------------------------- what the results do not say


def strip(rows: list[dict], *more: str) -> list[dict]:
    return [{key: row[key] for key in ("id", "response", *more) if key in row} for row in rows]


@pytest.mark.parametrize("more", [(), ("question",), ("question", "id_list"), ("question", "answers")])
def test_results_may_be_ids_and_responses_alone(more):
    """Three of four answers are right, and all four rows count. Other keys of the results change nothing."""
    write("asked.jsonl", [make_row(n, None, dataset="popqa", kind="x" if n < 3 else "y") for n in range(1, 5)])
    write("r.jsonl", strip([make_row(1), make_row(2, "it is gold"), make_row(3, "golden"), make_row(4, "bad")], *more))
    found = run("r.jsonl", eval_file="asked.jsonl", group_by="kind")["r"]
    assert (found["n"], found["score"], found["metric"], found["without_gold_answer"], found["unanswered"]) == (4, 75.0, "match", 0, 0)
    assert {name: (group["n"], group["score"]) for name, group in found["groups"].items()} == {"x": (2, 100.0), "y": (2, 50.0)}


def test_readings_gold_documents_and_choices_are_taken_from_what_was_asked():
    write("asked.jsonl", [
        make_row(1, None, qa_pairs=[{"short_answers": ["1989"]}, {"short_answers": ["1644"]}]),
        make_row(2, None, dataset="ARC-Challenge", answers=["B"], choices={"text": ["wood", "iron"], "label": ["A", "B"]}, positive_ctxs=[{"passage_id": "wiki:7"}]),
        make_row(3, None, dataset="nq", gold_docs=["9"]),
    ])
    write("r.jsonl", [{"id": "q1", "response": "in 1989"}, {"id": "q2", "response": "iron", "final_docs": ["7"]}, {"id": "q3", "response": "bad", "final_docs": ["7"]}])
    found = run("r.jsonl", eval_file="asked.jsonl")["r"]
    assert {name: (group["metrics"], group["score"]) for name, group in found["groups"].items()} == {
        "asqa": ("str_em", 50.0), "arc": ("accuracy", 100.0), "nq": ("em", 0.0),
    }
    assert (found["selection"]["n"], found["selection"]["exact"], found["selection"]["recall"]) == (2, 50.0, 50.0)


def test_what_the_results_say_themselves_stands_before_what_was_asked():
    write("asked.jsonl", [make_row(1, None, dataset="nq", answers=["other"], gold_docs=["a"])])
    write("r.jsonl", [make_row(1, "gold it is", dataset="popqa", gold_docs=[], final_docs=[])])
    found = run("r.jsonl", eval_file="asked.jsonl")["r"]
    assert (found["metric"], found["score"], found["selection"]["exact"]) == ("match", 100.0, 100.0)
    assert run("r.jsonl", eval_file="asked.jsonl", dataset="NQ")["r"]["metric"] == "em", "and the flag before both"


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_left_out_are_counted_in_log_and_table(capsys, caplog):
    write("asked.jsonl", [make_row(n, None, answers=["gold"] if n < 3 else []) for n in range(1, 6)])
    write("r.jsonl", strip([make_row(1), make_row(2), make_row(3), make_row(4), make_row(1)]))
    found = run("r.jsonl", eval_file="asked.jsonl")["r"]
    assert (found["n"], found["score"], found["without_gold_answer"], found["repeated"]) == (2, 100.0, 3, 1)
    header, _, line = table(capsys.readouterr().out)
    assert logged(caplog, "r.jsonl", 3, "q3") == 1
    write("r.jsonl", [make_row(1)])
    run("r.jsonl")
    usual = table(capsys.readouterr().out)[0]
    assert [number for name, number in zip(header, line, strict=True) if name not in usual] == ["3", "1"], "columns of their own"


def test_an_unknown_data_set_is_said_with_the_metric_taken_unless_one_is_given(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "_said", set())
    write("r.json", [make_row(1), make_row(2, dataset="unheard of"), make_row(3, dataset="unheard of")])
    run("r.json", metric="match")
    assert not logged(caplog, "'dataset'")
    run("r.json")
    assert logged(caplog, "'dataset'", "em", tasks.DEFAULT_TASK.instruction) == logged(caplog, "'dataset'") == 2
    assert logged(caplog, "'dataset'", "'unheard of'") == 1


def test_gold_ids_of_another_corpus_are_said_with_their_number(caplog):
    rows = [make_row(n, gold_docs=[f"x{n}", "y"], final_docs=["a"], docs=[{"id": "a", "text": "t"}], dataset="nq") for n in (1, 2)]
    other = make_row(4, gold_docs=["z"], final_docs=["a"], docs=[{"id": "a", "text": "t"}], dataset="popqa")
    write("r.json", [*rows, make_row(3, gold_docs=["a"], final_docs=["a"], dataset="fever"), other])
    run("r.json")
    assert logged(caplog, "r.json", 5, 4, "nq", 1, "popqa") == logged(caplog, "r.json", "nq") == 1 and not logged(caplog, "fever")
    caplog.clear()
    write("r.json", [*rows, make_row(3, gold_docs=["a"], docs=[{"id": "wiki:a", "text": "t"}], final_docs=["wiki:a"], dataset="nq")])
    assert run("r.json")["r"]["selection"]["gold_chosen"] == 1
    assert not logged(caplog, "nq")


# ---------------------------------------------------------------- why there is no answer


def test_unanswered_questions_are_counted_by_reason(capsys):
    write("r.jsonl", [
        *RIGHT, {**make_row(7), "response": None}, make_row(8, None, error="no selection in the model's output 'x'; expected [1], [2] or None"),
    ], [
        make_row(9, None, error="no selection in the model's output for the last window"), make_row(10, None, error="disk full"),
        make_row(11, None, error="the question alone is longer than --max-model-len 100: 'what'"),
        make_row(12, None, error="a prompt of 90 tokens does not leave 32 (--answer-max-tokens) within --max-model-len 100"),
        make_row(13, None, error="no answer in the model's output: cut off after 32 tokens"),
        make_row(14, None, error="refused by the server: content filter"),
    ])
    found = run("r.jsonl", eval_file=ask(17))["r"]
    assert found["unanswered_by_reason"] == {"no_selection": 2, "no_answer": 1, "question_too_long": 2, "refused": 1, "missing": 3, "other": 2}
    assert (found["n"], found["unanswered"]) == (17, 11)
    assert capsys.readouterr().out.count("unanswered") == 1, "one column of the table"
    write("all.jsonl", RIGHT)
    assert run("all.jsonl")["all"]["unanswered_by_reason"] == dict.fromkeys(("no_selection", "no_answer", "question_too_long", "refused", "missing", "other"), 0)


def test_rows_that_a_run_could_not_answer_have_a_reason_that_is_known():
    """The stages themselves make the rows, with a stub for the model."""

    class Engine:
        def fits(self, messages, max_tokens):
            return "too long" not in messages[-1]["content"]

        def complete(self, requests):
            return [Completion(["prose"], 1, 1) for _ in requests]

    docs = [{"id": "d", "title": "", "text": "x"}]
    rows = [make_row(1, None, docs=docs), make_row(2, None, docs=docs, question="this is too long")]
    caller = RequestBuilder(Engine(), CallOptions())
    by_windows = partial(top_inference.answer_rows, topn=10, window_size=5, order="final")
    for answer in (partial(inference.answer_rows, selector="dynamic", topn=5, path="q.jsonl"), by_windows):
        work = partial(answer, builders=(caller, caller))
        found = work_on_fitting(rows, (caller, caller), work, fail_unanswered)
        assert [unanswered_reason(row) for row in found] == ["no_selection", "question_too_long"]


# ---------------------------------------------------------------- what is scored


def test_rows_without_gold_answers_are_left_out_and_counted():
    write("r.json", [*RIGHT, make_row(7, answers=[]), make_row(8, answers=["", " "])])
    found = run("r.json")["r"]
    assert (found["n"], found["score"], found["without_gold_answer"]) == (6, 100.0, 2)


def test_nothing_to_score_against_is_an_error():
    write("r.json", [make_row(1, answers=[])])
    with pytest.raises(UserError, match=at("r.json")):
        run("r.json")


def test_the_remain_file_given_is_the_one_read():
    write("r.json", RIGHT, FAILED)
    write("other.json", FAILED[:1])
    assert run("r.json", remain_file="other.json")["r"]["n"] == 7


def test_a_remain_file_that_is_gone_is_an_error_and_not_a_better_score():
    write("r.json", RIGHT, FAILED)
    Path("remain_r.json").unlink()
    with pytest.raises(UserError, match=at("remain_r.json")):
        run("r.json")


@pytest.mark.parametrize("response", [None, 5, ["gold", "gold"], [], [5], {"text": "gold"}])
def test_a_response_that_is_not_a_string_is_no_answer(response):
    write("r.json", [{**make_row(1), "response": response}, make_row(2)])
    found = run("r.json")["r"]
    assert (found["n"], found["score"], found["unanswered"]) == (2, 50.0, 1)


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("row", "metric", "score"),
    [
        ({"dataset": "nq"}, "em", 0.0), ({"dataset": "popqa"}, "match", 100.0), ({}, "em", 0.0), ({"dataset": "unheard of"}, "em", 0.0),
        ({"dataset": "fever"}, "accuracy", 100.0), ({"dataset": "eli5"}, "rouge", 50.0),
        ({"dataset": "asqa", "qa_pairs": [{"short_answers": ["gold"]}, {"short_answers": ["silver"]}]}, "str_em", 50.0),
    ],
)
def test_without_a_metric_every_row_is_scored_by_its_data_sets_own(row, metric, score):
    write("r.json", [make_row(1, "gold it is", **row)])
    found = run("r.json")["r"]
    assert (found["metric"], found["score"]) == (metric, pytest.approx(score))


def test_the_data_set_may_come_from_the_id_the_file_name_or_the_flag():
    write("fever.json", [{**make_row(1, "gold it is")}])
    assert run("fever.json")["fever"]["metric"] == "accuracy"
    write("r.json", [{**make_row(1, "gold it is"), "id": "nq_1"}])
    assert run("r.json")["r"]["metric"] == "em"
    assert run("r.json", dataset="popqa")["r"]["metric"] == "match"


def test_a_metric_given_is_used_for_every_row():
    write("r.json", [make_row(1, "gold it is", dataset="nq"), make_row(2, "gold it is", dataset="fever")])
    assert run("r.json")["r"]["metric"] == "accuracy+em"
    found = run("r.json", metric="match")["r"]
    assert (found["metric"], found["score"]) == ("match", 100.0)


def test_an_unknown_metric_is_refused(capsys):
    with pytest.raises(SystemExit):
        run("r.json", metric="bleu")
    assert names(capsys.readouterr().err, "--metric", "'bleu'")


# ---------------------------------------------------------------- cost, groups, table


def test_documents_are_means_over_what_was_answered_and_costs_over_what_was_asked():
    usage = {"calls": 2, "prompt_tokens": 100, "generated_tokens": 7}
    write("r.json", [
        make_row(1, id_list=[1, 2, 3], usage=usage), make_row(2, id_list=[], usage={**usage, "calls": 4}), *FAILED,
        make_row(3, None, usage={**usage, "calls": 90}),
    ])
    found = run("r.json")["r"]
    assert (found["documents"], found["none_share"]) == (1.5, 0.5)
    assert (found["calls"], found["prompt_tokens"], found["generated_tokens"]) == (32, 100, 7)
    assert found["calls_known"] == 3 and found["n"] == 3 + len(FAILED)


def costs_shown(capsys) -> list[list[str]]:
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[dict(zip(header, line, strict=True))[column] for column in ("calls", "prompt tokens", "generated tokens")] for line in lines]


def test_a_cost_that_is_not_known_is_no_zero_and_in_no_mean(capsys):
    usage = {"calls": 2, "prompt_tokens": 100, "generated_tokens": 8}
    write("mixed.json", [make_row(1, usage=usage), make_row(2, usage={**usage, "prompt_tokens": None}), make_row(3, usage=None)])
    write("unknown.json", [make_row(n, usage={"calls": 2, "prompt_tokens": None, "generated_tokens": None}) for n in (1, 2)])
    write("foreign.json", [make_row(1)])
    found = run("mixed.json", "unknown.json", "foreign.json")
    assert [found[name]["prompt_tokens"] for name in ("mixed", "unknown", "foreign")] == [100, None, None]
    assert [found[name]["prompt_tokens_known"] for name in ("mixed", "unknown", "foreign")] == [1, 0, 0]
    assert costs_shown(capsys) == [["2.0 (of 2)", "100 (of 1)", "8.0 (of 2)"], ["2.0", "", ""], ["", "", ""]]


def test_documents_are_not_counted_as_none_where_a_row_does_not_say(capsys):
    write("r.json", [{"id": "1", "question": "?", "answers": ["gold"], "response": "gold"}])
    assert run("r.json")["r"]["documents_known"] == 0
    header, _, line = table(capsys.readouterr().out)
    assert [dict(zip(header, line, strict=True))[column] for column in ("score", "documents", "None")] == ["100.0", "", ""]
    write("r.json", [make_row(1, id_list=[1, 2]), {**make_row(2), "id_list": None, "final_docs": []}, {**make_row(3), "id_list": None}])
    found = run("r.json")["r"]
    assert (found["documents"], found["documents_known"], found["none_share"]) == (1.0, 2, 0.5)


def test_scores_are_broken_down_by_any_key():
    write("r.json", [make_row(1, kind="a"), make_row(2, "bad", kind="a"), make_row(3, kind="b", id_list=[1, 2])])
    groups = run("r.json", group_by="kind")["r"]["groups"]
    assert {name: (group["n"], group["score"], group["documents"]) for name, group in groups.items()} == {
        "a": (2, 50.0, 1), "b": (1, 100.0, 2),
    }


def test_several_runs_make_one_table(capsys):
    write("one.json", RIGHT + WRONG, FAILED)
    write("two.json", [make_row(1, id_list=[1, 2], dataset="nq"), make_row(2, "bad", dataset="fever")])
    results = run("one.json", "two.json", output_file="deep/m.json", table_file="t.md")
    assert list(results) == ["one", "two"]
    printed = capsys.readouterr().out
    assert printed == Path("t.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    assert lines[0][:5] == ["system", "n", "score", "95 %", "metric"]
    assert lines[2][:3] == ["one", "10", "60.0"] and lines[2][4] == "em"
    assert lines[3][:3] == ["two", "2", "50.0"] and lines[3][4] == "accuracy+em"
    assert lines[4] == ["system", "(em)", "fever (accuracy)", "nq (em)"]
    assert lines[7] == ["two", "", "0.0 (1.0)", "100.0 (2.0)"]
    assert len({len(line) for line in printed.splitlines()[:4]}) == 1, "columns line up"


def test_runs_of_the_same_name_in_different_folders_stay_apart():
    for folder, response in (("a", "gold"), ("b", "bad")):
        Path(folder).mkdir()
        write(f"{folder}/nq.json", [make_row(1, response)])
    scores = {name: found["score"] for name, found in run("a/nq.json", "b/nq.json").items()}
    assert sorted(scores.values()) == [0.0, 100.0]


def test_equal_seeds_give_an_equal_interval():
    write("r.json", RIGHT + WRONG)
    one, two, other = run("r.json"), run("r.json"), run("r.json", seed=7)
    assert one == two
    assert one["r"]["score"] == other["r"]["score"]
    assert 0 < one["r"]["low"] < 75 < one["r"]["high"] <= 100


def test_what_was_scored_is_named_in_the_metrics_file():
    write("r.json", RIGHT)
    run("r.json", metric="f1")
    assert json.loads(Path("r.json.metrics.json").read_text())["arguments"]["metric"] == "f1"


# ---------------------------------------------------------------- files and progress


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("stage", [evaluate, evaluate_retrieval])
def test_outputs_are_there_whole_or_as_they_were(stage, failing, monkeypatch):
    """The disk is full at the first file (the metrics) or at the second (the table)."""
    write("r.json", [make_row(1, docs=[{"id": "d", "title": "", "text": "gold"}])])
    flags = ["--results_file", "r.json", "--output_file", "out/m.json", "--table_file", "tables/t.md"]
    stage.main(flags)
    before = {path: path.read_bytes() for path in (Path("out/m.json"), Path("tables/t.md"))}
    synced = []
    write("r.json", [make_row(n, "bad", docs=[{"id": "d", "title": "", "text": "x"}]) for n in range(5)])

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == failing:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dynamicrag.files.atomic.os.fsync", full)
        with pytest.raises(OSError, match=rf"Errno {errno.ENOSPC}\b"):
            stage.main(flags)
    assert [path.read_bytes() == content for path, content in before.items()] == [failing == 1, True]
    assert sorted(path.name for folder in ("out", "tables") for path in Path(folder).iterdir()) == ["m.json", "t.md"]
    stage.main(flags)
    assert all(path.read_bytes() != content for path, content in before.items())


@pytest.mark.parametrize(("flag", "path"), [("output_file", "r.json"), ("table_file", "./r.json"), ("output_file", "asked.jsonl"), ("table_file", "left.json")])
def test_an_input_is_not_overwritten(flag, path):
    write("r.json", RIGHT), write("left.json", FAILED), ask(10)
    with pytest.raises(UserError, match=at(path)):
        run("r.json", remain_file="left.json", eval_file="asked.jsonl", **{flag: path})
    assert len(json.loads(Path("r.json").read_text())) == len(RIGHT)


def test_a_link_to_itself_and_one_path_for_both_outputs_are_refused():
    write("r.json", RIGHT), Path("loop.json").symlink_to("loop.json")
    with pytest.raises(UserError, match=at("loop.json", os.strerror(errno.ELOOP))):
        run("loop.json")
    with pytest.raises(UserError, match=at("./m.json")):
        run("r.json", output_file="m.json", table_file="./m.json")


def last_bar(text: str) -> str:
    return next(line for line in reversed(re.split(r"[\r\n]", text)) if "rows" in line)


def test_reading_shows_a_rate_and_how_many_rows_there_will_be(capsys):
    write("r.json", RIGHT, FAILED)
    run("r.json")
    assert re.search(r"^r: 8 rows \[.* rows/s\]", last_bar(capsys.readouterr().err)), "no total known"
    manifest = json.loads(Path("r.json.manifest.json").read_text())
    Path("r.json.manifest.json").write_text(json.dumps({**manifest, "counts": {"rows": 8, "answered": 6, "unanswered": 2}}))
    run("r.json")
    assert re.search(r"^r: 100%.* 8/8 .* rows/s\]", last_bar(capsys.readouterr().err)), "what the run's manifest counted"
    run("r.json", eval_file=ask(12))
    assert re.search(r"^r: 100%.* 12/12 .* rows/s\]", last_bar(capsys.readouterr().err)), "what was asked"


def test_the_questions_asked_are_read_once_for_all_runs(monkeypatch):
    read = []
    monkeypatch.setattr(result_files, "read_rows", lambda path, *args, real=result_files.read_rows, **more: (read.append(path), real(path, *args, **more))[1])
    write("a.json", RIGHT), write("b.json", RIGHT), write("c.json", RIGHT)
    run("a.json", "b.json", "c.json", eval_file=ask(6))
    assert sorted(map(str, read)) == ["a.json", "asked.jsonl", "b.json", "c.json"]


# ---------------------------------------------------------------- comparison


def compared(*files: str, **flags) -> dict:
    evaluate.main(["--results_file", *files, "--compare", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))])
    return json.loads(Path(f"{files[0]}.metrics.json").read_text())["compared"]


def test_the_first_run_is_compared_with_each_other_question_by_question(capsys):
    better = [make_row(n, "gold" if n % 4 else "bad") for n in range(100)]
    worse = [make_row(n, "gold" if n % 2 else "bad") for n in range(100)]
    write("a.json", better), write("b.json", worse[::-1]), write("c.json", better)
    found = compared("a.json", "b.json", "c.json")
    assert found["b"]["n"] == 100 and found["b"]["difference"] == pytest.approx(25)
    assert 15 < found["b"]["low"] < 25 < found["b"]["high"] < 35 and found["b"]["p"] < 0.001
    assert found["c"] == {"n": 100, "difference": 0, "low": 0, "high": 0, "p": 1, "metric": "em"}
    assert {line[0] for line in table(capsys.readouterr().out)} >= {"b", "c"}


def test_only_the_same_questions_are_compared():
    write("a.json", RIGHT), write("b.json", RIGHT[:4])
    with pytest.raises(UserError, match=naming("a", "b", 2, "q5", "--eval_file")):
        compared("a.json", "b.json")
    write("asked.json", [make_row(n, None) for n in range(1, 7)])
    assert compared("a.json", "b.json", eval_file="asked.json")["b"]["difference"] == pytest.approx(100 / 3), "missing ones are wrong"
    with pytest.raises(UserError, match=naming("--compare")):
        compared("a.json")


# ---------------------------------------------------------------- the published evaluation files, by their names

DOCUMENT = {"title": "Georges Bizet", "text": "Bizet wrote the opera Carmen.", "hasanswer": True}
PUBLISHED = {  # file: the further keys of its rows, and the metric of the data set
    "triviaqa.json": ({"id": "qw_1934", "answers": ["Bizet"]}, "Bizet", "em"),
    "nq.json": ({"id": "0", "answers": ["Bizet"]}, "bizet", "em"),
    "hotpotqa.json": ({"id": "5a8b57f25542995d1e6f1371", "answers": ["yes"]}, "Yes", "em"),
    "2wikimqa.json": ({"id": "8813f87c0bdd11eba7f7acde48001122", "answers": ["Georges Bizet"]}, "Georges Bizet", "em"),
    "fever.json": ({"id": "75397", "answers": ["NOT ENOUGH INFO"]}, "NOT ENOUGH INFO", "accuracy"),
    "eli5.json": ({"id": "32wvn8", "answers": ["Because he was paid for it."]}, "Because he was paid for it.", "rouge"),
    "asqa_eval_gtr_top100.json": (
        {"sample_id": "-1", "qa_pairs": [{"question": "who?", "short_answers": ["Bizet", "Georges Bizet"]}], "answer": "It was Bizet."}, "It was Bizet.", "str_em",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("bare", [True, False])
def test_each_published_evaluation_file_has_its_own_metric_without_a_flag(name, bare):
    row, response, metric = PUBLISHED[name]
    documents = {"docs" if "sample_id" in row else "ctxs": [DOCUMENT]}
    write(name, [{**row, "question": "who wrote the opera carmen", **documents}])
    answered = {"id": row.get("id", row.get("sample_id")), "response": response}
    write(f"llama3_8b_{name}", [answered if bare else {**row, "question": "who wrote the opera carmen", **documents, **answered}])
    found = run(f"llama3_8b_{name}", eval_file=name)[f"llama3_8b_{Path(name).stem}"]
    assert (found["metric"], found["score"], found["n"]) == (metric, pytest.approx(100.0), 1)


# ---------------------------------------------------------------- results that are not what they seem


def test_answers_to_the_questions_of_another_set_are_refused():
    """In FlashRAG's files the first row of every set has the id test_0."""
    write("nq.jsonl", [{"id": "test_0", "question": "who wrote carmen", "answers": ["Bizet"]}])
    write("popqa.jsonl", [{"id": "test_0", "question": "What is the capital of France?", "answers": ["Paris"], "response": "Paris"}])
    with pytest.raises(UserError, match=at("popqa.jsonl", "test_0", "nq.jsonl")):
        run("popqa.jsonl", eval_file="nq.jsonl")
    write("own.jsonl", [{"id": "test_0", "question": " Who wrote  Carmen", "answers": ["Bizet"], "response": "Bizet"}])
    assert run("own.jsonl", eval_file="nq.jsonl")["own"]["score"] == 100.0


@pytest.mark.parametrize("answer", [{}, {"prediction": "gold"}])
def test_a_file_without_responses_is_refused_with_its_keys(answer):
    rows = [{key: value for key, value in make_row(n).items() if key != "response"} | answer for n in (1, 2)]
    with pytest.raises(UserError, match=at("r.jsonl", "'response'", *answer)):
        run(write("r.jsonl", rows))


def test_some_rows_without_a_response_count_as_wrong_and_are_warned_of(caplog):
    bare = {key: value for key, value in make_row(2).items() if key != "response"}
    found = run(write("r.jsonl", [make_row(1), bare]))["r"]
    assert (found["n"], found["score"], found["unanswered"]) == (2, 50.0, 1)
    assert logged(caplog, "r.jsonl", "'response'") == 1


def test_the_reasoning_in_foreign_responses_is_not_scored(caplog):
    responses = ["<think>bad</think>gold", "<think>gold</think>bad", "gold</think> bad", "<think>gold"]
    found = run(write("r.jsonl", [make_row(n, response) for n, response in enumerate(responses, start=1)]), metric="match")["r"]
    assert (found["n"], found["score"]) == (4, 25.0) and found["unanswered_by_reason"]["no_answer"] == 1
    assert logged(caplog, "r.jsonl", 4) == 1
