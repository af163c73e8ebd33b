"""Malformed and hostile files, stage by stage: each is one clear error, or a result that is written down here.

A stage refuses a file with exit status 2 and one line on stderr that names the file, the place in it and what was expected. It
never ends in a stack trace, never hangs, and never goes on with something else than what the file says.
"""

import codecs
import json
import os
from pathlib import Path

import pytest
from conftest import write_jsonl
from running import DOCS, ROW_STAGES, assert_refused, flags_of, make_good, retriever_manifest, row, run

from dynamicrag.runs import is_run


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
    "not JSON": ("hello, world\n", r"rows_0\.jsonl:1: not valid JSON"),
    "an XML page": ("<html><body>504 Gateway Timeout</body></html>", r"rows_0\.jsonl:1: "),
    "empty": ("", r"rows_0\.jsonl: the file is empty"),
    "white space": (" \r\n\t\n", r"rows_0\.jsonl: the file is empty"),
    "a BOM and nothing": (codecs.BOM_UTF8, r"rows_0\.jsonl: the file is empty"),
    "an empty array": ("[]\n", r"rows_0\.jsonl: holds no (usable )?row"),
    "a truncated line": (GOOD_LINES + json.dumps(row(3))[:-30], r"rows_0\.jsonl:3: not valid JSON"),
    "a truncated array": ("[" + json.dumps(row(1)) + ",\n" + json.dumps(row(2))[:-30], r"rows_0\.jsonl:2: not a valid JSON array"),
    "an array cut after a comma": ("[" + json.dumps(row(1)) + ",\n", r"rows_0\.jsonl:2: not a valid JSON array"),
    "a line and garbage": (json.dumps(row(1)) + " and more\n", r"rows_0\.jsonl:1: not valid JSON"),
    "an array and garbage": (json.dumps([row(1)]) + "\n]", r"rows_0\.jsonl:2: .*something follows"),
    "two objects on a line": (json.dumps(row(1)) * 2 + "\n", r"rows_0\.jsonl:1: not valid JSON"),
    "single quotes": (str(row(1)) + "\n", r"rows_0\.jsonl:1: not valid JSON"),
    "nested lists, 100,000 deep": ("[" * 100_000, r"rows_0\.jsonl:1: .*(deep|depth)"),
    "nested objects, 100,000 deep": ('{"a":' * 100_000 + "1" + "}" * 100_000, r"rows_0\.jsonl:1: .*(deep|depth)"),
    "a key nested 100,000 deep in an array": (
        f'[{json.dumps(row(1))[:-1]}, "more": {"[" * 100_000}{"]" * 100_000}}}]', r"rows_0\.jsonl:1: .*(deep|depth)"
    ),
    "a key nested deeper than can be written": (
        GOOD_LINES + f'{json.dumps(row(3))[:-1]}, "more": {"[" * 300}{"]" * 300}}}\n', r"rows_0\.jsonl:3: .*(deep|depth)"
    ),
    "a number beyond the largest": (GOOD_LINES + '{"id": "q3", "question": "q", "n": 1e400}\n', r"rows_0\.jsonl:3: .*infinity"),
    "an integer of 401 digits": (GOOD_LINES + f'{{"id": "q3", "question": "q", "n": 1{"0" * 400}}}\n', r"rows_0\.jsonl:3: .*infinity"),
    "an integer of 5,000 digits in an array": (f'[{{"id": "q3", "question": "q", "n": {"9" * 5000}}}]', r"rows_0\.jsonl:1: "),
    "NaN": (json.dumps(row(docs=[{**DOCS[0], "score": float("nan")}])), r"rows_0\.jsonl:1: not valid JSON"),
    "Infinity": (json.dumps([row(docs=[{**DOCS[0], "rerank_score": float("inf")}])]), r"rows_0\.jsonl:1: .*Infinity is not JSON"),
    "a lone surrogate": (json.dumps(row(question="which \ud800?")), r"rows_0\.jsonl:1: not valid JSON"),
    "a lone surrogate in an array": (json.dumps([row(question="which \udfff?")]), r"rows_0\.jsonl:1: "),
    "a control character in a string": (GOOD_LINES + '{"id": "q3", "question": "which\x01?"}\n', r"rows_0\.jsonl:3: not valid JSON"),
    "invalid UTF-8": (GOOD_LINES.encode() + b'{"id": "q3", "question": "\xff\xfe"}\n', r"rows_0\.jsonl:3: "),
    "invalid UTF-8 in an array": (b'[{"id": "q3",\n"question": "\xc3\x28"}]', r"rows_0\.jsonl:1: .*invalid UTF-8"),
    "Latin-1": ('{"id": "q3", "question": "où?"}'.encode("latin-1"), r"rows_0\.jsonl:1: "),
    "UTF-16": (GOOD_LINES.encode("utf-16"), r"rows_0\.jsonl: .*UTF-16"),
    "UTF-16 without a BOM": (GOOD_LINES.encode("utf-16-le"), r"rows_0\.jsonl:1: not valid JSON"),
    "UTF-32": (GOOD_LINES.encode("utf-32"), r"rows_0\.jsonl: .*UTF-16"),
    "NUL bytes": (b"\0" * 4096, r"rows_0\.jsonl:1: not valid JSON"),
    "a block of NUL in the middle": (GOOD_LINES.encode() + b"\0" * 512 + b"\n", r"rows_0\.jsonl:3: not valid JSON"),
    "a gzip file": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab\xae\x05\0", r"rows_0\.jsonl:1: not valid JSON"),
    "lines of numbers": ("1\n2\n3\n", r"rows_0\.jsonl:1: .*expected a JSON object, found int 1"),
    "lines of lists": (f"\n{json.dumps('x')}\n[]\n", r"rows_0\.jsonl:2: .*expected a JSON object, found str"),
    "null": ("null\n", r"rows_0\.jsonl:1: .*expected a JSON object, found nothing"),
    "an array of arrays": (json.dumps([[row(1), row(2)]]), r"rows_0\.jsonl:1: .*expected a JSON object, found list"),
    "rows as an object": (json.dumps({"data": [row(1), row(2)]}), r"rows_0\.jsonl:1: key 'id'"),
}


# Where a stage has its own words: TREC runs, which begin with neither { nor [, are results too, and no rows make no pairs.
IS_A_RUN = r"rows_0\.jsonl: is a TREC run, which holds no questions; give them as --eval_file"
OF_NO_ROWS = {
    "evaluate_retrieval": r"rows_0\.jsonl: no question has gold documents", "evaluate": "no row has a gold answer to score against",
    "construct_dpo": r"rows_0\.jsonl: no reranker pair from 0 of 0 questions",
}


@pytest.mark.parametrize("case", BROKEN_FILES)
@pytest.mark.parametrize("name", ROW_STAGES)
def test_a_file_that_holds_no_rows(name, case, good, out, monkeypatch):
    content, says = BROKEN_FILES[case]
    if case == "an empty array":
        says = OF_NO_ROWS.get(name, says)
    elif name == "evaluate_retrieval" and is_run(put(out.parent / "asked", content)):
        says = IS_A_RUN
    refused(name, content, says, good, out, monkeypatch)


@pytest.mark.parametrize(("make", "says"), [
    (os.mkfifo, r"rows_0\.jsonl: is a pipe"), (os.mkdir, r"rows_0\.jsonl: cannot be read: Is a directory"), (lambda path: None, r"rows_0\.jsonl: "),
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

NESTED_DOC = {"id": "p1", "title": "t", "text": "t"}


def with_doc(**changes) -> dict:
    """Changes of a row whose second document is the one that is wrong."""
    return {"docs": [DOCS[0], {**DOCS[1], **changes}, *DOCS[2:]]}


BAD_ROWS: dict[str, tuple[dict, str]] = {
    "no id": ({"id": None}, "'id': missing"),
    "an empty id": ({"id": ""}, "'id': expected a non-empty string"),
    "an id that is true": ({"id": True}, "'id': expected .* found bool"),
    "an id that is a number with a point": ({"id": 1.5}, "'id': expected .* found float"),
    "an id beyond 64 bits": ({"id": 10**30}, "'id': expected .* found float"),
    "an id that is a list": ({"id": ["q1"]}, "'id': expected .* found list"),
    "an id that is used already": ({"id": "q1"}, "'id': 'q1' is already used on line 1"),
    "an id of a number that is used as a string": ({"id": "q1", "sample_id": 1}, "'id': 'q1' is already used"),
    "no question": ({"question": None}, "'question': expected .* found nothing"),
    "an empty question": ({"question": ""}, "'question': expected a non-empty string"),
    "a question of white space": ({"question": " \n\u3000"}, "'question': expected a non-empty string"),
    "a question that is a number": ({"question": 42}, "'question': .* found int"),
    "a question that is a list": ({"question": ["which?"]}, "'question': .* found list"),
    "a question to search with that is a list": ({"retrieved_question": ["which?"]}, "'retrieved_question': expected a string, found list"),
    "an answer that is a number": ({"answers": 42}, "'answers': .* found int"),
    "answers of mixed types": ({"answers": ["oil", 42]}, "'answers': expected .* list of strings"),
    "answers that are an object": ({"answers": {"text": "oil"}}, "'answers'"),
    "answers in lists": ({"answers": [["oil"]]}, "'answers': .* found list"),
    "qa_pairs that are an object": ({"qa_pairs": {"short_answers": ["oil"]}}, "'qa_pairs'"),
    "qa_pairs without short_answers": ({"qa_pairs": [{"question": "which?"}]}, "'qa_pairs'"),
    "short_answers that are a string": ({"answers": None, "qa_pairs": [{"short_answers": "oil"}]}, "'qa_pairs'"),
    "short_answers that are numbers": ({"answers": None, "qa_pairs": [{"short_answers": [42]}]}, "'qa_pairs'"),
    "a data set that is a number": ({"dataset": 7}, "'dataset': expected a string, found int"),
    "a data set that is an empty list": ({"dataset": []}, r"'dataset': expected a string, found list \[\]"),
    "docs that are a string": ({"docs": "p1"}, "'docs': expected a list of documents, found str"),
    "docs that are an object": ({"docs": {"p1": DOCS[0]}}, "'docs': expected a list of documents, found dict"),
    "docs that are null beside ctxs": ({"docs": "null", "ctxs": DOCS}, "'docs': expected a list of documents"),
    "docs in lists": ({"docs": [DOCS]}, r"'docs\[0\]': expected an object .* found list"),
    "docs that are ids": ({"docs": ["p1", "p2"]}, r"'docs\[0\]': expected an object .* found str"),
    "docs of mixed types": ({"docs": [DOCS[0], None, *DOCS[2:]]}, r"'docs\[1\]': expected an object .* found nothing"),
    "ctxs of mixed types": ({"docs": None, "ctxs": [DOCS[0], 3, *DOCS[2:]]}, r"'ctxs\[1\]': expected an object .* found int"),
    "a document without text": (with_doc(text=None), r"'docs\[1\]\.text'"),
    "a document whose text is a list": (with_doc(text=["a", "b"]), r"'docs\[1\]\.text': expected a string, found list"),
    "a document whose title is a number": (with_doc(title=1984), r"'docs\[1\]\.title': expected a string, found int"),
    "a document whose id is a list": (with_doc(id=["p2"]), r"'docs\[1\]\.id': expected .* found list"),
    "a document whose id is an object": (with_doc(id={"$oid": "p2"}), r"'docs\[1\]\.id': expected .* found dict"),
    "a document whose id is beyond 64 bits": (with_doc(id=10**30), r"'docs\[1\]\.id': expected .* found float"),
    "a document whose id is empty": (with_doc(id=""), r"'docs\[1\]\.id': expected a non-empty string"),
    "a score that is a word": (with_doc(score="high"), r"'docs\[1\]\.score': expected a number, found str"),
    "a score that is written NaN": (with_doc(score="NaN"), r"'docs\[1\]\.score': expected a finite number, found nan"),
    "a score that is written 1e999": (with_doc(score="1e999"), r"'docs\[1\]\.score': expected a finite number, found inf"),
    "a score that is a list": (with_doc(score=[1]), r"'docs\[1\]\.score': expected a number, found list"),
    "a score that is true": (with_doc(score=True), r"'docs\[1\]\.score': expected a number, found bool"),
    "a rerank score of infinity": (with_doc(rerank_score="-Infinity"), r"'docs\[1\]\.rerank_score': expected a finite number"),
    "a label that is neither": (with_doc(rerank_label="maybe"), r"'docs\[1\]\.rerank_label': expected \"true\" or \"false\""),
    "a label that is a list": (with_doc(rerank_label=["true"]), r"'docs\[1\]\.rerank_label': expected"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("name", ROW_STAGES)
def test_a_row_that_is_none(name, case, good, out, monkeypatch):
    """The third of four; the first line of the file is line 1."""
    if name == "evaluate" and "used" in case:
        pytest.skip("of rows that answer one question the first counts, and the others are warned of")
    changes, says = BAD_ROWS[case]
    lines = [json.dumps(row(n)) for n in (1, 2)] + [json.dumps(row(3, **changes)).replace('"null"', "null"), json.dumps(row(4))]
    refused(name, "\n".join(lines), rf"rows_0\.jsonl:3: key {says}", good, out, monkeypatch)


# What a stage needs of a row that others do without.
LLM_STAGES = ("sampling_dpo_trajectories", "inference", "top_inference")
NEEDS: list[tuple[tuple[str, ...], dict, str]] = [
    (("aggregate", "reranker", "process_training_data", "reranker_sequence", *LLM_STAGES, "evaluate_retrieval"), {"docs": None}, "'docs': missing"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": None}, "'true_id': missing"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": [1, 9]}, "'true_id': 9 is not the position"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": [0]}, "'true_id': 0 is not the position"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": ["1"]}, "'true_id': expected a list of integers"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": [1.0]}, "'true_id': expected a list of integers"),
    (("reranker_sequence", "split_for_sft_dpo", "construct_generator_sft"), {"true_id": 1}, "'true_id': expected a list of integers"),
    (("reranker_sequence", "split_for_sft_dpo"), {"false_id": [[3]]}, "'false_id': expected a list of integers"),
    (("reranker_sequence",), {"sequence": None}, "'sequence': missing"),
    (("reranker_sequence",), {"sequence": "[2], [1]"}, "'sequence': expected a list of integers, found str"),
    (("reranker_sequence",), {"sequence": [2, 5]}, "'sequence': 5 is not the position"),
    (("reranker_sequence",), {"false_id": [3], "sequence": [4]}, "'sequence': 4 is not"),
    (("reward_trajectories", "construct_dpo"), {"id_lists": None}, "'id_lists': missing"),
    (("reward_trajectories", "construct_dpo"), {"id_lists": "[1]"}, "'id_lists': expected a list of one list"),
    (("reward_trajectories", "construct_dpo"), {"id_lists": [[1], [2, 40]]}, r"'id_lists\[1\]': 40 is not the position"),
    (("reward_trajectories", "construct_dpo"), {"id_lists": [[1], ["2"]]}, r"'id_lists\[1\]': expected a list of integers"),
    (("reward_trajectories", "construct_dpo"), {"responses": ["oil"]}, "'responses': has 1 entries for 2 id_lists"),
    (("reward_trajectories", "construct_dpo"), {"responses": ["oil", None]}, "'responses': expected a list of one"),
    (("reward_trajectories", "construct_dpo"), {"answers": [" "]}, "'answers': holds no gold answer"),
    (("construct_dpo",), {"docs_shown": 5}, "'docs_shown': expected an integer from 0 to 4"),
    (("construct_dpo",), {"docs_shown": "4"}, "'docs_shown': expected an integer"),
    (("construct_dpo",), {"response_scores": [0.9, "0.1"]}, "'response_scores': expected a list of one"),
    (("construct_dpo",), {"response_scores": [0.9]}, "'response_scores': has 1 entries for 2 id_lists"),
    (("construct_dpo",), {"score_terms": [{"em": 1.0}, {"em": 2.0}]}, r"'score_terms\[1\]\.em': expected a number from 0 to 1"),
    (("construct_dpo",), {"score_terms": [{"em": 1.0}, {}]}, r"'score_terms\[1\]\.em': expected a number"),
    (("construct_dpo",), {"score_terms": [{"em": 1.0, "rouge": 0.1}, {"em": 1.0}]}, r"'score_terms\[1\]': has em where"),
    (("evaluate",), {"usage": "much"}, "'usage': expected an object of numbers"),
    (("evaluate",), {"usage": {"calls": "two"}}, "'usage': expected an object of numbers"),
    (("evaluate",), {"id_list": 3}, "'id_list': expected a list"),
    (("evaluate",), {"id_list": "[3], [1]"}, "'id_list': expected a list"),
    (("evaluate", "evaluate_retrieval", "construct_dpo"), {"gold_docs": "p1"}, "'gold_docs': expected a list of document ids"),
    (("evaluate", "evaluate_retrieval", "construct_dpo"), {"gold_docs": [["p1"]]}, "'gold_docs': expected a list of document ids"),
    (("evaluate", "evaluate_retrieval", "construct_dpo"), {"positive_ctxs": ["p1"]}, "'positive_ctxs': expected a list of objects"),
    (("evaluate",), {"gold_docs": ["p1"], "final_docs": "p1"}, "'final_docs': expected a list of document ids"),
]


@pytest.mark.parametrize(("name", "changes", "says"), [
    pytest.param(name, changes, says, id=f"{name}-{changes}") for names, changes, says in NEEDS for name in names
])
def test_a_row_without_what_the_stage_needs(name, changes, says, good, out, monkeypatch):
    lines = [json.dumps(row(n, **(changes if n == 3 else {}))) for n in range(1, 5)]
    refused(name, "\n".join(lines), rf"rows_0\.jsonl(:3|: row q3): key {says}", good, out, monkeypatch)


def test_an_error_is_one_line_whatever_it_quotes(good, out, monkeypatch):
    """A terminal obeys what is between the lines of an id as little as a log takes it for lines of its own."""
    strange = row(3, id="q\x1b[2J\r\n12:00:00 all is well\u202e\u2028" + "x" * 10_000, docs=[{"id": "\x07", "text": "t"}])
    rows = write_jsonl(out.parent / "rows_0.jsonl", [row(1), strange])
    status, said = run("process_training_data", flags_of("process_training_data", good, out, rows), monkeypatch)
    assert_refused(status, said, r"row q\\x1b\[2J 12:00:00 all is well\\u202e x+ \.\.\. x+: document \\x07 has no rerank_label .*run reranker\.py first", out)


@pytest.mark.parametrize(("name", "docs", "says"), [
    ("process_training_data", with_doc(rerank_label=None), "row q3: document p2 has no rerank_label"),
    ("process_training_data", with_doc(rerank_score=None), "row q3: document p2 has no rerank_label and rerank_score"),
    ("construct_generator_sft", with_doc(rerank_score=None), r"row q3: docs\[1\] has no rerank_score; run reranker\.py"),
    ("sampling_dpo_trajectories --include-expert", with_doc(rerank_score=None), r"row q3: docs\[1\] has no rerank_score"),
    ("inference --selector monot5", with_doc(rerank_score=None), "document p2 has no rerank_score"),
    ("inference --selector adaptive", with_doc(score=None, rerank_score=None), "document p2 has no score"),
    ("evaluate_retrieval --stage reranking", with_doc(rerank_score=None), "row q3: a document has no rerank_score"),
    ("evaluate_retrieval --run_file {out}/x.run --stage retrieval", with_doc(score=None), "document 'p2': has no score"),
])
def test_documents_without_the_scores_a_stage_ranks_by(name, docs, says, good, out, monkeypatch):
    name, _, more = name.partition(" ")
    docs["docs"] = [{key: value for key, value in doc.items() if value is not None} for doc in docs["docs"]]
    rows = write_jsonl(out.parent / "rows_0.jsonl", [row(n, **(docs if n == 3 else {})) for n in range(1, 5)])
    assert_refused(*run(name, flags_of(name, good, out, rows, more), monkeypatch), says, out)
