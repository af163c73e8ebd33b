"""A reader of any file returns a result or says what is wrong. A selection from any text names only shown documents.

    FUZZ=50 pytest tests/faults/test_fuzz.py       fifty times as many examples as in the usual run of about 8 s
"""

import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages import row

from dynamicrag.files import jsonio
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts, as_text
from dynamicrag.rows.checks import POSITION_KEYS, TRAJECTORY_KEYS
from dynamicrag.rows.identifiers import format_ids, ids_pattern, parse_ids
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.rows.records import normalise_row, read_rows
from dynamicrag.rows.row import RowError
from dynamicrag.rows.trec import Run, read_qrels
from dynamicrag.search.corpus import read_passages
from dynamicrag.search.pickled import read_pickled
from dynamicrag.search.shards import open_shards
from dynamicrag.stage import UserError

TIMES = int(os.environ.get("FUZZ", "1"))
SECONDS = 5  # no reader takes longer for an example, which has at most a megabyte


def examples(number: int):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=number * TIMES, deadline=None, suppress_health_check=quiet)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def result_or_user_error(read, path: Path, content: bytes) -> object:
    """The result of read() for a file, or None if it refuses the file. Neither takes longer than SECONDS."""
    path.write_bytes(content)
    began = time.process_time()
    try:
        return read()
    except UserError as error:
        assert path.name in str(error)
        return None
    finally:
        assert time.process_time() - began < SECONDS


# ---------------------------------------------------------------- damaged files: pieces of good ones, cut, repeated, mixed with others


def damaged(*good: bytes):
    """Slices of good files and of noise in any order."""
    whole = st.sampled_from(good)
    cut = st.builds(lambda content, start, length: content[start : start + length], whole, st.integers(0, 400), st.integers(0, 400))
    noise = st.binary(max_size=20) | st.sampled_from([
        b"\xef\xbb\xbf", b"\0", b"\r\n", b"\n", b"\r", b'"', b"\t", b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"1e400",
        b"-", b"NaN", b"Infinity", b"null", b"true", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"9" * 400, b" ", b"'", b"#", b"&a ", b"*a", b"<<: ", b"!!", b"%",
        b"|\n", b"- ", b"? ", b"? [", b"@", b"\xe2\x80\xa8", b"---\n", b"...\n",
    ])
    repeated = st.builds(lambda piece, times: piece * times, noise, st.integers(1, 3000))
    return st.lists(whole | cut | noise | repeated, max_size=6).map(b"".join)


ROW = json.dumps(row(1)).encode()
JSON_FILES = [ROW + b"\n" + json.dumps(row(2)).encode() + b"\n", b"[" + ROW + b",\n" + ROW + b"]\n", b'{"a": 1}\n[2]\n', b"[1, 2.5e3, \"x\"]"]


@examples(600)
@given(content=damaged(*JSON_FILES), size=st.sampled_from([1, 7, 64, 1 << 20]))
def test_json(folder, content, size):
    original, jsonio.READ_BYTES = jsonio.READ_BYTES, size
    try:
        values = result_or_user_error(lambda: list(read_json(folder / "x.json")), folder / "x.json", content)
    finally:
        jsonio.READ_BYTES = original
    for line, value in values or ():
        assert 1 <= line <= content.count(b"\n") + 1
        orjson.dumps([value])


@examples(120)
@given(content=damaged(*JSON_FILES))
def test_rows_of_damaged_files(folder, content):
    for needs in ((), ("docs", "true_id", "false_id", "sequence")):
        result_or_user_error(lambda needs=needs: list(read_rows(folder / "x.jsonl", needs)), folder / "x.jsonl", content)


TSV = b'id\ttext\ttitle\n1\ta text\tA\n2\t"with ""quotes""\nand lines"\tB\n'


@examples(320)
@given(content=damaged(TSV, TSV.replace(b"\n", b"\r\n"), b"id\ttext\n"))
def test_corpora_in_tsv(folder, content):
    for passage_id, title, text in result_or_user_error(lambda: list(read_passages(folder / "x.tsv")), folder / "x.tsv", content) or ():
        assert passage_id and "\0" not in passage_id and all(isinstance(field, str) for field in (passage_id, title, text))


RUN = b"q1 Q0 d1 1 2.5 tag\nq1 Q0 d2 2 1.5 tag\nq2 Q0 d1 1 -1e3 tag\n"


@examples(320)
@given(content=damaged(RUN, b"q3 Q0 d1 1 1 t\n"))
def test_runs(folder, content):
    def read() -> list[tuple[str, float]]:
        run = Run(folder / "x.run")
        return [entry for query in run.query_ids for entry in run.ranking(query)]

    for doc_id, score in result_or_user_error(read, folder / "x.run", content) or ():
        assert doc_id and np.isfinite(np.float32(score))


@examples(160)
@given(content=damaged(b"q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 3\n"))
def test_qrels(folder, content):
    found = result_or_user_error(lambda: read_qrels(folder / "x.qrels"), folder / "x.qrels", content) or {}
    assert all(relevance > 0 for docs in found.values() for relevance in docs.values())


YAML = b"reranker:\n  system: Choose.\n  user: 'Q: {question} {documents}'\ngenerator: {document: \"[{n}] {title} {text}\"}\n"


@examples(320)
@given(content=damaged(YAML, b"reranker: &a {user: x}\n", b"judge: {user: '{question.x} {{}} {0} {answers!r:>{response}}'}\n"))
def test_prompts(folder, content):
    prompts = result_or_user_error(lambda: Prompts(str(folder / "x.yaml")), folder / "x.yaml", content)
    if prompts:
        doc = {"id": "1", "title": "t", "text": "{question.__class__}"}
        made = [prompts.reranker("q", [doc]), prompts.pointwise("q", doc), prompts.generator("q", [doc], "i"), prompts.generator("q", [], "i"), prompts.judge("q", ["a"], "r")]
        assert all(isinstance(message["content"], str) and "<class" not in message["content"] for messages in made for message in messages)


@examples(240)
@given(content=damaged(*(pickle.dumps((["p1", "p2"], np.ones((2, 3), dtype="f2")), protocol=protocol) for protocol in range(5)), b"r\xff\xff\xff\x7f", b"c_codecs\nencode\n", b"R", b"b", b"."))
def test_published_shards(folder, content):
    found = result_or_user_error(lambda: read_pickled(folder / "x"), folder / "x", content)
    assert found is None or (isinstance(found[0], list) and found[1].dtype.kind == "f")


@examples(160)
@given(header=st.text("{}()[]'\":, .descrfotanhpe<>24OV|i_TruFals\n\\#0123456789-+*L", max_size=118), data=st.binary(max_size=100))
def test_own_shards(folder, header, data):
    made = b"\x93NUMPY\x01\x00\x76\x00" + header.encode().ljust(118)[:118] + data
    np.save(folder / "x.ids.npy", np.array([b"p1"]))
    found = result_or_user_error(lambda: open_shards([folder / "x.npy"]), folder / "x.npy", made)
    assert found is None or found[0].vectors.shape[0] == 1


@examples(120)
@given(content=damaged(b'{"stage": "x", "arguments": {}, "inputs": {"a": "b"}, "outputs": ["x"], "counts": {"rows": 1}}', b"[]", b"{}"))
def test_manifests(folder, content):
    found = result_or_user_error(lambda: read_manifest(folder / "x"), folder / "x.manifest.json", content)
    assert found is None or all(isinstance(found[key], kind) for key, kind in {"arguments": dict, "inputs": dict, "outputs": list, "counts": dict}.items())


# ---------------------------------------------------------------- rows

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 12) | st.just(2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    | st.sampled_from(["", " ", "nan", "1e999", "true", "[1]", "0", "q1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "text", "title", "score", "em", "short_answers"]) | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *row(), "ctxs", "answer", "golden_answers", "output", "sample_id", "dataset", "qa_pairs", "retrieved_question", "gold_docs", "positive_ctxs", "error",
]
NEEDED = ("docs", "answers", "docs_shown", *POSITION_KEYS, *TRAJECTORY_KEYS)


@st.composite
def nearly_rows(draw) -> dict:
    """A good row with a few changed keys, also within its documents."""
    changes = draw(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=4))
    made = {**row(1), **changes}
    if draw(st.booleans()) and isinstance(made.get("docs"), list) and made["docs"] and isinstance(made["docs"][0], dict):
        made["docs"][0] = {**made["docs"][0], **draw(st.dictionaries(st.sampled_from(["id", "title", "text", "score", "rerank_score", "rerank_label"]), ANYTHING, max_size=3))}
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=3)):
        made.pop(key, None)
    return made


@examples(600)
@given(value=nearly_rows() | ANYTHING, needs=st.sets(st.sampled_from(NEEDED)).map(lambda some: tuple(key for key in NEEDED if key in some)))
def test_rows(value, needs):
    """A row that is accepted is in the project's form and does not change if it is read again. Any other row is a RowError."""
    if "id_lists" not in needs:  # a stage that needs a key of trajectories needs the trajectories too, in this order
        needs = tuple(key for key in needs if key not in TRAJECTORY_KEYS)
    if "sequence" in needs:
        needs = tuple(dict.fromkeys(("true_id", "false_id", *needs)))
    before = json.dumps(value)
    try:
        read = normalise_row(value, needs)
    except RowError as error:
        assert str(error).startswith("key '")
        return
    finally:
        assert json.dumps(value) == before, "what was read is not changed"
    assert isinstance(read["id"], str) and read["id"] and read["question"].strip()
    assert isinstance(read.get("answers") or [], list) and all(isinstance(answer, str) for answer in read.get("answers") or ())
    for doc in read.get("docs", ()):
        assert all(isinstance(doc[key], str) for key in ("id", "title", "text")) and doc["id"]
        assert all(isinstance(doc.get(key) or 0.0, float) for key in ("score", "rerank_score"))
    assert all(key in read for key in needs)
    assert normalise_row(read, needs) == read
    assert orjson.loads(orjson.dumps(read)) == read


# ---------------------------------------------------------------- identifiers and texts


@examples(600)
@given(text=st.text("[]0123456789 ,None\n٣１²-.", max_size=60) | st.text(max_size=60), shown=st.integers(0, 120))
def test_identifiers(text, shown):
    found = parse_ids(text, shown)
    assert all(1 <= position <= shown for position in found.ids)
    assert len(set(found.ids)) == len(found.ids)
    assert found.valid or not found.ids
    assert parse_ids(format_ids(found.ids), shown).ids == found.ids


@examples(24)
@given(unit=st.text("[]0123456789 ,None\n", min_size=1, max_size=12), before=st.text("[1 ", max_size=3), after=st.text("]1 ", max_size=3), shown=st.integers(0, 500))
def test_a_megabyte_of_identifiers_is_read_at_once(unit, before, after, shown):
    text = before + unit * (1_000_000 // len(unit)) + after
    began = time.process_time()
    found = parse_ids(text, shown)
    assert time.process_time() - began < SECONDS
    assert len(found.ids) <= shown


@examples(80)
@given(ids=st.lists(st.integers(1, 30), max_size=30, unique=True))
def test_what_is_allowed_is_what_is_read(ids):
    assert re.fullmatch(ids_pattern(30), format_ids(ids)) and parse_ids(format_ids(ids), 30).ids == ids


@examples(600)
@given(text=st.lists(st.sampled_from(["<", "|", ">", "[", "]", "/", "s", "S", "SYS", "INST", " ", "im_end", "<|", "|>", "x"]) | st.text(max_size=3), max_size=12).map("".join))
def test_no_text_keeps_a_turn_marker(text):
    made = as_text(text)
    assert not any(marker in made for marker in ("<|", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"))
    assert as_text(made) == made and made.replace(" ", "") == text.replace(" ", "")
    if not any(mark in text for mark in ("<|", "<s>", "</s>", "INST]", "SYS>>")):
        assert made == text
