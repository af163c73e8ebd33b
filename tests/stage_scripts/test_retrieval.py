"""From questions and a corpus to questions with documents: split, embed, search, aggregate."""

import gzip
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import at, logged, naming, read_jsonl, write_jsonl
from searching import QUESTIONS, embed, retrieve
from stubs import make_text

import aggregate
import generate_passage_embeddings
import retriever
import split_data
from dynamicrag.files.paths import matching
from dynamicrag.models.batches import length_batches
from dynamicrag.models.encoder import Encoder
from dynamicrag.search.corpus import read_passages
from dynamicrag.search.index import FaissIndex, open_index
from dynamicrag.search.passages import open_passages
from dynamicrag.search.pickled import read_pickled
from dynamicrag.search.shards import Shard, find_shards, open_shards
from dynamicrag.stage import UserError


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.fixture
def shards(tmp_path, shards_dir) -> Path:
    """A copy of the shards that a test may damage."""
    return shutil.copytree(shards_dir, tmp_path / "shards")


def plain_vector(folder, text, normalize=False):
    """The vector of one text without a batch: the mean over all its tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=128)
    with torch.no_grad():
        vector = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state[0].mean(dim=0).numpy()
    return vector / np.linalg.norm(vector) if normalize else vector


# ---------------------------------------------------------------- splitting


def split(tmp_path, rows, parts, *flags):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": str(number), "question": "q"} for number in range(rows)])
    split_data.main(["--input_file", str(source), "--output_dir", str(tmp_path / "splits"), "--num_splits", str(parts), *flags])
    names = sorted((tmp_path / "splits").glob("split_*.json"), key=lambda path: (len(path.name), path.name))
    return [[row["id"] for row in json.loads(path.read_text())] for path in names if "manifest" not in path.name]


@pytest.mark.parametrize("rows, parts, sizes", [
    (9, 8, [2, 1, 1, 1, 1, 1, 1, 1]), (3, 8, [1, 1, 1]), (8, 8, [1] * 8), (23, 11, [3] + [2] * 10), (5, 1, [5]),
])
def test_parts_are_balanced_and_contiguous(tmp_path, rows, parts, sizes, caplog):
    made = split(tmp_path, rows, parts)
    assert [len(part) for part in made] == sizes
    assert list(chain(*made)) == [str(number) for number in range(rows)]
    assert logged(caplog, 3, 8) == logged(caplog) == (rows < parts)


def test_parts_of_a_larger_split_are_not_picked_up(tmp_path):
    split(tmp_path, 9, 8)
    with pytest.raises(UserError, match=naming("num_splits", 8, 2)):
        split(tmp_path, 9, 2)
    (tmp_path / "splits" / "split_0.json").unlink()
    (tmp_path / "splits" / "split_0.json.manifest.json").unlink()
    (tmp_path / "splits" / "split_1.json").unlink()
    with pytest.raises(UserError, match=at("split_2.json", 2)):
        split(tmp_path, 9, 2)
    assert [len(part) for part in split(tmp_path, 9, 2, "--overwrite")] == [5, 4]
    assert len(list((tmp_path / "splits").iterdir())) == 4, "two parts and their manifests"


def test_nothing_to_split(tmp_path):
    with pytest.raises(UserError, match=at("in.jsonl")):
        split(tmp_path, 0, 2)


# ---------------------------------------------------------------- the corpus


def passages_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_passages(path))


def test_tsv_with_everything_in_it(tmp_path):
    content = '\ufeffid\ttext\ttitle\r\n1\t"two\nlines\tand a ""quote"""\tTitle\r\n\r\n02\tplain\t\r\n'
    assert passages_of(tmp_path / "a.tsv", content) == [("1", "Title", 'two\nlines\tand a "quote"'), ("02", "", "plain")]
    assert passages_of(tmp_path / "b.tsv", "title\tid\ttext\nT\t1\t" + "x" * 1_000_000)[0][2] == "x" * 1_000_000


@pytest.mark.parametrize(("name", "content"), [
    ("psgs_w100.tsv.gz", 'id\ttext\ttitle\n1\t"two\nlines"\tT\n'), ("wiki.jsonl.gz", '{"id": "1", "contents": "\\"T\\"\\ntwo\\nlines"}\n'),
    ("wiki.json.gz", '[{"id": "1", "title": "T",\n"text": "two\\nlines"}]'),
])
def test_a_corpus_is_read_as_it_is_published(tmp_path, name, content):
    packed = gzip.compress(content.encode())
    assert passages_of(tmp_path / name, packed) == [("1", "T", "two\nlines")] == list(read_passages(tmp_path))
    for broken in (packed[:-9], packed[:12] + b"\xff\xff" + packed[14:], content.encode()):
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}"):
            passages_of(tmp_path / name, broken)


@pytest.mark.parametrize("name, content, said", [
    ("a.parquet.gz", "x", at("a.parquet.gz", ".tsv")),
    ("a.tsv", "1\ttext\ttitle\n", at("a.tsv:1", "['1', 'text', 'title']")), ("a.tsv", "", at("a.tsv:1", "[]")),
    ("a.tsv", "id\ttext\ttitle\n1\tx\ty\n2\tx\n", at("a.tsv:3", 3, 2)),
    ("a.tsv", 'id\ttext\ttitle\n1\t"x\ty\n2\tx\ty\n', at("a.tsv:2", '"')), ("a.tsv", 'id\ttext\ttitle\n1\tx\ty\n2\t"x" z\ty\n', at("a.tsv:3", '"')),
    ("a.tsv", b"id\ttext\ttitle\n1\tx\ty\n2\t\xff\ty\n", at("a.tsv:3", "UTF-8")), ("a.tsv", "id\ttext\ttitle\n\tx\ty\n", at("a.tsv:2: key 'id'")),
    ("a.jsonl", '{"id": 1, "text": "x"}\n{"id": 1.5, "text": "x"}\n', at("a.jsonl:2: key 'id'", 1.5)),
    ("a.jsonl", '{"id": 1}\n', at("a.jsonl:1: key 'text'")), ("a.jsonl", '{"id": 1, "text": "x", "title": 3}\n', at("a.jsonl:1: key 'title'")),
    ("a.jsonl", '"x"\n', at("a.jsonl:1")), ("a.parquet", "no parquet", at("a.parquet")), ("a.txt", "x", at("a.txt", ".tsv")),
])
def test_broken_corpora_are_named_with_the_line(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said):
        passages_of(tmp_path / name, content)


def test_jsonl_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    content = '{"id": 7, "title": "T", "text": "x"}\r\n{"_id": "a", "contents": "\\"Name\\"\\nthe text"}\n{"docid": "é", "text": ""}\n'
    passages = [("7", "T", "x"), ("a", "Name", "the text"), ("é", "", "")]
    assert passages_of(tmp_path / "a.jsonl", content) == passages
    columns = {"id": [7, 8], "title": ["T", None], "text": ["x", "y"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    assert list(read_passages(tmp_path / "b.parquet")) == [("7", "T", "x"), ("8", "", "y")]
    assert list(read_passages(tmp_path)) == [*passages, ("7", "T", "x"), ("8", "", "y")]
    store = open_passages(tmp_path / "a.jsonl")
    assert store.positions(["é", "7", "07", "", "a"]).tolist() == [2, 0, -1, -1, 1]
    assert store.docs([2, 0]) == [{"id": "é", "title": "", "text": ""}, {"id": "7", "title": "T", "text": "x"}]


def test_a_store_that_is_a_link_lies_where_the_link_leads(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "a.jsonl.store").symlink_to("large/store")
    for text in ("old", "new"):
        path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": text}])
        assert open_passages(path).docs([0])[0]["text"] == text and (tmp_path / "a.jsonl.store").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.store", "large"]


def test_store_follows_the_corpus(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "old"}])
    assert open_passages(path).docs([0])[0]["text"] == "old"
    made = (tmp_path / "a.jsonl.store" / "passages.arrow").stat().st_mtime_ns
    open_passages(path)
    assert (tmp_path / "a.jsonl.store" / "passages.arrow").stat().st_mtime_ns == made, "built once"
    write_jsonl(path, [{"id": 1, "text": "new"}])
    assert open_passages(path).docs([0])[0]["text"] == "new"
    write_jsonl(path, [{"id": 1, "text": "x"}, {"id": 2, "text": "x"}, {"id": "1", "text": "y"}])
    with pytest.raises(UserError, match=at("a.jsonl", 1, 3, "'1'")):
        open_passages(path)


# ---------------------------------------------------------------- embedding


def test_batches_stay_within_the_budget():
    lengths = [random.Random(number).randint(1, 50) for number in range(200)] + [900]
    batches = length_batches(lengths, 400)
    assert sorted(chain(*batches)) == list(range(201)) and batches[0] == [200]
    assert all(len(batch) * max(lengths[n] for n in batch) <= 400 for batch in batches[1:])
    padded = sum(len(batch) * max(lengths[n] for n in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_the_mean_over_real_tokens(encoder_dir, corpus, normalize):
    encoder = Encoder(str(encoder_dir), "cpu", "float32", 512, normalize)
    texts = [*(passage["text"] for passage in corpus[:20]), "", "river " * 200_000]
    vectors = encoder.encode(texts, batch_tokens=300)
    expected = np.stack([plain_vector(encoder_dir, text[:20_000], normalize) for text in texts])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert encoder.seen_tokens < encoder.padded_tokens < 2 * encoder.seen_tokens


def test_embeddings_in_the_order_of_the_corpus(encoder_dir, corpus, shards_dir):
    shards = open_shards(find_shards(f"{shards_dir}/*"))
    assert [len(shard.ids) for shard in shards] == [60, 60]
    assert [passage_id.decode() for shard in shards for passage_id in shard.ids] == [passage["id"] for passage in corpus]
    for number in (0, 59, 60, 119):
        expected = plain_vector(encoder_dir, f"{corpus[number]['title']} {corpus[number]['text']}")
        np.testing.assert_allclose(shards[number // 60].vectors[number % 60], expected, atol=2e-3)
        assert shards[number // 60].vectors.dtype == np.float16


@pytest.mark.parametrize("windows_done, tear", [(0, b""), (0, b"\x93NUM"), (1, b""), (3, b"\x01" * 77)])
def test_embedding_interrupted(tmp_path, encoder_dir, corpus_tsv, windows_done, tear, monkeypatch):
    monkeypatch.setattr(generate_passage_embeddings, "WINDOW", 32)
    embed(encoder_dir, corpus_tsv, tmp_path / "whole")
    calls = []
    encode = Encoder.encode_tokens

    def fail_later(self, texts, *rest):
        if len(calls) == windows_done:
            raise KeyboardInterrupt
        calls.append(len(texts))
        return encode(self, texts, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, "encode_tokens", fail_later)
        embed(encoder_dir, corpus_tsv, tmp_path / "torn")
    partial = tmp_path / "torn" / "passages_00.npy.partial"
    if tear.startswith(b"\x93"):
        partial.write_bytes(tear)
    else:
        with partial.open("ab") as file:
            file.write(tear)
    with pytest.raises(UserError, match=at("passages_00.npy.partial")):
        find_shards(f"{tmp_path}/torn/*")
    embed(encoder_dir, corpus_tsv, tmp_path / "torn")
    names = {"passages_00.npy", "passages_00.npy.manifest.json", "passages_00.ids.npy", "passages_00.ids.npy.manifest.json"}
    assert set(os.listdir(tmp_path / "torn")) == names
    for name in ("passages_00.npy", "passages_00.ids.npy"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def contriever_checkpoint(path, encoder_dir, prefix, **extra):
    import argparse

    import torch
    from transformers import AutoModel

    weights = {f"{prefix}{name}": value for name, value in AutoModel.from_pretrained(encoder_dir).state_dict().items()}
    weights["queue_ptr"] = torch.zeros(1)
    torch.save({"model": weights, "opt": argparse.Namespace(retriever_model_id=str(encoder_dir)), **extra}, path)


@pytest.mark.parametrize("prefix", ["encoder_q.", "encoder.", ""])
def test_contriever_checkpoints(tmp_path, encoder_dir, prefix):
    contriever_checkpoint(tmp_path / "checkpoint.pth", encoder_dir, prefix)
    text = "which river has the longest name"
    vectors = Encoder(str(tmp_path), "cpu", "float32").encode([text])
    np.testing.assert_allclose(vectors[0], plain_vector(encoder_dir, text), atol=1e-5)


class Bomb:
    """An object of a hostile file. If it is unpickled, it writes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_a_checkpoint_never_runs_code(tmp_path, encoder_dir):
    canary = tmp_path / "canary"
    contriever_checkpoint(tmp_path / "checkpoint.pth", encoder_dir, "", bomb=Bomb(canary))
    with pytest.raises(UserError, match=at("checkpoint.pth")):
        Encoder(str(tmp_path), "cpu", "float32")
    assert not canary.exists()


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("n_docs, block", [(7, 65536), (50, 13), (200, 13)])
def test_exact_search_equals_brute_force(tmp_path, encoder_dir, corpus, corpus_tsv, shards_dir, questions, n_docs, block, monkeypatch):
    monkeypatch.setattr("dynamicrag.search.exact.BLOCK_VECTORS", block)
    rows = retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "new" / "out.jsonl", "--n_docs", n_docs)
    vectors = np.concatenate([np.load(shards_dir / f"passages_0{shard}.npy") for shard in (0, 1)]).astype(np.float32)
    for row, question in zip(rows, QUESTIONS, strict=True):
        scores = vectors @ plain_vector(encoder_dir, question["question"])
        expected = sorted(range(120), key=lambda number: (-round(float(scores[number]), 3), number))[:n_docs]
        got = [doc["score"] for doc in row["docs"]]
        assert len(got) == min(n_docs, 120) and got == sorted(got, reverse=True)
        np.testing.assert_allclose(got, scores[expected], atol=2e-3)
        numbers = [int(doc["id"][1:]) for doc in row["docs"]]
        np.testing.assert_allclose(got, scores[numbers], atol=2e-3)
        assert len(set(numbers)) == len(numbers)
        for doc, number in zip(row["docs"], numbers, strict=True):
            assert {key: doc[key] for key in ("id", "title", "text")} == corpus[number]


def test_equal_scores_are_in_the_order_of_the_corpus(tmp_path, encoder_dir, corpus, corpus_tsv, shards_dir):
    query = write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "question": f"{corpus[3]['title']} {corpus[3]['text']}"}])
    row, = retrieve(encoder_dir, corpus_tsv, shards_dir, query, tmp_path / "out.jsonl", "--n_docs", 120)
    ids = [doc["id"] for doc in row["docs"]]
    assert ids.index("p40") == ids.index("p3") + 1


def test_retrieved_question_and_rows_with_documents(tmp_path, encoder_dir, corpus_tsv, shards_dir):
    query = write_jsonl(tmp_path / "q.jsonl", [
        {"id": "a", "question": "river", "ctxs": [{"id": "old", "text": "old"}], "extra": 1}, {"id": "b", "question": "oil"},
        {"id": "c", "question": "oil", "retrieved_question": "river"}, {"id": "d", "question": "oil", "retrieved_question": ""},
    ])
    a, b, c, d = retrieve(encoder_dir, corpus_tsv, shards_dir, query, tmp_path / "out.jsonl", "--n_docs", 5, "--dataset", "nq")
    assert a["docs"] == c["docs"] != b["docs"] == d["docs"]
    assert len(a["docs"]) == 5 and "ctxs" not in a and a["extra"] == 1 and a["dataset"] == "nq"


def test_integer_ids_resolve(tmp_path, encoder_dir, questions):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": number * 3, "title": "T", "text": make_text(random.Random(number))} for number in range(30)])
    embed(encoder_dir, corpus, tmp_path / "e")
    rows = retrieve(encoder_dir, corpus, tmp_path / "e", questions, tmp_path / "out.jsonl", "--n_docs", 50)
    assert {doc["id"] for doc in rows[0]["docs"]} == {str(number * 3) for number in range(30)}


def test_retrieval_interrupted(tmp_path, encoder_dir, corpus_tsv, shards_dir, questions, monkeypatch):
    retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "whole.jsonl", "--questions_per_pass", 4)
    attach, calls = retriever.attach_docs, []

    def fail_later(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return attach(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(retriever, "attach_docs", fail_later)
        retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "torn.jsonl", "--questions_per_pass", 4)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(retriever, "attach_docs", lambda *given: (calls.append(1), attach(*given))[1])
        retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "torn.jsonl", "--questions_per_pass", 4)
    assert len(calls) == 1, "two of three chunks were kept"
    assert (tmp_path / "torn.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_malformed_questions(tmp_path, encoder_dir, corpus_tsv, shards_dir):
    query = write_jsonl(tmp_path / "q.jsonl", [QUESTIONS[0], {"id": "x", "question": ""}, QUESTIONS[1]])
    with pytest.raises(UserError, match=r"q\.jsonl:2: key 'question'"):
        retrieve(encoder_dir, corpus_tsv, shards_dir, query, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists() and not (tmp_path / "a.jsonl.partial").exists(), "said before the search"
    rows = retrieve(encoder_dir, corpus_tsv, shards_dir, query, tmp_path / "b.jsonl", "--on_error", "skip")
    assert [row["id"] for row in rows] == ["q0", "q1"]
    assert read_jsonl(tmp_path / "b.jsonl.rejected.jsonl")[0]["line"] == 2


# ---------------------------------------------------------------- faiss


def test_a_faiss_index_is_kept_and_tied_to_its_shards(tmp_path, encoder_dir, corpus_tsv, shards, questions, monkeypatch):
    kept = tmp_path / "new" / "ivf.faiss"
    flags = ("--index", "IVF4,Flat", "--index_path", kept, "--n_docs", 9)
    exact = retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "exact.jsonl", "--n_docs", 9)
    rows = retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "a.jsonl", *flags)
    assert rows == exact, "all four lists are probed: nothing can be missed, and scores are exact"
    made = kept.stat().st_mtime_ns
    retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "b.jsonl", *flags)
    assert kept.stat().st_mtime_ns == made, "built once"
    vectors = np.load(shards / "passages_01.npy")
    vectors[0] = 0
    np.save(shards / "passages_01.npy", vectors)
    with pytest.raises(UserError, match=at("ivf.faiss")):
        retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "c.jsonl", *flags)


def test_hits_that_faiss_does_not_find_are_no_documents(tmp_path, encoder_dir, corpus_tsv, shards, questions):
    flags = ("--index", "IVF8,Flat", "--nprobe", 1, "--n_docs", 60)
    rows = retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "a.jsonl", *flags)
    assert all(0 < len(row["docs"]) < 60 for row in rows)
    assert all(doc["score"] > -1e30 for row in rows for doc in row["docs"])
    assert any((shards / name).suffix == ".faiss" for name in os.listdir(shards)), "kept beside the shards by default"
    retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "b.jsonl", "--n_docs", 3)  # and is not taken for a shard


def test_a_coarse_index_proposes_and_the_vectors_decide(tmp_path, encoder_dir, corpus_tsv, shards, questions):
    exact = retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "exact.jsonl", "--n_docs", 120)
    rows = retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "a.jsonl", "--index", "PQ2x2", "--n_docs", 30)
    assert rows == [{**row, "docs": row["docs"][:30]} for row in exact], "four times 30 candidates are the whole corpus"
    rows = retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "b.jsonl", "--index", "PQ2x2", "--n_docs", 5)
    for row, expected in zip(rows, exact, strict=True):
        scores = {doc["id"]: doc["score"] for doc in expected["docs"]}
        assert all(doc["score"] == scores[doc["id"]] for doc in row["docs"])


def test_other_factory_strings(shards):
    opened = open_shards(find_shards(f"{shards}/*"))
    queries = np.array(opened[0].vectors[:5], dtype=np.float32)
    index = open_index(opened, "HNSW8")
    assert isinstance(index, FaissIndex) and index.search(queries, 500)[1].shape == (5, 120)
    with pytest.raises(UserError, match=at("--index Nonsense7")):
        open_index(opened, "Nonsense7")
    with pytest.raises(UserError, match=at("--index IVF5000,Flat", 120)):
        open_index(opened, "IVF5000,Flat")


# ---------------------------------------------------------------- wrong shards


def refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, said):
    with pytest.raises(UserError, match=said):
        retrieve(encoder_dir, corpus_tsv, shards, questions, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl.partial").exists(), "refused before the search"


def test_shards_of_another_width(tmp_path, encoder_dir, corpus_tsv, shards, questions):
    np.save(shards / "passages_01.npy", np.zeros((60, 48), np.float16))
    refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, at("passages_01.npy", 48, 32))


def test_shards_of_another_corpus(tmp_path, encoder_dir, corpus_tsv, shards, questions):
    ids = np.load(shards / "passages_01.ids.npy")
    ids[7] = b"zz"
    np.save(shards / "passages_01.ids.npy", ids)
    refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, at("passages_01.npy", 1, 60, "'zz'"))


def test_shards_given_twice(tmp_path, encoder_dir, corpus_tsv, shards, questions):
    for name in ("passages_01.npy", "passages_01.ids.npy"):
        shutil.copy(shards / name, shards / name.replace("01", "02"))
    refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, naming(60, "passages_00.npy", 2))


def test_missing_shards(tmp_path, encoder_dir, corpus_tsv, shards, questions):
    for name in os.listdir(shards):
        if name.startswith("passages_00"):
            (shards / name).unlink()
    refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, naming(0, 2, "generate_passage_embeddings.py"))
    for name in os.listdir(shards):
        (shards / name).unlink()
    refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, naming("generate_passage_embeddings.py"))


@pytest.mark.parametrize("content", [b"", b"no array at all", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"])
def test_broken_shards(tmp_path, encoder_dir, corpus_tsv, shards, questions, content):
    (shards / "passages_01.npy").write_bytes(content)
    refused(tmp_path, encoder_dir, corpus_tsv, shards, questions, at("passages_01.npy"))


# ---------------------------------------------------------------- published shards


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_published_shards(tmp_path, encoder_dir, corpus, corpus_tsv, shards_dir, questions, protocol, module, monkeypatch):
    published = tmp_path / "published"
    published.mkdir()
    reconstruct = np.empty(0).__reduce__()[0]
    monkeypatch.setattr(reconstruct, "__module__", module, raising=False)
    for shard in (0, 1):
        vectors = np.load(shards_dir / f"passages_0{shard}.npy")
        with (published / f"passages_0{shard}").open("wb") as file:
            pickle.dump(([passage["id"] for passage in corpus[shard * 60 :][:60]], vectors), file, protocol=protocol)
    ids, vectors = read_pickled(published / "passages_01")
    assert ids[0] == "p60" and vectors.dtype == np.float16 and (vectors == np.load(shards_dir / "passages_01.npy")).all()
    expected = retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "own.jsonl", "--n_docs", 5)
    for name in ("first", "second"):  # the second run reads the converted copies, which do not count as further shards
        assert retrieve(encoder_dir, corpus_tsv, published, questions, tmp_path / f"{name}.jsonl", "--n_docs", 5) == expected


def test_a_published_shard_that_is_replaced_is_converted_again(tmp_path):
    """The new file may be older, as a copy that keeps the times is."""
    shard = tmp_path / "passages_00"
    for number, age in ((1, 0), (2, 1000), (3, 2000)):
        shard.write_bytes(pickle.dumps((["a"], np.full((1, 2), number, np.float16))))
        os.utime(shard, (shard.stat().st_mtime - age,) * 2)
        for _ in range(2):
            [opened] = open_shards(find_shards(str(tmp_path)))
            assert opened.vectors.tolist() == [[number, number]]


def test_a_pickle_never_runs_code(tmp_path, encoder_dir, corpus_tsv, questions):
    canary = tmp_path / "canary"
    (tmp_path / "e").mkdir()
    vectors = np.zeros((1, 32), np.float16)
    hostile = [(["p0"], Bomb(canary)), ([Bomb(canary)], vectors), Bomb(canary), (["p0"], np.array([Bomb(canary)], dtype=object))]
    for protocol in (0, 2, 4, 5):
        for payload in hostile:
            with (tmp_path / "e" / "passages_00").open("wb") as file:
                pickle.dump(payload, file, protocol=protocol)
            refused(tmp_path, encoder_dir, corpus_tsv, tmp_path / "e", questions, at("passages_00"))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary))).close()
    assert canary.exists(), "the payload is a real one"


@pytest.mark.parametrize("payload", [
    {"a": 1}, (["a"],), (["a"], [1.0]), ([None], np.zeros((1, 2), np.float16)), (["a"], np.zeros((1, 2), np.int64)), "text",
    (["a"], np.zeros((1, 2), ">f2")), (["a"], np.array([["x"]])),
])
@pytest.mark.parametrize("protocol", [4, 5])
def test_other_pickles_are_refused(tmp_path, payload, protocol):
    (tmp_path / "passages_00").write_bytes(pickle.dumps(payload, protocol=protocol))
    with pytest.raises(UserError, match=at("passages_00")):
        read_pickled(tmp_path / "passages_00")


@pytest.mark.parametrize("dump", [pickle.dumps, pickle._dumps])
@pytest.mark.parametrize("module", ["numpy.core.numeric", "numpy._core.numeric"])
def test_an_array_of_protocol_5_has_its_values_in_any_layout(tmp_path, dump, module, monkeypatch):
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    monkeypatch.setattr(values.__reduce_ex__(5)[0], "__module__", module)
    for vectors in (values, np.asfortranarray(values), values[:, ::-1], values.astype(np.float32)):
        for writeable in (True, False):
            vectors = vectors.copy("K")
            vectors.flags.writeable = writeable
            (tmp_path / "passages_00").write_bytes(dump((list("abcd"), vectors), protocol=5))
            ids, found = read_pickled(tmp_path / "passages_00")
            assert ids == list("abcd") and found.dtype == vectors.dtype and (found == vectors).all()


def test_a_pickle_that_announces_more_bytes_than_it_has_reserves_none(tmp_path, request):
    """A bytearray of protocol 5 that announces a gigabyte."""
    (tmp_path / "passages_00").write_bytes(b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b"x")
    code = ("import re, sys; from pathlib import Path\nfrom dynamicrag.search.shards import read_pickled; from dynamicrag.stage import UserError\n"
            "try: read_pickled(Path(sys.argv[1]))\n"
            "except UserError: print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "passages_00"], capture_output=True, text=True, cwd=request.config.rootpath)
    assert int(done.stdout) < 200_000, done.stderr


# ---------------------------------------------------------------- names that could be patterns


@pytest.mark.parametrize("name", ["data[1]", "a*b", "what?"])
def test_a_folder_with_the_name_of_a_pattern_is_that_folder(tmp_path, encoder_dir, corpus_tsv, shards_dir, questions, name):
    """All stages from split_data.py to aggregate.py have their paths in it. Another folder beside it matches its name as a pattern."""
    expected = retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "expected.jsonl", "--n_docs", 5)
    for decoy in ("data1", "axb", "whatx"):
        (tmp_path / decoy).mkdir()
        (tmp_path / decoy / "passages_00.npy").write_bytes(b"not read")
        (tmp_path / decoy / "found_0.jsonl.partial").write_bytes(b"not read")
    folder = tmp_path / name
    shutil.copytree(shards_dir, folder / "embeddings")
    (folder / "corpus").mkdir()
    shutil.copy(corpus_tsv, folder / "corpus/psgs.tsv")
    split_data.main(["--input_file", str(questions), "--output_dir", str(folder / "splits"), "--num_splits", "2"])
    for part in (0, 1):
        retrieve(encoder_dir, folder / "corpus", folder / "embeddings", folder / f"splits/split_{part}.json", folder / f"found_{part}.jsonl", "--n_docs", 5)
    assert find_shards(str(folder / "embeddings")) == find_shards(f"{folder}/embeddings/*") != []
    aggregate.main(["--input_files", str(folder / "found_*.jsonl"), "--splits_dir", str(folder / "splits"), "--output_file", str(folder / "all.jsonl")])
    assert read_jsonl(folder / "all.jsonl") == expected


def test_a_file_with_the_name_of_a_pattern_is_that_file(tmp_path):
    for name in ("a*b_1.json", "axb_1.json", "axb_1.json.partial", "c_2.json"):
        (tmp_path / name).touch()
    assert matching(tmp_path / "a*b_1.json") == [tmp_path / "a*b_1.json"] and matching(tmp_path / "a*b_1.json", ".partial") == []
    assert matching(tmp_path / "?_2.json") == [tmp_path / "c_2.json"] and matching(tmp_path / "*_[12].json", ".partial") == [tmp_path / "axb_1.json.partial"]
    assert matching("") == matching(tmp_path / "none*/x") == []


def test_mapped_not_copied(shards_dir):
    shard, *_ = open_shards(find_shards(f"{shards_dir}/*"))
    assert isinstance(shard, Shard) and isinstance(shard.vectors, np.memmap) and isinstance(shard.ids, np.memmap)


# ---------------------------------------------------------------- aggregating


@pytest.fixture
def workplace(tmp_path, monkeypatch, encoder_dir, corpus_tsv, shards_dir):
    """A folder with 11 questions that 11 workers have retrieved, at the default paths."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_jsonl(Path("data/rag_training_data.json"), QUESTIONS)
    split_data.main(["--num_splits", "11"])
    for number in range(11):
        work(number)
    return tmp_path


def work(number):
    """Write the files of a retriever without a search."""
    from dynamicrag.rows.output import Output
    from dynamicrag.rows.records import read_rows

    source = f"data/splits/split_{number}.json"
    arguments = {"query": source, "overwrite": True, "seed": 1, "on_error": "fail"}
    output = Output(arguments, [f"output/retrieval_split_{number}.json"], [source])
    output.process(read_rows(source), 2, lambda rows: [{**row, "docs": [{"id": "d", "title": "", "text": "t"}]} for row in rows], 1, "")
    output.finish()


def test_aggregate_in_natural_order(workplace):
    aggregate.main([])
    rows = read_jsonl("output/retrieval_data.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in QUESTIONS], "10 comes after 9, not after 1"
    before = Path("output/retrieval_data.jsonl").stat().st_mtime_ns
    aggregate.main([])
    assert Path("output/retrieval_data.jsonl").stat().st_mtime_ns == before


def shard_file(number):
    return Path(f"output/retrieval_split_{number}.json")


def lose(number):
    shard_file(number).unlink()


def interrupt(number):
    shard_file(number).rename(f"{shard_file(number)}.partial")


def lose_manifest(number):
    Path(f"{shard_file(number)}.manifest.json").unlink()


def change_split(number):
    Path(f"data/splits/split_{number}.json").write_text('[{"id": "other", "question": "other"}]')


def lose_split(number):
    Path(f"data/splits/split_{number}.json").unlink()


@pytest.mark.parametrize("damage, number, said", [
    (lose, 4, at("retrieval_split_4.json", "retriever.py")), (lose, 0, at("retrieval_split_0.json", "retriever.py")),
    (lose, 10, at("retrieval_split_10.json", "retriever.py")), (interrupt, 4, at("retrieval_split_4.json.partial")),
    (lose_manifest, 4, at("retrieval_split_4.json", "retriever.py")), (change_split, 4, at("retrieval_split_4.json", "split_4.json", "retriever.py")),
    (lose_split, 10, at("retrieval_split_10.json", "split_10.json")),
])
def test_aggregate_refuses_what_is_not_whole(workplace, damage, number, said):
    damage(number)
    with pytest.raises(UserError, match=said):
        aggregate.main([])
    assert not Path("output/retrieval_data.jsonl").exists()


def test_aggregate_without_splits(workplace):
    shutil.rmtree("data/splits")
    aggregate.main([])
    assert len(read_jsonl("output/retrieval_data.jsonl")) == 11


@pytest.mark.parametrize("rows, said", [
    ([{"id": "q0", "question": "q", "docs": []}], at("retrieval_split_3.json", "'q0'", "output/retrieval_split_0.json")),
    ([{"question": "q", "docs": []}], at("retrieval_split_3.json:1: key 'id'")), ([{"id": "x", "question": "q"}], at("retrieval_split_3.json:1: key 'docs'")),
])
def test_aggregate_never_merges(workplace, rows, said):
    shard_file(3).write_text(json.dumps(rows))
    with pytest.raises(UserError, match=said):
        aggregate.main([])
    assert not Path("output/retrieval_data.jsonl").exists()


def test_no_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=naming("retriever.py")):
        aggregate.main([])


def test_output_flag_has_two_names():
    assert retriever.parse_args(["--output_file", "x"]).output_dir == retriever.parse_args(["--output-dir", "x"]).output_dir == "x"


@pytest.mark.parametrize(("kind", "limit"), [("IndexShardsIVF", 2048), ("GpuIndexIVFFlat", 2048), ("IndexIVFFlat", 5000)])
def test_an_index_on_gpus_is_asked_for_no_more_than_they_return(kind, limit):
    """On several GPUs faiss divides an index as IndexShards, and on one GPU it is a GpuIndex. Both have the limit."""
    asked = []

    def search(self, queries, k):
        asked.append(k)
        return None, np.tile(np.arange(k), (len(queries), 1))

    index = type(kind, (), {"ntotal": 6000, "search": search})()
    vectors = np.ones((6000, 4), dtype=np.float16)
    _, positions = FaissIndex(index, [vectors], candidates=10).search(np.ones((2, 4), dtype=np.float32), 500)
    assert asked == [limit] and positions.shape == (2, 500)


@pytest.mark.parametrize(("device", "flags", "size"), [("cpu", [], 1024), ("cuda", [], 4096), ("cuda:1", [], 4096), ("cuda", ["--questions_per_pass", "7"], 7)])
def test_a_gpu_searches_more_questions_in_a_pass(device, flags, size, monkeypatch, tmp_path, corpus_tsv, encoder_dir, shards_dir, questions):
    sizes = []
    monkeypatch.setattr(retriever, "pick_device", lambda name: device)
    monkeypatch.setattr(retriever, "dense_searches", lambda *given: {"flat": lambda rows: (np.zeros((len(rows), 1)), np.zeros((len(rows), 1), dtype=int))})
    monkeypatch.setattr(retriever.Output, "process", lambda self, rows, size, *rest: sizes.append(size))
    monkeypatch.setattr(retriever.Output, "finish", lambda self, **counts: self.path.write_text(""))
    retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / "out.jsonl", *flags)
    assert sizes == [size]
