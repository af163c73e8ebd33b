"""Malformed files that are not rows: corpora, embeddings, indexes, runs, prompts, templates, models, caches, manifests.

As in test_bad_input.py, the stage ends with exit status 2 and one line that names the file and the expected content.
"""

import importlib.util
import io
import json
import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import at, write_jsonl
from running import assert_refused, good_input, make_good, retriever_manifest, run
from stages import STAGES, flags_of, row

from dynamicrag.models import chat_templates
from dynamicrag.reward.judge_cache import GradeCache
from dynamicrag.stage import UserError


class Case(NamedTuple):
    """A stage whose flags name a file {bad}, the content of that file, and a pattern of the message."""

    stage: str
    flags: str
    name: str
    content: bytes | str | Callable[[Path, Path], None]  # a function gets the path and the folder of good files
    says: str


@pytest.fixture(scope="module")
def good(tmp_path_factory, encoder_dir, monot5_dir, cross_encoder_dirs, shards_dir, corpus_tsv) -> Path:
    folder = make_good(tmp_path_factory.mktemp("good"), encoder_dir)
    (folder / "monot5").symlink_to(monot5_dir)
    (folder / "cross_encoder").symlink_to(cross_encoder_dirs[1])
    (folder / "shards").symlink_to(shards_dir)
    (folder / "embedded.tsv").symlink_to(corpus_tsv)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def check(case: Case, good: Path, out: Path, monkeypatch) -> None:
    bad = out.parent / case.name
    if callable(case.content):
        case.content(bad, good)
    else:
        bad.write_bytes(case.content if isinstance(case.content, bytes) else case.content.encode())
    flags = flags_of(case.stage, good, out, good / "rows_0.jsonl") + case.flags.format(bad=bad, good=good, out=out).split()
    assert_refused(*run(case.stage, flags, monkeypatch), case.says, out)


def each(cases: dict[str, Case]):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


# ---------------------------------------------------------------- corpora


def corpus(name: str, content, says: str, stage: str = "generate_passage_embeddings") -> Case:
    return Case(stage, "--passages {bad} --passage_store {out}/store", name, content, says)


def parquet(**columns) -> Callable[[Path, Path], None]:
    def make(path: Path, _: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return make


def half(make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def cut(path: Path, good: Path) -> None:
        make(path, good)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def damaged_pages(path: Path, good: Path) -> None:
    parquet(id=["1", "2"] * 500, text=[f"text {n}" for n in range(1000)])(path, good)
    raw = bytearray(path.read_bytes())
    raw[20:200] = bytes(180)
    path.write_bytes(raw)


CORPORA = {
    "an empty TSV": corpus("c.tsv", "", r"c\.tsv:1: "),
    "a TSV of white space": corpus("c.tsv", "\n\n", r"c\.tsv:1: "),
    "a TSV without a passage": corpus("c.tsv", "id\ttext\ttitle\n", r"c\.tsv: "),
    "a TSV without a header": corpus("c.tsv", "1\tsome text\ta title\n", r"c\.tsv:1: "),
    "a TSV without a text column": corpus("c.tsv", "id\ttitle\n1\ta title\n", r"c\.tsv:1: "),
    "a TSV with a column twice": corpus("c.tsv", "id\ttext\ttext\n1\ta\tb\n", r"c\.tsv:1: .*'text'"),
    "a TSV with commas": corpus("c.tsv", "id,text,title\n1,a,b\n", r"c\.tsv:1: "),
    "a TSV line with a field too few": corpus("c.tsv", "id\ttext\ttitle\n1\ta\tb\n2\ta\n", r"c\.tsv:3: .*\b3\b.*\b2\b"),
    "a TSV line with a field too many": corpus("c.tsv", "id\ttext\ttitle\n1\ta\tb\tc\n", r"c\.tsv:2: .*\b3\b.*\b4\b"),
    "a TSV with a lone quotation mark": corpus("c.tsv", 'id\ttext\ttitle\n1\t"so" he\tb\n2\ta\tb\n', r"c\.tsv:2: "),
    "a TSV with a quotation that does not end": corpus("c.tsv", 'id\ttext\ttitle\n1\t"so\tb\n2\ta\tb\n', r"c\.tsv:2: "),
    "a TSV of one long line": corpus("c.tsv", "x" * 1_000_000, r"c\.tsv:1: "),
    "a TSV in UTF-16": corpus("c.tsv", "id\ttext\n1\ta\n".encode("utf-16"), r"c\.tsv:1: .*UTF-8"),
    "a TSV with invalid UTF-8": corpus("c.tsv", b"id\ttext\n1\ta\n2\t\xff\n", r"c\.tsv:3: .*UTF-8"),
    "a TSV with an empty id": corpus("c.tsv", "id\ttext\n\ta\n", r"c\.tsv:2: key 'id': "),
    "a TSV with a NUL in an id": corpus("c.tsv", "id\ttext\n1\0\ta\n", r"c\.tsv:2: key 'id': '1\\x00'"),
    "a TSV with an id twice": corpus("c.tsv", "id\ttext\n1\ta\n2\tb\n1\tc\n", r"c\.tsv: .*\b1\b.*\b3\b.*'1'"),
    "a corpus with another ending": corpus("c.csv", "id\ttext\n1\ta\n", r"c\.csv: .*\.tsv\b"),
    "no corpus": corpus("c.tsv", lambda path, good: None, r"c\.tsv: "),
    "an empty folder": corpus("c", lambda path, good: path.mkdir(), r"/c: .*\.tsv\b"),
    "JSONL that is TSV": corpus("c.jsonl", "id\ttext\n1\ta\n", r"c\.jsonl:1: "),
    "JSONL with a list": corpus("c.jsonl", '["1", "text"]\n', r"c\.jsonl:1: "),
    "JSONL of lists": corpus("c.jsonl", '{"id": "1", "text": "a"}\n["2", "text"]\n', r"c\.jsonl:2: "),
    "JSONL with an id of a number with a point": corpus("c.jsonl", '{"id": 1.0, "text": "a"}\n', r"c\.jsonl:1: key 'id': .*\b1\.0"),
    "JSONL without text": corpus("c.jsonl", '{"id": 1, "body": "a"}\n', r"c\.jsonl:1: key 'text': .*NoneType"),
    "JSONL with text in a list": corpus("c.jsonl", '{"id": 1, "text": ["a"]}\n', r"c\.jsonl:1: key 'text': .*\blist\b"),
    "JSONL with a title of a number": corpus("c.jsonl", '{"id": 1, "text": "a", "title": 7}\n', r"c\.jsonl:1: key 'title'"),
    "JSONL with a lone surrogate": corpus("c.jsonl", '{"id": 1, "text": "\\ud800"}\n', r"c\.jsonl:1: "),
    "Parquet that is none": corpus("c.parquet", "PAR1 and no more", r"c\.parquet: "),
    "empty Parquet": corpus("c.parquet", "", r"c\.parquet: "),
    "Parquet cut in half": corpus("c.parquet", half(parquet(id=["1"], text=["a"])), r"c\.parquet: "),
    "Parquet with damaged pages": corpus("c.parquet", damaged_pages, r"c\.parquet: "),
    "Parquet without text": corpus("c.parquet", parquet(id=["1"], body=["a"]), r"c\.parquet: row 1: key 'text'"),
    "Parquet without ids": corpus("c.parquet", parquet(text=["a"]), r"c\.parquet: row 1: key 'id'"),
    "Parquet with ids of numbers with a point": corpus("c.parquet", parquet(id=[1.5], text=["a"]), r"c\.parquet: row 1: key 'id'"),
    "Parquet with a text that is null": corpus("c.parquet", parquet(id=["1", "2"], text=["a", None]), r"c\.parquet: row 2: key 'text'"),
    "Parquet with text in lists": corpus("c.parquet", parquet(id=["1"], text=[["a"]]), r"c\.parquet: row 1: key 'text'"),
    "an empty TSV, for BM25": corpus("c.tsv", "", r"c\.tsv:1: ", "retriever"),
    "a corpus without a word, for BM25": corpus("c.tsv", "id\ttext\n1\t!\n", "/store: ", "retriever"),
}


@each(CORPORA)
def test_a_corpus_that_is_none(case, good, out, monkeypatch):
    check(case, good, out, monkeypatch)


# ---------------------------------------------------------------- embeddings

IDS = [f"p{number}" for number in range(120)]


def npy(array: np.ndarray) -> bytes:
    raw = io.BytesIO()
    np.save(raw, array)
    return raw.getvalue()


def vectors(rows: int = 120, width: int = 32, dtype: str = "<f2") -> np.ndarray:
    return np.arange(rows * width).reshape(rows, width).astype(dtype) / 1000


def with_header(header: str, data: bytes = b"") -> bytes:
    padded = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + data


def shard(content: np.ndarray | bytes, ids: list[str] | np.ndarray | bytes | None = None, says: str = "", **manifest) -> Case:
    def make(path: Path, _: Path) -> None:
        array = np.array([name.encode() for name in ids or IDS]) if ids is None or isinstance(ids, list) else ids
        path.write_bytes(content if isinstance(content, bytes) else npy(content))
        path.with_suffix(".ids.npy").write_bytes(array if isinstance(array, bytes) else npy(array))
        if manifest:
            Path(f"{path}.manifest.json").write_text(json.dumps(manifest))

    return embedded("passages_00.npy", make, says)


def embedded(name: str, content, says: str) -> Case:
    flags = "--passages {good}/embedded.tsv --passage_store {good}/embedded.store --passages_embeddings {bad} --index flat"
    return Case("retriever", f"{flags} --model_name_or_path {{good}}/encoder --device cpu", name, content, says)


def one_vector(value: float) -> np.ndarray:
    array = vectors()
    array[77, 3] = value
    return array


class Reduced:
    """Pickles as a call of print. The call is harmless, but every call is refused."""

    def __reduce__(self):
        return print, ("called",)


NOT_A_SHARD = r"passages_00\.npy: "
SHARDS = {
    "a text": shard(b"hello", says=NOT_A_SHARD),
    "empty": shard(b"", says=NOT_A_SHARD),
    "an array of objects": shard(np.array([[{"a": 1}]], dtype=object), says=NOT_A_SHARD),
    "a header that promises more rows": shard(with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (120, 32)}", b"\0" * 64), says=NOT_A_SHARD),
    "a header that promises 2**62 rows": shard(with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (4611686018427387904, 4)}"), says=NOT_A_SHARD),
    "a header with a negative shape": shard(with_header("{'descr': '<f2', 'fortran_order': False, 'shape': (-1, 32)}"), says=NOT_A_SHARD),
    "a header that is code": shard(with_header("__import__('os').system('true')"), says=NOT_A_SHARD),
    "a header of brackets": shard(with_header("(" * 100), says=NOT_A_SHARD),
    "a file cut in half": shard(npy(vectors())[:4000], says=NOT_A_SHARD),
    "ids that are cut": shard(vectors(), npy(np.array([b"p1"] * 120))[:150], NOT_A_SHARD),
    "no ids": embedded("passages_00.npy", lambda path, good: path.write_bytes(npy(vectors())), NOT_A_SHARD),
    "integers": shard(vectors().astype("i4"), says=f"{NOT_A_SHARD}.*float16"),
    "float64": shard(vectors(dtype="f8"), says=f"{NOT_A_SHARD}.*float16"),
    "big-endian floats": shard(vectors().astype(">f4"), says=f"{NOT_A_SHARD}.*float16"),
    "one dimension": shard(vectors().ravel(), says=f"{NOT_A_SHARD}.*float16"),
    "a vector without an id": shard(vectors(), IDS[:-1], says=f"{NOT_A_SHARD}.*float16"),
    "ids that are numbers": shard(vectors(), np.arange(120), f"{NOT_A_SHARD}.*float16"),
    "vectors of another width": shard(vectors(width=31), says=r"passages_00\.npy: .*\b31\b.*\b32\b"),
    "ids the corpus does not have": shard(vectors(), [*IDS[:-1], "x"], says=r"passages_00\.npy: 1\b.*\b120\b.*'x'"),
    "ids that are not UTF-8": shard(vectors(), np.array([b"\xff\xfe"] * 120), f"{NOT_A_SHARD}.*UTF-8"),
    "an id twice": shard(vectors(), ["p1", *IDS[1:]], says=r"passages_00\.npy .*: 1\b"),
    "NaN": shard(one_vector(float("nan")), says="passages_00.npy: .*'p77'"),
    "infinity": shard(one_vector(float("inf")), says="passages_00.npy: .*'p77'"),
    "a manifest that is not JSON": embedded("passages_00.npy", lambda path, good: (
        path.write_bytes(npy(vectors())), Path(f"{path}.manifest.json").write_text("{")), r"passages_00\.npy\.manifest\.json: "),
    "a manifest of many shards": shard(vectors(), arguments={"shard_id": 0, "num_shards": 10**9}, says=r"passages_00\.npy: .*\b1\b.*\b1000000000\b"),
    "a manifest of some shards": shard(vectors(), arguments={"num_shards": "some"}, says=r"passages_00\.npy.*\b0\b.*'some'"),
    "a manifest of the first shard": shard(vectors(), arguments={"shard_id": "first"}, says=r"passages_00\.npy.*'first'.*\b1\b"),
    "no file": embedded("passages_00.npy", lambda path, good: None, r"passages_00\.npy: .*generate_passage_embeddings\.py"),
    "an unfinished one": embedded("passages_00.npy.partial", b"", r"passages_00\.npy\.partial: "),
    "a pickle that calls something": embedded("passages_00", pickle.dumps(Reduced()), r"passages_00: .*builtins\.print"),
    "a pickle that is cut": embedded("passages_00", pickle.dumps((IDS, vectors()))[:500], r"passages_00: "),
    "a pickle without vectors": embedded("passages_00", pickle.dumps((IDS, [1.0])), r"passages_00: "),
    "a pickle of one list": embedded("passages_00", pickle.dumps(IDS), r"passages_00: "),
    "a pickle of objects": embedded("passages_00", pickle.dumps((["p1"], np.array([None], dtype=object))), r"passages_00: "),
    "a pickle with a NUL in an id": embedded("passages_00", pickle.dumps((["p1\0"], vectors(1))), r"passages_00: "),
    "a pickle with a lone surrogate": embedded("passages_00", b"\x80\x02(V\\ud800\nltK\x01\x86.", r"passages_00: "),
    "a pickle that asks for 16 GB": embedded("passages_00", b"\x80\x04K\x01r\xff\xff\xff\x7f.", r"passages_00: "),
    "a pickle of a terabyte": embedded("passages_00", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.", r"passages_00: "),
    "a text that is no pickle": embedded("passages_00", "hello\n", r"passages_00: "),
}


@each(SHARDS)
def test_embeddings_that_are_none(case, good, out, monkeypatch):
    check(case, good, out, monkeypatch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_a_compressed_index_finds_and_that_is_none(value, good, out, monkeypatch):
    """The index proposes every vector here, and this one has no score that could be compared."""
    case = shard(one_vector(value).astype("<f4"), says="passages_00.npy: .*'p77'")
    check(case._replace(flags=case.flags.replace("--index flat", "--index SQ8 --candidates 1000")), good, out, monkeypatch)


def test_a_model_that_gives_no_vector_for_a_question(good, out, monkeypatch):
    def nan(path: Path, good: Path) -> None:
        import safetensors.torch

        model("encoder")(path, good)
        weights = safetensors.torch.load_file(path / "model.safetensors")
        safetensors.torch.save_file({name: value * float("nan") for name, value in weights.items()}, path / "model.safetensors")

    flags = "--passages {good}/embedded.tsv --passages_embeddings {good}/shards/*.npy --index flat --device cpu --passage_store {out}/../s"
    check(Case("retriever", f"{flags} --model_name_or_path {{bad}}", "m", nan, "/m: .*--dtype"), good, out, monkeypatch)
    flags = "--passages {good}/embedded.tsv --model_name_or_path {bad}"
    shutil.rmtree(out.parent / "m")
    check(Case("generate_passage_embeddings", flags, "m", nan, "/m: .*float16.*'p0'"), good, out, monkeypatch)


# ---------------------------------------------------------------- what is kept beside a corpus and its embeddings


def retrieve(good: Path, out: Path, monkeypatch, more: str) -> tuple[int, list[str]]:
    flags = "--passages {good}/embedded.tsv --passage_store {kept}/store --passages_embeddings {good}/shards/*.npy --device cpu"
    flags = f"{flags} --model_name_or_path {{good}}/encoder --index_path {{kept}}/x.faiss --overwrite {more}".format(good=good, kept=out.parent)
    return run("retriever", flags_of("retriever", good, out, good / "rows_0.jsonl") + flags.split(), monkeypatch)


@pytest.mark.parametrize(("index", "kept", "damage", "says"), [
    ("IVF1,SQ8", "x.faiss", lambda raw: raw[: len(raw) // 2], r"x\.faiss: "),
    ("IVF1,SQ8", "x.faiss", lambda raw: b"", r"x\.faiss: "),
    ("IVF1,SQ8", "x.faiss.manifest.json", lambda raw: b"{", r"x\.faiss: "),
    ("IVF1,SQ8", "x.faiss.manifest.json", lambda raw: b"[]", r"x\.faiss: "),
    ("bm25", "store/passages.arrow", lambda raw: raw[: len(raw) // 2], "/store: "),
    ("bm25", "store/passages.arrow", lambda raw: b"not Arrow", "/store: "),
    ("bm25", "store/keys.npy", lambda raw: raw[:-8], "/store: "),
    ("bm25", "store/keys.npy", lambda raw: npy(np.load(io.BytesIO(raw))[:-1]), "/store: "),
    ("bm25", "store/order.npy", lambda raw: b"", "/store: "),
    ("bm25", "store/bm25/data.csc.index.npy", lambda raw: raw[:-8], "/bm25: "),
    ("bm25", "store/bm25/vocab.index.json", lambda raw: raw[:10], "/bm25: "),
    ("bm25", "store/bm25/params.index.json", lambda raw: b"{}", "/bm25: "),
    ("bm25", "store/store.json", lambda raw: b"[", None), ("bm25", "store/store.json", lambda raw: b"[1]", None),
])
def test_what_was_kept_is_damaged(index, kept, damage, says, good, out, monkeypatch):
    """A file that cannot be read is named. A store whose record is damaged is built again."""
    assert retrieve(good, out, monkeypatch, f"--index {index}") == (0, [])
    before = (out / "retrieved.jsonl").read_bytes()
    path = out.parent / kept
    path.write_bytes(damage(path.read_bytes()))
    status, said = retrieve(good, out, monkeypatch, f"--index {index}")
    if says:
        assert_refused(status, said, says, out)
    else:
        assert (status, said) == (0, []) and (out / "retrieved.jsonl").read_bytes() == before


# ---------------------------------------------------------------- TREC runs and qrels

RUN_LINES = "".join(f"q{n} Q0 p1 1 0.5 r\n" for n in range(1, 6))
BAD_RUNS = {
    "three columns": ("q1 p1 0.5\n", r"x\.run:1: .*\b6\b.*\b3\b"),
    "seven columns": ("q1 Q0 p1 1 0.5 r more\n", r"x\.run:1: .*\b6\b.*\b7\b"),
    "a word for a score": (RUN_LINES + "q1 Q0 p2 2 high r\n", r"x\.run:6: field 'score': .*'high'"),
    "a word for a rank": (RUN_LINES + "q1 Q0 p2 second 0.4 r\n", r"x\.run:6: field 'rank': .*'second'"),
    "a rank with a point": (RUN_LINES + "q1 Q0 p2 2.0 0.4 r\n", r"x\.run:6: field 'rank': "),
    "a rank of 5,000 digits": (RUN_LINES + f"q1 Q0 p2 {'9' * 5000} 0.4 r\n", r"x\.run:6: field 'rank': "),
    "a score of NaN": (RUN_LINES + "q1 Q0 p2 2 nan r\n", r"x\.run:6: field 'score': "),
    "a score of 1e400": (RUN_LINES + "q1 Q0 p2 2 1e400 r\n", r"x\.run:6: field 'score': "),
    "a score beyond float32": (RUN_LINES + "q1 Q0 p2 2 1e39 r\n", r"x\.run:6: field 'score': "),
    "a document twice": (RUN_LINES + "q1 Q0 p1 2 0.4 r\n", r"x\.run:6: .*'p1'.*'q1'.*\b1\b"),
    "other questions": ("other Q0 p1 1 0.5 r\n", r"x\.run: .*\b5\b"),
    "empty": ("", r"x\.run: "),
    "white space": ("\n \n", r"x\.run: "),
    "UTF-16": (RUN_LINES.encode("utf-16"), r"x\.run:1: .*UTF-8"),
    "invalid UTF-8": (RUN_LINES.encode() + b"q1 Q0 \xff 1 0.5 r\n", r"x\.run:6: .*UTF-8"),
    "JSON": (json.dumps(row()), r"x\.run:1: .*\b6\b"),
    "an id with white space": ("q 1 Q0 p1 1 0.5 r\n", r"x\.run:1: .*\b6\b.*\b7\b"),
}
RUN_STAGES = {"retriever": "--run {bad} --index", "reranker": "--run {bad}", "evaluate_retrieval": "--results_file {bad} --eval_file {good}/rows_0.jsonl"}


@pytest.mark.parametrize(("name", "case"), [
    (name, case) for name in RUN_STAGES for case in BAD_RUNS if (name, case) != ("evaluate_retrieval", "JSON")  # these are rows
])
def test_a_run_that_is_none(name, case, good, out, monkeypatch):
    content, says = BAD_RUNS[case]
    if name == "evaluate_retrieval":  # a file that is no run may be rows
        says = {"other questions": r"x\.run: row other "}.get(case, says)
    check(Case(name, RUN_STAGES[name], "x.run", content, says), good, out, monkeypatch)


BAD_QRELS = {
    "three columns": ("q1 p1 1\n", r"x\.qrels:1: .*\b4\b.*\b3\b"),
    "a word for relevance": ("q1 0 p1 yes\n", r"x\.qrels:1: field 'relevance': .*'yes'"),
    "a share for relevance": ("q1 0 p1 0.5\n", r"x\.qrels:1: field 'relevance': "),
    "a relevance beyond 32 bits": (f"q1 0 p1 {10**20}\n", r"x\.qrels:1: field 'relevance': "),
    "two relevances": ("q1 0 p1 1\nq1 0 p1 2\n", r"x\.qrels:2: .*'p1'.*'q1'.*\b2\b.*\b1\b"),
    "empty": ("", r"x\.qrels: "),
    "other questions": ("other 0 p1 1\n", r"rows_0\.jsonl: .*x\.qrels"),
    "UTF-16": ("q1 0 p1 1\n".encode("utf-16"), r"x\.qrels:1: .*UTF-8"),
}


@pytest.mark.parametrize("case", BAD_QRELS)
def test_qrels_that_are_none(case, good, out, monkeypatch):
    check(Case("evaluate_retrieval", "--qrels {bad}", "x.qrels", *BAD_QRELS[case]), good, out, monkeypatch)


@pytest.mark.parametrize(("name", "flags", "content", "says"), [
    ("retriever", "--run {bad} --index", "q1 Q0 unknown 1 0.5 r\n", r"x\.run: .*'unknown'.*'q1'"),
    ("reranker", "--run {bad}", "q1 Q0 p1 1 1.5 r\n", r"\b1\.5\b.*'q1'.*'p1'"),
    ("evaluate_retrieval", "--results_file {bad}", RUN_LINES, r"x\.run: .*--eval_file"),
])
def test_a_run_of_something_else(name, flags, content, says, good, out, monkeypatch):
    check(Case(name, flags, "x.run", content, says), good, out, monkeypatch)


@pytest.mark.parametrize(("changes", "says"), [
    ({"id": "q 1"}, r"made\.run: row 'q 1': "), ({"id": "q\u20281"}, r"made\.run: row 'q\\u20281': "), ({"id": " "}, r"made\.run: row ' ': "),
    ({"docs": [{"id": "a\tb", "text": "t", "score": 1.0}]}, r"document 'a\\tb': "),
    ({"docs": [{"id": "a", "text": "t", "score": 1.0}] * 2}, "document 'a': "),
])
def test_rows_that_cannot_be_a_run(changes, says, good, out, monkeypatch):
    rows = write_jsonl(out.parent / "rows_0.jsonl", [{"id": "q1", "question": "q", "answers": ["a"], "docs": [], **changes}])
    flags = flags_of("evaluate_retrieval", good, out, rows, "--run_file {out}/made.run --stage retrieval")
    assert_refused(*run("evaluate_retrieval", flags, monkeypatch), says, out)
    assert not (out / "made.run").exists()


# ---------------------------------------------------------------- prompts

NOT_YAML = r"p\.yaml: "
BAD_PROMPTS = {
    "not YAML": ("reranker: {user: [", NOT_YAML),
    "tabs": ("reranker:\n\tuser: x\n", NOT_YAML),
    "empty": ("", r"p\.yaml: "),
    "a list": ("- reranker\n", r"p\.yaml: "),
    "a text for a prompt": ("reranker: choose\n", r"p\.yaml: "),
    "several documents": ("a: {}\n---\nb: {}\n", NOT_YAML),
    "UTF-16": ("reranker: {}".encode("utf-16"), NOT_YAML),
    "a control character": (b"reranker: {user: '\x01'}", NOT_YAML),
    "a Python tag": ("reranker: !!python/object/apply:os.system ['true']\n", NOT_YAML + r".*\bline 1\b"),
    "another tag": ("reranker:\n  system: !!binary aGVsbG8=\n", NOT_YAML + r".*\bline 2\b"),
    "a date that is none": ("reranker: {system: 2001-99-99}\n", NOT_YAML),
    "a thousand million laughs": (
        "a: &a [lol,lol]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        NOT_YAML + r".*\bline 2\b",
    ),
    "merges without end": (
        "a: &a {x: y}\n" + "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        NOT_YAML + r".*\bline 2\b",
    ),
    "100,000 brackets": ("reranker: " + "[" * 100_000, NOT_YAML + r".*\bline 1\b"),
    "100,000 dashes": ("- " * 100_000 + "x", NOT_YAML + r".*\bline 1\b"),
    "two megabytes": ("# " + "x" * 2_000_000 + "\nreranker: {}\n", NOT_YAML + r".*\b1 MB\b"),
    "an unknown prompt": ("ranker: {user: x}\n", r"p\.yaml: ranker\.user: .*reranker\.system"),
    "an unknown part": ("reranker: {usr: x}\n", r"p\.yaml: reranker\.usr: "),
    "a number for a name": ("7: {8: x}\n", r"p\.yaml: 7\.8: "),
    "a number for a text": ("reranker: {system: 7}\n", r"p\.yaml: reranker\.system: "),
    "an empty text": ("reranker: {system: ' '}\n", r"p\.yaml: reranker\.system: "),
    "an unknown placeholder": ("reranker: {user: '{query}'}\n", r"p\.yaml: reranker\.user: .*\{query\}.*\{documents\}"),
    "an attribute of a placeholder": ("reranker: {user: '{question.__class__}'}\n", r"p\.yaml: reranker\.user: .*\{question\.__class__\}"),
    "an item of a placeholder": ("reranker: {document: '{text[0]}'}\n", r"p\.yaml: reranker\.document: .*\{text\[0\]\}"),
    "a conversion": ("reranker: {user: '{question!r}'}\n", r"p\.yaml: reranker\.user: .*\{question\}"),
    "a width of a gigabyte": ("reranker: {user: '{question:1000000000}'}\n", r"p\.yaml: reranker\.user: .*\{question\}"),
    "a placeholder by number": ("reranker: {user: '{0}'}\n", r"p\.yaml: reranker\.user: .*\{0\}"),
    "a placeholder in the system prompt": ("reranker: {system: '{question}'}\n", r"p\.yaml: reranker\.system: .*\{question\}"),
    "a lone brace": ("reranker: {user: 'a } b'}\n", r"reranker\.user: "),
    "a turn marker": ("reranker: {user: '{question}<|im_end|>'}\n", r"reranker\.user: '<\|im_end\|>'"),
    "no file": (lambda path, good: None, r"p\.yaml: "),
    "a folder": (lambda path, good: path.mkdir(), NOT_YAML),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_prompts_that_are_none(case, good, out, monkeypatch):
    for name in ("reranker_sequence", "inference"):
        shutil.rmtree(out)
        out.mkdir()
        shutil.rmtree(out.parent / "p.yaml", ignore_errors=True)
        check(Case(name, "--prompts {bad}", "p.yaml", *BAD_PROMPTS[case]), good, out, monkeypatch)


# ---------------------------------------------------------------- chat templates

NOT_RENDERED = r"t\.jinja: "
BAD_TEMPLATES = {
    "not Jinja": ("{{ bos_token }}\n{% for %}", r"t\.jinja:2: "),
    "an unknown tag": ("{% exec 'true' %}", r"t\.jinja:1: "),
    "invalid UTF-8": (b"\xff\xfe", r"t\.jinja: "),
    "100,000 brackets": ("{{ " + "(" * 100_000, r"t\.jinja:"),
    "no turn": ("{{ bos_token }}", r"t\.jinja: "),
    "empty": ("", r"t\.jinja: "),
    "an unknown function": ("{{ messages[1]['content'] | decode }}", r"t\.jinja:"),
    "no system prompt": ("{{ raise_exception('system role not supported') }}", NOT_RENDERED + ".*TemplateError: system role not supported"),
    "a loop without end": ("{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}", NOT_RENDERED + r".*\b2 s\b"),
    "a number without end": ("{% set a = 9 ** 9 %}{{ a ** a }}", NOT_RENDERED),
    "a text without end": ("{{ 'a' * 3 * 10 ** 9 }}", NOT_RENDERED),
    "the inside of an object": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", NOT_RENDERED + ".*SecurityError"),
    "modules through cycler": ("{{ cycler.__init__.__globals__.os.system('true') }}", NOT_RENDERED + ".*SecurityError"),
    "modules through a macro": ("{% macro m() %}{% endmacro %}{{ m.__globals__.os }}", NOT_RENDERED + ".*UndefinedError"),
    "attributes by a filter": ("{{ (messages | attr('__class__')).mro() }}", NOT_RENDERED + ".*SecurityError"),
    "a format that looks inside": ("{{ '{0.__class__.__mro__}'.format(messages) }}", NOT_RENDERED + ".*SecurityError"),
    "another file": ("{% include '/etc/passwd' %}", NOT_RENDERED),
    "a change of the messages": ("{{ messages.append(1) }}", NOT_RENDERED + ".*SecurityError"),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_a_chat_template_that_is_none(case, good, out, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 2)
    check(Case("inference", "--template {bad}", "t.jinja", *BAD_TEMPLATES[case]), good, out, monkeypatch)


def test_what_renders_templates_is_the_immutable_sandbox():
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template

    assert isinstance(_compile_jinja_template("x").environment, ImmutableSandboxedEnvironment)


# ---------------------------------------------------------------- models


def model(source: str, *, without: str | None = None, **files: bytes | str) -> Callable[[Path, Path], None]:
    """A copy of a good model with some files replaced."""

    def make(path: Path, good: Path) -> None:
        shutil.copytree(good / source, path)
        if without:
            (path / without).unlink()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def changed(source: str, file: str, **changes: object) -> Callable[[Path, Path], None]:
    def make(path: Path, good: Path) -> None:
        model(source)(path, good)
        (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), **changes}))

    return make


def cut_weights(source: str) -> Callable[[Path, Path], None]:
    def make(path: Path, good: Path) -> None:
        model(source)(path, good)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])

    return make


def without_a_layer(path: Path, good: Path) -> None:
    """Weights for one layer, although the configuration has two."""
    import safetensors.torch

    model("encoder")(path, good)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file({name: value for name, value in weights.items() if "layer.1." not in name}, path / "model.safetensors")


def pth(content: object) -> Callable[[Path, Path], None]:
    def make(path: Path, good: Path) -> None:
        import torch

        model("encoder", without="model.safetensors")(path, good)
        if isinstance(content, bytes):
            (path / "checkpoint.pth").write_bytes(content)
        else:
            torch.save(content, path / "checkpoint.pth")

    return make


MODELS_OF = {"generate_passage_embeddings": "encoder", "reranker": "monot5", "reward_trajectories": "encoder"}
LOADED = r"^error: (--bert_model )?\S*/m: "
BAD_MODELS: dict[str, tuple[Callable[[str], Callable[[Path, Path], None]], str]] = {
    "nothing": (lambda source: lambda path, good: None, LOADED),
    "an empty folder": (lambda source: lambda path, good: path.mkdir(), LOADED),
    "a file": (lambda source: lambda path, good: path.write_text("hello"), LOADED),
    "a configuration that is not JSON": (lambda source: model(source, config__json="{"), LOADED),
    "a configuration that is a list": (lambda source: model(source, config__json="[]"), LOADED),
    "an empty configuration": (lambda source: model(source, config__json="{}"), LOADED),
    "an unknown kind of model": (lambda source: changed(source, "config.json", model_type="none_such"), LOADED),
    "a width that is a word": (lambda source: changed(source, "config.json", hidden_size="wide", d_model="wide"), LOADED),
    "no weights": (lambda source: model(source, without="model.safetensors"), LOADED),
    "weights that are text": (lambda source: model(source, model__safetensors="hello, world, this is no safetensors"), LOADED),
    "weights that are cut": (cut_weights, LOADED),
    "a header of a terabyte": (lambda source: model(source, model__safetensors=(1 << 40).to_bytes(8, "little") + b"{}"), LOADED),
    "weights of another shape": (lambda source: changed(source, "config.json", vocab_size=7), LOADED),
    "a tokenizer that is not JSON": (lambda source: model(source, tokenizer__json="{"), LOADED),
    "a tokenizer without a model": (lambda source: model(source, tokenizer__json="{}"), LOADED),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.parametrize("name", MODELS_OF)
def test_a_model_that_is_none(name, case, good, out, monkeypatch):
    make, says = BAD_MODELS[case]
    make(MODELS_OF[name])(out.parent / "m", good)
    flags = flags_of(name, good, out, good_input(name, good), f"{STAGES[name].model} {out.parent}/m", full=True)
    assert_refused(*run(name, flags, monkeypatch), says, out)


MODELS = {
    "an encoder that lacks a layer": (without_a_layer, r"/m: .*encoder\.layer\.1"),
    "a checkpoint that is text": (pth(b"hello"), r"/checkpoint\.pth: |/m: "),
    "a checkpoint that is empty": (pth(b""), "/m: "),
    "a checkpoint that is a list": (pth([1, 2]), r"checkpoint\.pth: "),
    "a checkpoint without weights": (pth({"model": {}, "opt": None}), r"checkpoint\.pth: "),
    "a checkpoint with another base": (pth({"model": 7}), r"checkpoint\.pth: "),
}


@pytest.mark.parametrize("case", MODELS)
def test_an_encoder_that_is_none(case, good, out, monkeypatch):
    check(Case("generate_passage_embeddings", "--model_name_or_path {bad} --passages {good}/corpus.tsv", "m", *MODELS[case]), good, out, monkeypatch)


def test_a_reranker_without_a_classifier(good, out, monkeypatch):
    """An encoder whose configuration names a classifier. The classifier's weights would be random."""
    changed("encoder", "config.json", architectures=["BertForSequenceClassification"])(out.parent / "m", good)
    flags = ["--input_file", f"{good}/rows_0.jsonl", "--output_file", f"{out}/r.jsonl", "--model_name_or_path", f"{out.parent}/m", "--device", "cpu"]
    assert_refused(*run("reranker", flags, monkeypatch), r"/m: .*\bclassifier\b", out)


@pytest.mark.parametrize(("config", "says"), [(None, r"/m: .*config\.json"), ("{", r"config\.json: ")])
def test_an_llm_that_is_none(config, says, good, out, monkeypatch):
    def make(path: Path, _: Path) -> None:
        path.mkdir()
        if config:
            (path / "config.json").write_text(config)

    for name in ("inference", "top_inference", "sampling_dpo_trajectories"):
        shutil.rmtree(out.parent / "m", ignore_errors=True)
        check(Case(name, "--llm-model {bad}", "m", make, says), good, out, monkeypatch)


# ---------------------------------------------------------------- caches and manifests


def database(*statements: str) -> Callable[[Path, Path], None]:
    def make(path: Path, _: Path) -> None:
        with sqlite3.connect(path) as db:
            for statement in statements:
                db.execute(statement)
        db.close()

    return make


BAD_CACHES = {
    "a text": "hello, world, this is no SQLite file\n" * 100,
    "a header and garbage": b"SQLite format 3\0" + os.urandom(4096),
    "another database": database("CREATE TABLE songs (title TEXT)"),
    "a view of that name": database("CREATE VIEW judge_grades AS SELECT 1 AS key, 2 AS grade"),
    "a folder": lambda path, good: path.mkdir(),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_a_judge_cache_that_is_none(case, good, out, monkeypatch):
    flags = "--weights em=1,judge=1 --judge-base-url http://127.0.0.1:9/v1 --judge-model m --judge-cache {bad}"
    check(Case("reward_trajectories", flags, "g.sqlite", BAD_CACHES[case], r"g\.sqlite: .*--judge-cache"), good, out, monkeypatch)


@pytest.mark.parametrize("grade", ["'high'", "1e999", "-1.0", "NULL"])
def test_a_grade_that_is_none(tmp_path, grade):
    database("CREATE TABLE judge_grades (key TEXT PRIMARY KEY, grade)", f"INSERT INTO judge_grades VALUES ('k', {grade})")(tmp_path / "g.sqlite", tmp_path)
    with pytest.raises(UserError, match=at("g.sqlite", "--judge-cache")):
        GradeCache(tmp_path / "g.sqlite").get("k")


BAD_MANIFESTS = {
    "not JSON": ("{", ""), "empty": ("", ""), "a list": ("[]", ""),
    "binary": (b"\0\xff", ""), "arguments that are a list": ('{"arguments": []}', "key 'arguments'"),
    "inputs that are a list": ('{"inputs": ["x"]}', "key 'inputs'"), "inputs of numbers": ('{"inputs": {"x": 1}}', "key 'inputs'"),
    "outputs that are a text": ('{"outputs": "x"}', "key 'outputs'"), "no outputs": ('{"outputs": []}', "key 'outputs'"),
    "rows that are a text": ('{"counts": {"rows": "many"}}', "key 'counts'"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
@pytest.mark.parametrize("name", ["aggregate", "evaluate"])
def test_a_manifest_of_a_stage_before_that_is_none(name, case, good, out, monkeypatch):
    rows = out.parent / "rows_0.jsonl"
    shutil.copy(good / "rows_0.jsonl", rows)
    content, says = BAD_MANIFESTS[case]
    Path(f"{rows}.manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(*run(name, flags_of(name, good, out, rows), monkeypatch), rf"rows_0\.jsonl\.manifest\.json: .*{says}", out)


@pytest.mark.parametrize("case", BAD_MANIFESTS)
@pytest.mark.parametrize("which", ["sft.jsonl.manifest.json", "sft.jsonl.partial.manifest.json"])
def test_a_manifest_of_the_same_stage_that_is_none(case, which, good, out, monkeypatch):
    content, says = BAD_MANIFESTS[case]
    (out / which).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, said = run("split_for_sft_dpo", flags_of("split_for_sft_dpo", good, out, good / "rows_0.jsonl"), monkeypatch)
    assert status == 2 and len(said) == 1 and which in said[0] and says in said[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"results": []}', '{"results": {"a": {}}}', '{"results": {"a": {"score": "high"}}}', '{"results": {"a": 1, "b": 2}}'])
def test_metrics_of_a_round_that_are_none(tmp_path, content):
    """scripts/rounds.py compares the metrics of several rounds of training."""
    spec = importlib.util.spec_from_file_location("rounds", Path(__file__).parents[2] / "scripts/rounds.py")
    spec.loader.exec_module(rounds := importlib.util.module_from_spec(spec))
    (tmp_path / "0/results").mkdir(parents=True)
    (tmp_path / "0/results/dev.metrics.json").write_text(content)
    with pytest.raises(UserError, match=at("dev.metrics.json")):
        rounds.read_round(tmp_path / "0", "m")


@pytest.mark.parametrize(("manifests", "rows", "says"), [
    ([{"corpus_shard": 7}], None, r"rows_0\.jsonl\.manifest\.json: .*corpus_shard .*\b7\b"), ([{"corpus_shard": "one/two"}], None, r"rows_0\.jsonl\.manifest\.json: .*corpus_shard .*'one/two'"),
    ([{"corpus_shard": "0/2"}], None, r"--corpus_shard 1/2\b"), ([{"corpus_shard": "5/2"}] * 2, None, r"--corpus_shard 0/2\b"),
    ([{"corpus_shard": "0/2"}, {"corpus_shard": "1/2"}], None, r"rows_0\.jsonl\.manifest\.json: .*n_docs .*\bNone\b"),
    ([{"corpus_shard": "0/2", "n_docs": "4"}, {"corpus_shard": "1/2", "n_docs": "4"}], None, r"rows_0\.jsonl\.manifest\.json: .*n_docs .*'4'"),
    ([{"corpus_shard": "0/2", "n_docs": 4}, {"corpus_shard": "1/2", "n_docs": 4}], [row(1)], r"rows_1\.jsonl: "),
    ([{"corpus_shard": "0/2", "n_docs": 4}, {"corpus_shard": "1/2", "n_docs": 4}], [row(n) for n in range(1, 7)], r"rows_0\.jsonl: "),
    ([{"corpus_shard": "0/2", "n_docs": 4}, {"corpus_shard": "1/2", "n_docs": 4}], [row(n) for n in range(2, 7)], r"rows_1\.jsonl: .*'q2'"),
    ([{"corpus_shard": "0/2", "n_docs": 4}, {"corpus_shard": "1/2", "n_docs": 4}],
     [row(n, docs=[{"id": "x", "text": "t"}]) for n in range(1, 6)], r"rows_1\.jsonl: row 'q1': .*score"),
])
def test_parts_of_a_corpus_that_do_not_fit(manifests, rows, says, good, out, monkeypatch):
    for number, arguments in enumerate(manifests):
        path = out.parent / f"rows_{number}.jsonl"
        shutil.copy(good / "rows_0.jsonl", path)
        if number == 1 and rows:
            write_jsonl(path, rows)
        retriever_manifest(path, arguments=arguments)
    assert_refused(*run("aggregate", flags_of("aggregate", good, out, out.parent / "rows_*.jsonl"), monkeypatch), says, out)


