"""Malformed and hostile files, stage by stage: each one gives one clear error, or a result that these tests state.

A stage refuses a file with exit status 2 and one line on stderr that names the file, the place in it and the expected content. It
never ends in a stack trace, never hangs, and never continues with content that the file does not have.
"""

import codecs
import json
import os
import re
from pathlib import Path

import pytest
from bad_rows import BAD_ROWS, with_doc
from conftest import write_jsonl
from running import assert_refused, make_good, retriever_manifest, run
from stages import DOCS, LLM_STAGES, ROW_STAGES, flags_of, row

from dynamicrag.rows.records import count_rows
from dynamicrag.rows.trec import is_run
from dynamicrag.stage import UserError


@pytest.fixture(scope="module")
def good(tmp_path_factory, encoder_dir) -> Path:
    return make_good(tmp_path_factory.mktemp("good"), encoder_dir)


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def put(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(name: str, content: bytes | str, says: str, good: Path, out: Path, monkeypatch) -> None:
    rows = put(out.parent / "rows_0.jsonl", content)
    if name == "aggregate":
        retriever_manifest(rows)
    assert_refused(*run(name, flags_of(name, good, out, rows), monkeypatch), says, out)


# ---------------------------------------------------------------- files of rows that are not files of rows

GOOD_LINES = "".join(json.dumps(row(n)) + "\n" for n in (1, 2))
BROKEN_FILES: dict[str, tuple[bytes | str, str]] = {
    "not JSON": ("hello, world\n", r"rows_0\.jsonl:1: "),
    "an XML page": ("<html><body>504 Gateway Timeout</body></html>", r"rows_0\.jsonl:1: "),
    "empty": ("", r"rows_0\.jsonl: "),
    "white space": (" \r\n\t\n", r"rows_0\.jsonl: "),
    "a BOM and nothing": (codecs.BOM_UTF8, r"rows_0\.jsonl: "),
    "an empty array": ("[]\n", r"rows_0\.jsonl: "),
    "a truncated line": (GOOD_LINES + json.dumps(row(3))[:-30], r"rows_0\.jsonl:3: "),
    "a truncated array": ("[" + json.dumps(row(1)) + ",\n" + json.dumps(row(2))[:-30], r"rows_0\.jsonl:2: "),
    "an array cut after a comma": ("[" + json.dumps(row(1)) + ",\n", r"rows_0\.jsonl:2: "),
    "a line and garbage": (json.dumps(row(1)) + " and more\n", r"rows_0\.jsonl:1: "),
    "an array and garbage": (json.dumps([row(1)]) + "\n]", r"rows_0\.jsonl:2: "),
    "two objects on a line": (json.dumps(row(1)) * 2 + "\n", r"rows_0\.jsonl:1: "),
    "single quotes": (str(row(1)) + "\n", r"rows_0\.jsonl:1: "),
    "nested lists, 100,000 deep": ("[" * 100_000, r"rows_0\.jsonl:1: "),
    "nested objects, 100,000 deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, r"rows_0\.jsonl:1: "),
    "a key nested 100,000 deep in an array": (
        f'[{json.dumps(row(1))[:-1]}, "more": {"[" * 100_000}{"]" * 100_000}}}]', r"rows_0\.jsonl:1: "
    ),
    "a key nested deeper than can be written": (
        GOOD_LINES + f'{json.dumps(row(3))[:-1]}, "more": {"[" * 300}{"]" * 300}}}\n', r"rows_0\.jsonl:3: "
    ),
    "a number beyond the largest": (GOOD_LINES + '{"id": "q3", "question": "q", "n": 1e400}\n', r"rows_0\.jsonl:3: "),
    "an integer of 401 digits": (GOOD_LINES + f'{{"id": "q3", "question": "q", "n": 1{"0" * 400}}}\n', r"rows_0\.jsonl:3: "),
    "an integer of 5,000 digits in an array": (f'[{{"id": "q3", "question": "q", "n": {"9" * 5000}}}]', r"rows_0\.jsonl:1: "),
    "NaN": (json.dumps(row(docs=[{**DOCS[0], "score": float("nan")}])), r"rows_0\.jsonl:1: "),
    "Infinity": (json.dumps([row(docs=[{**DOCS[0], "rerank_score": float("inf")}])]), r"rows_0\.jsonl:1: .*Infinity"),
    "a lone surrogate": (json.dumps(row(question="which \ud800?")), r"rows_0\.jsonl:1: "),
    "a lone surrogate in an array": (json.dumps([row(question="which \udfff?")]), r"rows_0\.jsonl:1: "),
    "a control character in a string": (GOOD_LINES + '{"id": "q3", "question": "which\x01?"}\n', r"rows_0\.jsonl:3: "),
    "invalid UTF-8": (GOOD_LINES.encode() + b'{"id": "q3", "question": "\xff\xfe"}\n', r"rows_0\.jsonl:3: "),
    "invalid UTF-8 in an array": (b'[{"id": "q3",\n"question": "\xc3\x28"}]', r"rows_0\.jsonl:1: .*UTF-8"),
    "Latin-1": ('{"id": "q3", "question": "où?"}'.encode("latin-1"), r"rows_0\.jsonl:1: "),
    "UTF-16": (GOOD_LINES.encode("utf-16"), r"rows_0\.jsonl: .*UTF-16"),
    "UTF-16 without a BOM": (GOOD_LINES.encode("utf-16-le"), r"rows_0\.jsonl:1: "),
    "UTF-32": (GOOD_LINES.encode("utf-32"), r"rows_0\.jsonl: .*UTF-16"),
    "NUL bytes": (b"\0" * 4096, r"rows_0\.jsonl:1: "),
    "a block of NUL in the middle": (GOOD_LINES.encode() + b"\0" * 512 + b"\n", r"rows_0\.jsonl:3: "),
    "a gzip file": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab\xae\x05\0", r"rows_0\.jsonl:1: "),
    "lines of numbers": ("1\n2\n3\n", r"rows_0\.jsonl:1: .*\bint 1\b"),
    "lines of lists": (f"\n{json.dumps('x')}\n[]\n", r"rows_0\.jsonl:2: .*\bstr\b"),
    "null": ("null\n", r"rows_0\.jsonl:1: "),
    "an array of arrays": (json.dumps([[row(1), row(2)]]), r"rows_0\.jsonl:1: .*\blist\b"),
    "rows as an object": (json.dumps({"data": [row(1), row(2)]}), r"rows_0\.jsonl:1: key 'id'"),
}


# Results may be TREC runs too: these files begin with neither { nor [.
IS_A_RUN = r"rows_0\.jsonl: .*--eval_file"


def sentinels(table: dict, *few: str) -> list[str]:
    """The cases that each stage runs: a few, since the reader that all stages share is tested with the whole table. FULL=1: all of them."""
    return list(table) if os.environ.get("FULL") else [case for case in table if case in few]


def reads(path: Path, content: bytes | str) -> str:
    """The message of the reader that all stages share."""
    with pytest.raises(UserError) as error:
        count_rows(str(put(path, content)))
    return str(error.value)


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_the_reader_refuses_a_file_that_holds_no_rows(case, tmp_path):
    content, says = BROKEN_FILES[case]
    assert re.search(says, reads(tmp_path / "rows_0.jsonl", content))


@pytest.mark.parametrize("case", sentinels(BROKEN_FILES, "empty", "a truncated array", "invalid UTF-8"))
@pytest.mark.parametrize("name", ROW_STAGES)
def test_a_file_that_holds_no_rows(name, case, good, out, monkeypatch):
    content, says = BROKEN_FILES[case]
    if name == "evaluate_retrieval" and is_run(put(out.parent / "asked", content)):
        says = IS_A_RUN
    refused(name, content, says, good, out, monkeypatch)


@pytest.mark.parametrize(("make", "says"), [
    (os.mkfifo, r"rows_0\.jsonl: "), (os.mkdir, r"rows_0\.jsonl: .*Is a directory"), (lambda path: None, r"rows_0\.jsonl: "),
    (lambda path: path.symlink_to("nowhere"), r"rows_0\.jsonl: "),
], ids=["a pipe", "a folder", "nothing", "a link to nothing"])
@pytest.mark.parametrize("name", ROW_STAGES)
def test_what_is_no_file(name, make, says, good, out, monkeypatch):
    rows = out.parent / "rows_0.jsonl"
    make(rows)
    if name == "aggregate":
        retriever_manifest(rows)
    assert_refused(*run(name, flags_of(name, good, out, rows), monkeypatch), says, out)


# ---------------------------------------------------------------- rows that are not rows


def third_of_four(changes: dict) -> str:
    return "\n".join([json.dumps(row(n)) for n in (1, 2)] + [json.dumps(row(3, **changes)).replace('"null"', "null"), json.dumps(row(4))])


@pytest.mark.parametrize("case", BAD_ROWS)
def test_the_reader_refuses_a_row_that_is_none(case, tmp_path):
    """Line numbers start at 1."""
    changes, says = BAD_ROWS[case]
    assert re.search(rf"rows_0\.jsonl:3: key {says}", reads(tmp_path / "rows_0.jsonl", third_of_four(changes)))


@pytest.mark.parametrize(("name", "case"), [
    (name, case) for name in ROW_STAGES for case in sentinels(BAD_ROWS, "an id that is used already", "answers of mixed types", "a document whose text is a list")
    if not (name == "evaluate" and "used" in case)  # the first row of a question counts, and a warning names the others
])
def test_a_row_that_is_none(name, case, good, out, monkeypatch):
    changes, says = BAD_ROWS[case]
    refused(name, third_of_four(changes), rf"rows_0\.jsonl:3: key {says}", good, out, monkeypatch)


# Keys that only some stages need.
NEEDS: list[tuple[tuple[str, ...], dict, str]] = [
    (("aggregate", "reranker", "process_training_data", "reranker_sequence", *LLM_STAGES, "evaluate_retrieval"), {"docs": None}, "'docs': "),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": None}, "'true_id': "),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": [1, 9]}, r"'true_id': .*\b9\b"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": [0]}, r"'true_id': .*\b0\b"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": ["1"]}, "'true_id': "),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": [1.0]}, "'true_id': "),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": 1}, "'true_id': "),
    (("reranker_sequence", "split_for_sft_dpo"), {"false_id": [[3]]}, "'false_id': "),
    (("reranker_sequence",), {"sequence": None}, "'sequence': "),
    (("reranker_sequence",), {"sequence": "[2], [1]"}, r"'sequence': .*\bstr\b"),
    (("reranker_sequence",), {"sequence": [2, 5]}, r"'sequence': .*\b5\b"),
    (("reranker_sequence",), {"false_id": [3], "sequence": [4]}, r"'sequence': .*\b4\b"),
    (("reward_trajectories", "construct_dpo"), {"id_lists": None}, "'id_lists': "),
    (("reward_trajectories", "construct_dpo"), {"id_lists": "[1]"}, "'id_lists': "),
    (("reward_trajectories", "construct_dpo"), {"id_lists": [[1], [2, 40]]}, r"'id_lists\[1\]': .*\b40\b"),
    (("reward_trajectories", "construct_dpo"), {"id_lists": [[1], ["2"]]}, r"'id_lists\[1\]': "),
    (("reward_trajectories", "construct_dpo"), {"responses": ["oil"]}, r"'responses': .*\b1\b.*\b2\b"),
    (("reward_trajectories", "construct_dpo"), {"responses": ["oil", None]}, "'responses': "),
    (("reward_trajectories", "construct_dpo"), {"answers": [" "]}, "'answers': "),
    (("construct_dpo",), {"docs_shown": 5}, r"'docs_shown': .*\b4\b"),
    (("construct_dpo",), {"docs_shown": "4"}, "'docs_shown': "),
    (("construct_dpo",), {"response_scores": [0.9, "0.1"]}, "'response_scores': "),
    (("construct_dpo",), {"response_scores": [0.9]}, r"'response_scores': .*\b1\b.*\b2\b"),
    (("construct_dpo",), {"score_terms": [{"em": 1.0}, {"em": 2.0}]}, r"'score_terms\[1\]\.em': .*\b1\b"),
    (("construct_dpo",), {"score_terms": [{"em": 1.0}, {}]}, r"'score_terms\[1\]\.em': "),
    (("construct_dpo",), {"score_terms": [{"em": 1.0, "rouge": 0.1}, {"em": 1.0}]}, r"'score_terms\[1\]': .*\bem\b"),
    (("evaluate",), {"usage": "much"}, "'usage': "),
    (("evaluate",), {"usage": {"calls": "two"}}, "'usage': "),
    (("evaluate",), {"id_list": 3}, "'id_list': "),
    (("evaluate",), {"id_list": "[3], [1]"}, "'id_list': "),
    (("evaluate", "evaluate_retrieval", "construct_dpo"), {"gold_docs": "p1"}, "'gold_docs': "),
    (("evaluate", "evaluate_retrieval", "construct_dpo"), {"gold_docs": [["p1"]]}, "'gold_docs': "),
    (("evaluate", "evaluate_retrieval", "construct_dpo"), {"positive_ctxs": ["p1"]}, "'positive_ctxs': "),
    (("evaluate",), {"gold_docs": ["p1"], "final_docs": "p1"}, "'final_docs': "),
]


@pytest.mark.parametrize(("name", "changes", "says"), [
    pytest.param(name, changes, says, id=f"{name}-{changes}") for names, changes, says in NEEDS for name in names
])
def test_a_row_without_what_the_stage_needs(name, changes, says, good, out, monkeypatch):
    lines = [json.dumps(row(n, **(changes if n == 3 else {}))) for n in range(1, 5)]
    refused(name, "\n".join(lines), rf"rows_0\.jsonl(:3|: row q3): key {says}", good, out, monkeypatch)


def test_an_error_is_one_line_whatever_it_quotes(good, out, monkeypatch):
    """Control characters in an id reach neither the terminal nor the log, and line ends in it do not make new lines."""
    strange = row(3, id="q\x1b[2J\r\n12:00:00 all is well\u202e\u2028" + "x" * 10_000, docs=[{"id": "\x07", "text": "t"}])
    rows = write_jsonl(out.parent / "rows_0.jsonl", [row(1), strange])
    status, said = run("process_training_data", flags_of("process_training_data", good, out, rows), monkeypatch)
    assert_refused(status, said, r"row q\\x1b\[2J 12:00:00 all is well\\u202e x+ \.\.\. x+: .*\\x07.*rerank_label.*reranker\.py", out)


@pytest.mark.parametrize(("name", "docs", "says"), [
    ("process_training_data", with_doc(rerank_label=None), r"row q3: .*\bp2\b.*rerank_label"),
    ("process_training_data", with_doc(rerank_score=None), r"row q3: .*\bp2\b.*rerank_score"),
    ("construct_generator_sft", with_doc(rerank_score=None), r"row q3: docs\[1\] .*rerank_score.*reranker\.py"),
    ("sampling_dpo_trajectories --include-expert", with_doc(rerank_score=None), r"row q3: docs\[1\] .*rerank_score"),
    ("inference --selector monot5", with_doc(rerank_score=None), r"\bp2\b.*\brerank_score\b"),
    ("inference --selector adaptive", with_doc(score=None, rerank_score=None), r"\bp2\b.*\bscore\b"),
    ("evaluate_retrieval --stage reranking", with_doc(rerank_score=None), "row q3: .*rerank_score"),
    ("evaluate_retrieval --run_file {out}/x.run --stage retrieval", with_doc(score=None), "document 'p2': .*score"),
])
def test_documents_without_the_scores_a_stage_ranks_by(name, docs, says, good, out, monkeypatch):
    name, _, more = name.partition(" ")
    docs["docs"] = [{key: value for key, value in doc.items() if value is not None} for doc in docs["docs"]]
    rows = write_jsonl(out.parent / "rows_0.jsonl", [row(n, **(docs if n == 3 else {})) for n in range(1, 5)])
    assert_refused(*run(name, flags_of(name, good, out, rows, more), monkeypatch), says, out)
