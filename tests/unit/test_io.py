"""Files: which ones are read, which ones are refused, and that an interruption loses nothing."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import at, naming, read_jsonl, write_jsonl
from copying_stage import (
    ROWS,
    Killed,
    arguments,
    check_that_a_second_run_is_refused,
    check_that_workers_take_turns,
    put,
    run_stage,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamicrag import stage
from dynamicrag.files import jsonio
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.jsonio import read_json, write_json
from dynamicrag.rows import output
from dynamicrag.rows.manifest import differences, read_manifest
from dynamicrag.rows.output import Output
from dynamicrag.rows.records import count_rows, normalise_row, read_rows
from dynamicrag.rows.row import RowError
from dynamicrag.rows.tasks import derive_dataset
from dynamicrag.stage import UserError

# ---------------------------------------------------------------- jsonio


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt"])
@pytest.mark.parametrize("content", [
    '[{"a": 1}, {"a": "é\\n"}]', '\n [\n{"a": 1}\n,{"a": "é\\n"}\n]\n', '{"a": 1}\n{"a": "é\\n"}', '{"a": 1}\r\n\r\n{"a": "é\\n"}\r\n',
    '\ufeff{"a": 1}\n{"a": "é\\n"}\n', '\ufeff[{"a": 1},\r\n{"a": "é\\n"}]\r\n',
])
def test_reads_by_content_not_by_suffix(tmp_path, name, content):
    assert values(put(tmp_path / name, content)) == [{"a": 1}, {"a": "é\n"}]


def test_lines_are_where_a_value_starts(tmp_path):
    assert list(read_json(put(tmp_path / "a", '[\n{"a":\n1},\n\n{"a": 2},{"a": 3}]'))) == [(2, {"a": 1}), (5, {"a": 2}), (5, {"a": 3})]
    assert list(read_json(put(tmp_path / "b", '{"a": 1}\n\n{"a": 2}\n'))) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize("content, line", [
    ("", None), ("\ufeff \n", None), ('{"a": 1}\n{"a": NaN}\n', 2), ('{"a": 1}\n{"a": \n', 2), (b'{"a": 1}\n{"a": "\xff"}\n', 2),
    ('[{"a": 1},\n{"a": NaN}]', 2), ('[{"a": 1},\n{"a": -Infinity}]', 2), ('[{"a": 1}\n{"a": 2}]', 2), ('[{"a": 1},\n', 2), ('[{"a": 1},\n]', 2),
    ('[{"a": 1}]\n[2]', None), ('[{"a": 1},\n{"a": "', 2), (b'[{"a": 1},\n{"a": "\xff"}]', None), ('[{"a": 1},\n{"a": "\\ud800"}]', 2),
    ('{"a": 1}\n{"a": "\\ud800"}\n', 2), ("[" * 100_000, None), ("hello\n", 1),
])
def test_broken_files_are_named_with_the_line(tmp_path, content, line):
    path = put(tmp_path / "rows.json", content)
    with pytest.raises(UserError, match=f"rows.json:{line}:" if line else "rows.json"):
        values(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nothing_here"):
        values(tmp_path / "nothing_here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(JSON, min_size=1, max_size=8), indent=st.sampled_from([None, 1]), size=st.integers(1, 40))
def test_arrays_cut_anywhere_read_the_same(tmp_path_factory, rows, indent, size):
    """Each read of the file ends at another place of an element."""
    path = put(tmp_path_factory.mktemp("cut") / "a.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    original, jsonio.READ_BYTES = jsonio.READ_BYTES, size
    try:
        assert values(path) == rows
    finally:
        jsonio.READ_BYTES = original


def test_elements_larger_than_a_read(tmp_path):
    rows = [{"text": "x" * 3_000_000}, {"text": "é" * 1_200_000, "n": 1}, {"text": ""}]
    assert values(put(tmp_path / "a.json", json.dumps(rows))) == rows
    assert values(put(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)))) == rows


def test_long_arrays_do_not_cost_more_a_row(tmp_path):
    """A megabyte of short elements takes less than a second, since no element copies the rest of the text."""

    path = put(tmp_path / "a.json", json.dumps([{"id": number} for number in range(60_000)]))
    began = time.process_time()
    assert len(values(path)) == 60_000
    assert time.process_time() - began < 2


@pytest.mark.parametrize("rows", [[], [{"a": 1}], [{"b": "é", "a": 1}, {"a": None}]])
def test_writes_by_suffix(tmp_path, rows):
    assert write_json(tmp_path / "a.json", iter(rows)) == write_json(tmp_path / "a.jsonl", iter(rows)) == len(rows)
    assert json.loads((tmp_path / "a.json").read_text()) == rows
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl"]


# ---------------------------------------------------------------- atomic


def write(path, content, then=None):
    with atomic_writer(path) as file:
        file.write(content)
        assert path.name + ".writing" in os.listdir(path.parent)
        if then is not None:
            raise then


def test_a_file_is_replaced_whole(tmp_path):
    put(tmp_path / "a.bin.writing", "left behind by a kill, and longer")
    for content in (b"one", b"another"):
        write(tmp_path / "a.bin", content)
        assert (tmp_path / "a.bin").read_bytes() == content and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [UserError("wrong"), OSError("no space"), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    for before in ([], ["a.bin"]):
        with pytest.raises(type(error)) as raised:
            write(tmp_path / "a.bin", b"half", error)
        assert raised.value is error and os.listdir(tmp_path) == before
        put(tmp_path / "a.bin", "old")
        assert (tmp_path / "a.bin").read_text() == "old"


def test_a_place_that_cannot_be_taken_is_said_and_left_as_it_was(tmp_path):
    (tmp_path / "folder").mkdir()
    put(tmp_path / "folder" / "precious", "x")
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder", b"x")
    (tmp_path / "b.writing").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "b", b"x")
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "nowhere" / "c", b"x")
    assert sorted(os.listdir(tmp_path)) == ["b.writing", "folder"] and os.listdir(tmp_path / "folder") == ["precious"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_that_fail_in_the_middle_leave_the_old_file(tmp_path, name):
    def rows():
        yield {"a": 1}
        raise UserError("rows:2: broken")

    put(tmp_path / name, "old")
    with pytest.raises(UserError, match=at("rows:2")):
        write_json(tmp_path / name, rows())
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "old"


# ---------------------------------------------------------------- records


def test_rows_come_in_one_form(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [
        {"id": 7, "question": "q", "answer": "Paris", "ctxs": [{"id": 12, "text": "t", "score": "1.5"}], "extra": [1]},
        {"sample_id": "s", "question": "q", "golden_answers": ["a", "b"], "docs": [{"title": None, "text": "t"}]},
        {"id": "r", "question": "q", "qa_pairs": [{"short_answers": ["x", "y"]}, {"short_answers": ["y", "z"]}]},
        {"id": "t", "question": "q", "output": "a", "dataset": "nq"}, {"_id": "5a7a", "question": "q"}, {"question_id": "tc_1", "question": "q"},
    ])
    first, second, third, fourth, fifth, sixth = read_rows(path)
    assert (fifth["id"], sixth["id"], sixth["dataset"]) == ("5a7a", "tc_1", "triviaqa")
    assert first["id"] == "7" and first["answers"] == ["Paris"] and first["extra"] == [1] and "ctxs" not in first
    assert first["docs"] == [{"id": "12", "title": "", "text": "t", "score": 1.5}]
    assert second["id"] == "s" and second["answers"] == ["a", "b"] and second["docs"][0]["id"] == "doc1"
    assert third["answers"] == ["x", "y", "z"]
    assert fourth["answers"] == ["a"] and fourth["dataset"] == "nq"
    assert "dataset" not in first


@pytest.mark.parametrize("row, key", [
    ({"question": "q"}, "id"), ({"id": "", "question": "q"}, "id"), ({"id": True, "question": "q"}, "id"), ({"id": "a"}, "question"),
    ({"id": "a", "question": " "}, "question"), ({"id": "a", "question": 3}, "question"), ([1], "whole row"),
    ({"id": "a", "question": "q", "answers": [1]}, "answers"), ({"id": "a", "question": "q", "answer": {"x": 1}}, "answer"),
    ({"id": "a", "question": "q", "docs": "d"}, "docs"), ({"id": "a", "question": "q", "ctxs": [{"title": "t"}]}, r"ctxs\[0\].text"),
    ({"id": "a", "question": "q", "docs": [{"text": "t", "title": 4}]}, r"docs\[0\].title"),
    ({"id": "a", "question": "q", "docs": [{"text": "t", "score": "nan"}]}, r"docs\[0\].score"),
    ({"id": "a", "question": "q", "docs": [{"text": "t", "score": "high"}]}, r"docs\[0\].score"),
    ({"id": "a", "question": "q", "docs": ["t"]}, r"docs\[0\]"), ({"id": "a", "question": "q", "qa_pairs": [3]}, "qa_pairs"),
    ({"id": "a", "question": "q", "dataset": 3}, "dataset"),
])
def test_malformed_rows_are_named_or_set_aside(tmp_path, row, key):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": "good", "question": "q"}, row])
    with pytest.raises(UserError, match=f"rows.jsonl:2: key '\\(?(the )?{key}"):
        list(read_rows(path))
    aside = []
    assert [row["id"] for row in read_rows(path, reject=aside.append)] == ["good"]
    assert aside[0]["line"] == 2 and aside[0]["row"] == row
    assert count_rows(path, skip_malformed=True) == 1


TRIVIAQA = {"value": "40 km", "aliases": ["40km", "40 km"], "normalized_aliases": ["40 km", "forty km"], "type": "Numerical"}


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ({"answers": '["politician", "political leader"]'}, ["politician", "political leader"]), ({"answers": "['Jane Roe', \"O'Brien\"]"}, ["Jane Roe", "O'Brien"]),
        ({"possible_answers": '["politician", "leader"]'}, ["politician", "leader"]), ({"possible_answers": ["a", "b"], "obj": "c"}, ["a", "b"]),
        ({"golden_answers": ['["a", "b"]']}, ["a", "b"]), ({"answers": ["['a', 'b']", "c"]}, ["a", "b", "c"]), ({"answer": ' [ "a" ]\n'}, ["a"]),
        ({"answer": TRIVIAQA}, ["40 km", "40km", "forty km"]), ({"answer": json.dumps(TRIVIAQA)}, ["40 km", "40km", "forty km"]), ({"answer": {"value": "x"}}, ["x"]),
        ({"answer": "Paris", "answer_aliases": ["City of Light", "Paris"]}, ["Paris", "City of Light"]), ({"answers": ["a", "a"], "answer_aliases": '["b"]'}, ["a", "a", "b"]),
        ({"answer_aliases": ["b"]}, ["b"]), ({"answers": [], "answer": "x"}, ["x"]), ({"answers": None, "answer": "", "golden_answers": ["y"]}, ["y"]),
        ({"answers": [], "qa_pairs": [{"short_answers": ["x"]}]}, ["x"]), ({"answerKey": "B"}, ["B"]), ({"answer": "long", "qa_pairs": [{"short_answers": ["x"]}]}, ["long"]),
        ({"answer": "('a', 'b')"}, ["a", "b"]), ({"answer": "{'b', 'a'}"}, ["a", "b"]), ({"answer": "(C)"}, ["(C)"]), ({"answer": "(1, 2)"}, ["(1, 2)"]),
        ({"answers": ["[0, 1]"]}, ["[0, 1]"]), ({"answers": ["[citation needed]"]}, ["[citation needed]"]), ({"answer": "{1, 2}"}, ["{1, 2}"]), ({"answer": "[3], [1]"}, None),
        ({"answers": "[] or not"}, ["[] or not"]), ({"answers": "[]"}, []), ({"answers": []}, []), ({"answers": [""]}, [""]),
    ],
)
def test_answers_are_read_in_the_forms_of_the_fields_files(given, answers):
    row = {"id": "1", "question": "q", **given}
    if answers is None:
        with pytest.raises(RowError, match=at("key 'answer'")):
            normalise_row(row)
        return
    read = normalise_row(row)
    assert read["answers"] == answers
    assert normalise_row(read) == read


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"answers": "['Jane Roe' 'J. Roe']"}, "answers"),  # numpy writes a list in this way; Python reads it as one string
        ({"answers": "[politician, leader]"}, "answers"), ({"answer": "[1945]"}, "answer"), ({"possible_answers": "['a', nan]"}, "possible_answers"), ({"answer": "['a'"[:-1] + "]"}, "answer"),
        ({"answer": {"aliases": ["x"]}}, "answer"), ({"answer": {"value": "x", "aliases": [1]}}, "answer"), ({"answer": '{"aliases": ["x"]}'}, "answer"), ({"answer": 5}, "answer"),
        ({"answers": [["a"], ["b"]]}, "answers"), ({"answers": [["a"]]}, "answers"), ({"answer": "x", "answer_aliases": [1]}, "answer_aliases"),
        ({"answer": "[" * 3000 + "]" * 3000}, "answer"), ({"answer": f"[{'1,' * 100_000}]"}, "answer"), ({"answer": "[{[1]: 2}]"}, "answer"),
    ],
)
def test_answers_that_cannot_be_read_are_named_by_their_key_and_never_taken_for_text(given, key):
    with pytest.raises(RowError, match=f"^key '{key}': "):
        normalise_row({"id": "1", "question": "q", **given})


LITERALS = st.lists(st.sampled_from(["[", "]", "{", "}", "(", ")", "'", '"', "a", "\\", ",", ":", "value", "1", " ", "\n", "#", "nan", "é", "-"]), max_size=12).map("".join)


@given(answer=LITERALS | LITERALS.map("[{}]".format) | LITERALS.map("['{}']".format) | LITERALS.map('{{"value": "{}"}}'.format), listed=st.booleans())
def test_any_answer_is_read_or_refused_and_is_then_in_the_projects_form(answer, listed):
    try:
        row = normalise_row({"id": "1", "question": "q", "answers": [answer] if listed else answer})
    except RowError as error:
        assert str(error).startswith("key 'answers': ")
        return
    assert all(isinstance(one, str) for one in row["answers"])
    assert normalise_row(row) == row


@pytest.mark.parametrize(("given", "key"), [({"answer": None}, "answer"), ({"answer": []}, "answers"), ({"answer": ""}, "answers"), ({"answers": ["", " "]}, "answers"), ({}, "answers")])
def test_where_answers_are_needed_their_absence_is_named(given, key):
    with pytest.raises(RowError, match=at(f"key '{key}'")):
        normalise_row({"id": "1", "question": "q", **given}, ("answers",))


@pytest.mark.parametrize(
    ("doc", "read"),
    [
        ({"doc": "a b"}, ("doc2", "", "a b")), ({"passage_text": "a b", "title": "T", "passage_id": 7}, ("7", "T", "a b")), ({"contents": '"The Title"\na\nb', "docid": "d"}, ("d", "The Title", "a\nb")),
        ({"contents": "a b", "_id": "w"}, ("w", "", "a b")), ({"contents": '"Other"\na b', "title": "T"}, ("doc2", "T", '"Other"\na b')), ({"contents": "x", "text": "a b", "psg_id": "1"}, ("1", "", "a b")),
        ({"text": None, "doc": "a b", "id": None, "docid": 3}, ("3", "", "a b")), ({"text": "", "contents": "a b"}, ("doc2", "", "")),
    ],
)
def test_documents_are_read_in_the_forms_of_the_fields_files(doc, read):
    row = normalise_row({"id": "1", "question": "q", "ctxs": [{"text": "t"}, doc]})
    assert tuple(row["docs"][1][key] for key in ("id", "title", "text")) == read
    assert normalise_row(row) == row


@pytest.mark.parametrize(("doc", "key"), [({"title": "t"}, "text"), ({"doc": 5}, "doc"), ({"contents": ["a"]}, "contents"), ({"passage_text": None}, "text")])
def test_a_document_without_text_is_named(doc, key):
    with pytest.raises(RowError, match=at(f"key 'ctxs[0].{key}'")):
        normalise_row({"id": "1", "question": "q", "ctxs": [doc]})


@pytest.mark.parametrize("choices", [{"text": ["friction", "gravity"], "label": ["A", "B"]}, ["friction", "gravity"]])
@pytest.mark.parametrize("dataset", [{"dataset": "arc"}, {}])
def test_choices_are_part_of_the_question_and_not_of_what_is_searched_with(choices, dataset):
    row = normalise_row({"id": "1", "question": "Which force?", "choices": choices, **dataset})
    assert (row["question"], row["retrieved_question"]) == ("Which force?\nA: friction\nB: gravity", "Which force?")
    assert normalise_row(row) == row and row["choices"] == choices
    assert normalise_row({**row, "retrieved_question": "force"})["retrieved_question"] == "force"
    shown = normalise_row({"id": "1", "question": "Which force? (A) friction (B) gravity", "choices": choices})
    assert shown["question"] == "Which force? (A) friction (B) gravity" and "retrieved_question" not in shown


def test_choices_of_no_known_form_are_named_where_they_are_needed():
    row = {"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A", "B"]}}
    assert normalise_row(row)["question"] == "q", "elsewhere it is a key of another meaning"
    with pytest.raises(RowError, match=at("key 'choices'")):
        normalise_row({**row, "dataset": "ARC-Challenge"})


def test_a_response_in_a_list_of_one_is_that_response():
    assert normalise_row({"id": "1", "question": "q", "response": ["Paris"]})["response"] == "Paris"
    assert normalise_row({"id": "1", "question": "q", "response": ["Paris", "Rome"]})["response"] == ["Paris", "Rome"]


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("flashrag/asqa/dev.jsonl", "asqa"), ("flashrag/2wikimultihopqa/test.jsonl", "2wikimqa"), ("NQ/train.jsonl", "nq"), ("PopQA/Test.jsonl", "popqa"), ("nq/questions.jsonl", None),
        ("my_nq/test.jsonl", None), ("asqa/fever.jsonl", "fever"), ("asqa/old/dev.jsonl", None), ("ARC-Challenge.jsonl", "arc"), ("asqa_eval_gtr_top100.json", "asqa"),
        ("research/search_arc.jsonl", None),
    ],
)
def test_the_folder_names_the_data_set_of_a_file_that_names_a_split(tmp_path, monkeypatch, name, dataset):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, [{"id": "test_0", "question": "q", "golden_answers": ["a"]}])
    assert next(read_rows(path)).get("dataset") == dataset
    monkeypatch.chdir(path.parent)
    assert next(read_rows(path.name)).get("dataset") == dataset, "however the path is written"


def test_data_sets_are_called_by_one_name_and_readings_are_asqas():
    assert normalise_row({"id": "1", "question": "q", "dataset": "ARC-Challenge"})["dataset"] == "arc"
    assert normalise_row({"id": "1", "question": "q", "dataset": "nq"}, dataset="TriviaQA")["dataset"] == "triviaqa"
    assert normalise_row({"id": "1", "question": "q", "dataset": "My Own"})["dataset"] == "My Own"
    readings = {"id": "1", "question": "q", "qa_pairs": [{"short_answers": ["a"]}]}
    assert normalise_row(readings)["dataset"] == "asqa" and normalise_row({**readings, "dataset": "My Own"})["dataset"] == "My Own"
    assert "dataset" not in normalise_row({**readings, "qa_pairs": [{"short_answers": [""]}]})


def test_what_a_row_does_not_say_is_taken_from_what_was_asked(tmp_path):
    asked = {"1": {"question": "q", "answers": ["a"], "dataset": "nq", "gold_docs": ["d"], "kind": "k"}}
    path = write_jsonl(tmp_path / "fever.jsonl", [{"id": 1, "response": "x"}])
    assert next(read_rows(path, asked=asked)) == {"id": "1", "response": "x", **asked["1"]}
    own = {"question": "own", "answers": ["b"], "dataset": "popqa", "gold_docs": [], "kind": "mine"}
    assert next(read_rows(write_jsonl(path, [{"id": "1", **own}]), asked=asked)) == {"id": "1", **own}
    empty = {"question": None, "golden_answers": [], "answers": [""], "positive_ctxs": [], "kind": None}
    assert next(read_rows(write_jsonl(path, [{"id": "1", **empty}]), asked=asked)) == {"id": "1", "golden_answers": [], "positive_ctxs": [], **asked["1"]}
    assert next(read_rows(write_jsonl(path, [{"id": "1", "answer": "b", "positive_ctxs": [{"id": "e"}]}]), asked=asked))["answers"] == ["b"]
    with pytest.raises(UserError, match=at("fever.jsonl:1: key 'question'")):
        next(read_rows(write_jsonl(path, [{"id": "2", "response": "x"}]), asked=asked))


def test_repeated_ids_and_missing_keys(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"id": 1, "question": "q"}, {"id": "2", "question": "q"}, {"id": "1", "question": "q"}])
    with pytest.raises(UserError, match=at("rows.jsonl:3: key 'id'", "'1'", 1)):
        list(read_rows(path))
    (tmp_path / "one_line.json").write_text('[{"id": "a", "question": "q"}, {"id": "a", "question": "q"}]')
    with pytest.raises(UserError, match=at("one_line.json:1: key 'id'", "'a'", 1)):
        list(read_rows(tmp_path / "one_line.json"))
    with pytest.raises(UserError, match=at("rows.jsonl:1: key 'docs'")):
        list(read_rows(path, needs=("docs",)))


def test_no_usable_row(tmp_path):
    with pytest.raises(UserError, match=at("a.json")):
        count_rows(put(tmp_path / "a.json", "[]"))


def test_data_set_is_never_a_guess():
    assert derive_dataset("nq_17") == "nq" and derive_dataset("tc_17") == "triviaqa" and derive_dataset("x", "hotpotqa") == "hotpotqa"
    assert derive_dataset("batch_3") is None and derive_dataset("etc_1") is None and derive_dataset("a", "nq_train_archive") is None


def test_data_set_of_a_path_with_research(tmp_path):
    folder = tmp_path / "research"
    folder.mkdir()
    path = write_jsonl(folder / "search_arc.jsonl", [{"id": "batch_3", "question": "q"}])
    assert "dataset" not in next(read_rows(path))
    assert next(read_rows(path, dataset="arc"))["dataset"] == "arc"
    assert normalise_row({"id": "nq_1", "question": "q", "dataset": "popqa"})["dataset"] == "popqa"


@pytest.mark.parametrize(("name", "dataset"), [
    ("nq_test", "nq"), ("asqa-dev", "asqa"), ("ARC-Challenge_Validation", "arc"), ("nq_train_archive", None), ("latest", None), ("my_test", None),
])
def test_a_split_after_the_name_of_a_file_does_not_count(tmp_path, name, dataset):
    assert next(read_rows(write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "test_0", "question": "q"}]))).get("dataset") == dataset


# ---------------------------------------------------------------- stage


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("tear", [b"", b'{"id": "9', b'{"id":"x"}\n{"id":"y"}\n', b'{"id":"x"}\n{"id":"y"}\n{"id'])
def test_killed_anywhere_the_bytes_are_the_same(tmp_path, suffix, tear):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    assert run_stage(whole, suffix) == 10
    for stop_after in (2, 1):
        with pytest.raises(Killed):
            run_stage(torn, suffix, stop_after, tear=tear)
    assert not (torn / f"out{suffix}").exists() and not (torn / f"out{suffix}.manifest.json").exists()
    assert run_stage(torn, suffix) == 1, "three whole chunks were kept"
    assert (torn / f"out{suffix}").read_bytes() == (whole / f"out{suffix}").read_bytes()
    assert sorted(os.listdir(torn)) == ["in.jsonl", f"out{suffix}", f"out{suffix}.manifest.json"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_killed_before_the_manifest(tmp_path, suffix, monkeypatch):
    def fail():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(output, "versions", fail)
        with pytest.raises(Killed):
            run_stage(tmp_path, suffix)
    assert (tmp_path / f"out{suffix}").exists()
    assert run_stage(tmp_path, suffix) == 1, "only the last, short chunk is done again"
    assert len(list(read_json(tmp_path / f"out{suffix}"))) == 10


def test_killed_between_whole_files(tmp_path):
    """If a stage with several files dies after the first file, the same command starts again without --overwrite."""
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    Output(arguments(), names, [str(source)]).publish(names[0], ROWS[:5])
    again = Output(arguments(), names, [str(source)])
    for name in names:
        again.publish(name, ROWS[:5])
    again.finish()
    assert Output(arguments(), names, [str(source)]).finished
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.json.manifest.json", "b.json", "b.json.manifest.json", "in.jsonl"]


def test_a_finished_output_is_left_alone(tmp_path):
    run_stage(tmp_path)
    before = (tmp_path / "out.jsonl").stat().st_mtime_ns
    assert run_stage(tmp_path) == 0 and run_stage(tmp_path, device="cuda") == 0
    assert (tmp_path / "out.jsonl").stat().st_mtime_ns == before
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["counts"] == {"rows": 10} and manifest["arguments"]["flag"] == "x" and manifest["versions"]["python"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_or_inputs_are_refused(tmp_path, finished):
    if finished:
        run_stage(tmp_path)
    else:
        with pytest.raises(Killed):
            run_stage(tmp_path, stop_after=2)
    with pytest.raises(UserError, match=naming("arguments", "flag", "'x'", "'y'")):
        run_stage(tmp_path, flag="y")
    write_jsonl(tmp_path / "in.jsonl", ROWS[:5])
    with pytest.raises(UserError, match=naming("inputs", tmp_path / "in.jsonl")):
        run_stage(tmp_path)
    assert run_stage(tmp_path, overwrite=True, flag="y") == 5
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 5


def test_a_foreign_file_is_not_replaced(tmp_path):
    put(tmp_path / "out.jsonl", "precious")
    with pytest.raises(UserError, match=at("out.jsonl", "--overwrite")):
        run_stage(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_two_runs_do_not_write_one_output(tmp_path):
    check_that_a_second_run_is_refused(tmp_path)


def test_missing_input_and_bad_folder(tmp_path):
    with pytest.raises(UserError, match=at("nothing.jsonl")):
        Output(arguments(), [str(tmp_path / "new" / "out")], [str(tmp_path / "nothing.jsonl")])
    put(tmp_path / "file", "x")
    with pytest.raises(UserError, match=at("file")):
        Output(arguments(), [str(tmp_path / "file" / "out")], [])


def test_malformed_rows_set_aside_are_not_doubled_by_a_restart(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "bad"}, *ROWS])
    for stop_after in (2, None):
        output = Output(arguments(on_error="skip"), [str(tmp_path / "out.jsonl")], [str(source)])
        for number, chunk in enumerate(output.chunks(read_rows(source, reject=output.reject), 3)):
            if number == stop_after:
                output._file.close()
                break
            output.write(chunk)
    output.finish()
    assert len(read_jsonl(tmp_path / "out.jsonl.rejected.jsonl")) == 1 and len(read_jsonl(tmp_path / "out.jsonl")) == 10
    assert read_manifest(tmp_path / "out.jsonl")["counts"]["rejected"] == 1


def test_flags_are_whole_and_dashes_are_underscores():
    parser = stage.ArgumentParser("A stage.")
    parser.add_argument("--input_file", default="a")
    stage.add_common_flags(parser)
    assert parser.parse_args(["--input-file", "b"]).input_file == parser.parse_args(["--input_file=b"]).input_file == "b"
    with pytest.raises(SystemExit):
        parser.parse_args(["--input", "b"])


def test_a_renamed_flag_keeps_its_old_name_on_the_command_line_and_in_manifests():
    for old, new in stage.RENAMED_FLAGS.items():
        parser = stage.ArgumentParser("A stage.")
        parser.add_argument(f"--{new}", type=int)
        for spelling in (old, old.replace("_", "-")):
            assert vars(parser.parse_args([f"--{spelling}", "3"])) == vars(parser.parse_args([f"--{spelling}=3"])) == {new: 3}
        now = {"arguments": {new: 3}, "inputs": {}}
        assert differences({"arguments": {old: 3}}, now) == ("inputs", {})
        assert differences({"arguments": {old: 2}}, now) == ("arguments", {new: (2, 3)})


def test_seeds_depend_on_what_they_are_for():
    assert stage.derive_seed(1, "row", "purpose") == stage.derive_seed(1, "row", "purpose") < 2**31
    assert len({stage.derive_seed(seed, row) for seed in range(50) for row in "abc"}) == 150


SCRIPT = "from dynamicrag import stage\ndef main():\n    {}\nstage.run(main)"


@pytest.mark.parametrize("body, status, said", [
    ("raise stage.UserError('in.jsonl:3: broken')", 2, "error: in.jsonl:3: broken\n"),
    ("raise KeyboardInterrupt", 130, ""),
])
def test_errors_are_one_line_and_a_status(body, status, said):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(body)], capture_output=True, text=True)
    assert done.returncode == status and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_no_line_of_the_log_and_no_error_stands_on_the_line_of_a_bar():
    """The text is compared as a terminal shows it: after a carriage return, new characters replace old ones."""
    body = ("from tqdm import tqdm; import sys\n    bar = tqdm(total=9, desc='working', mininterval=0, file=sys.stderr)\n"
            "    for n in range(3):\n        bar.update()\n        stage.log.warning('noted %d', n)\n    raise stage.UserError('broken')")
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(body)], capture_output=True, text=True)
    shown = []
    for line in done.stderr.split("\n"):
        cells = ""
        for written in line.split("\r"):
            cells = written + cells[len(written):]
        shown.append(cells.rstrip())
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in shown if re.search("noted|broken", line)] == [
        "noted 0", "noted 1", "noted 2", "error: broken",
    ]
    assert "working" in done.stderr


@pytest.mark.parametrize("script", ["split_data", "generate_passage_embeddings", "retriever", "aggregate", "reranker"])
def test_help_needs_no_heavy_import(script, request):
    """--help is fast because it imports nothing heavy. The imports are counted instead of timed, since machines differ."""
    code = (f"import sys, {script}\ntry: {script}.parse_args(['--help'])\nexcept SystemExit: pass\n"
            "sys.stderr.write(' '.join({'torch', 'transformers', 'faiss', 'datasets', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=request.config.rootpath)
    assert done.stderr == "" and "(default: " in done.stdout


def test_no_output_is_an_input_or_another_output_or_another_runs(tmp_path):
    """--overwrite would destroy the input."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "question": "q"}])
    with pytest.raises(UserError, match=at("in.jsonl")):
        Output(arguments(overwrite=True), [str(source)], [str(source)])
    assert source.exists()
    with pytest.raises(UserError, match=at("x.json")):
        Output(arguments(overwrite=True), [str(tmp_path / "x.json"), str(tmp_path / "x.json")], [str(source)])
    first = Output(arguments(), [str(tmp_path / "nq.json"), str(tmp_path / "remain.json")], [str(source)])
    first.publish(tmp_path / "nq.json", [])
    first.publish(tmp_path / "remain.json", [])
    first.finish()
    with pytest.raises(UserError, match=at("remain.json", tmp_path / "nq.json")):
        Output(arguments(overwrite=True), [str(tmp_path / "tqa.json"), str(tmp_path / "remain.json")], [str(source)])


def test_a_finished_output_that_lost_a_file_is_not_mixed_with_another_run(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "question": "q"}])
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    out = Output(arguments(), paths, [str(source)])
    for path in paths:
        out.publish(path, [])
    out.finish()
    (tmp_path / "b.json").unlink()
    with pytest.raises(UserError, match=at("b.json", "--overwrite")):
        Output(arguments(), paths, [str(source)])
    with pytest.raises(UserError, match=naming("arguments", "seed", 7)):
        Output(arguments(seed=7), paths, [str(source)])


# ---------------------------------------------------------------- workers that take turns


def test_workers_work_one_at_a_time_and_go_on_together(tmp_path):
    check_that_workers_take_turns(tmp_path)
