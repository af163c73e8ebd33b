"""Other sources of a ranking, and several of them together: parts of a corpus, BM25, TREC runs, fusion."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import at, logged, names, naming, read_jsonl, write_jsonl
from searching import QUESTIONS, retrieve
from stubs import make_text

import aggregate
import retriever
from dynamicrag.rows.output import Output
from dynamicrag.rows.trec import fuse
from dynamicrag.search import bm25
from dynamicrag.search.passages import open_passages
from dynamicrag.stage import UserError


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


@pytest.fixture
def search(tmp_path, encoder_dir, corpus_tsv, shards_dir, questions):
    """search(NAME, *FLAGS) runs the retriever over the tiny corpus and returns the rows."""
    return lambda name, *flags: retrieve(encoder_dir, corpus_tsv, shards_dir, questions, tmp_path / name, *flags)


def ids(rows):
    return [[doc["id"] for doc in row["docs"]] for row in rows]


# ---------------------------------------------------------------- parts of a corpus


@pytest.mark.parametrize("parts", [2, 7])
def test_parts_of_a_corpus_merge_to_the_whole_search(tmp_path, search, parts):
    whole = search("whole.jsonl", "--n_docs", 25)
    made = [search(f"part_{part}.jsonl", "--n_docs", 25, "--corpus_shard", f"{part}/{parts}") for part in range(parts)]
    assert sum(len(rows[0]["docs"]) for rows in made) == min(25 * parts, 120)
    aggregate.main(["--input_files", f"{tmp_path}/part_*.jsonl", "--output_file", str(tmp_path / "merged.jsonl")])
    assert read_jsonl(tmp_path / "merged.jsonl") == whole
    assert any(len({doc["score"] for doc in row["docs"]}) < 25 for row in whole), "ties are part of the comparison"


def part_files(search, tmp_path, parts=3, **flags):
    for part in range(parts):
        search(f"part_{part}.jsonl", "--n_docs", flags.get(f"n_docs_{part}", 5), "--corpus_shard", f"{part}/{parts}")
    return ["--input_files", f"{tmp_path}/part_*.jsonl", "--output_file", str(tmp_path / "merged.jsonl")]


def test_a_missing_part_of_the_corpus_is_named(tmp_path, search):
    given = part_files(search, tmp_path)
    (tmp_path / "part_2.jsonl").unlink()
    with pytest.raises(UserError, match=naming("2/3", "retriever.py", "--corpus_shard 2/3")):
        aggregate.main(given)


def test_parts_of_two_divisions_are_not_mixed(tmp_path, search):
    given = part_files(search, tmp_path)
    search("part_3.jsonl", "--n_docs", 5)
    with pytest.raises(UserError, match=naming(4, 3)):
        aggregate.main(given)


def test_parts_made_with_other_flags_are_not_merged(tmp_path, search):
    with pytest.raises(UserError, match=at("part_1.jsonl", "n_docs", tmp_path / "part_0.jsonl")):
        aggregate.main(part_files(search, tmp_path, n_docs_1=6))


def test_a_compressed_index_holds_its_part_alone(search, shards_dir):
    for part in (0, 1):
        rows = search(f"ivf_{part}.jsonl", "--index", "IVF2,Flat", "--corpus_shard", f"{part}/2", "--n_docs", 200)
        assert {int(doc["id"][1:]) // 60 for row in rows for doc in row["docs"]} == {part}
    for path in shards_dir.glob("index_*"):
        path.unlink()


# ---------------------------------------------------------------- BM25


def test_bm25_scores(tmp_path, search, corpus):
    """Lucene's formula, computed step by step."""
    rows = search("bm25.jsonl", "--index", "bm25", "--n_docs", 200)
    passages = [bm25.words(f"{passage['title']} {passage['text']}") for passage in corpus]
    mean = sum(map(len, passages)) / len(passages)
    found = 0
    for row, question in zip(rows, QUESTIONS, strict=True):
        expected = {}
        for passage, words in zip(corpus, passages, strict=True):
            score = 0.0
            for word in bm25.words(question["question"]):
                containing = sum(word in other for other in passages)
                idf = math.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5))
                score += idf * words.count(word) / (words.count(word) + 0.9 * (1 - 0.4 + 0.4 * len(words) / mean))
            if score:
                expected[passage["id"]] = score
        got = {doc["id"]: doc["score"] for doc in row["docs"]}
        assert got == pytest.approx(expected, rel=1e-4) and list(got.values()) == sorted(got.values(), reverse=True)
        found += len(got) < len(corpus)
    assert found, "a passage without a word of the question is no document"


def test_bm25_keeps_the_best_and_their_order(tmp_path, search):
    everything = search("all.jsonl", "--index", "bm25", "--n_docs", 200)
    for n_docs in (1, 10):
        assert ids(search(f"{n_docs}.jsonl", "--index", "bm25", "--n_docs", n_docs)) == [row[:n_docs] for row in ids(everything)]
    for row in everything:
        order = [(-doc["score"], int(doc["id"][1:])) for doc in row["docs"]]
        assert order == sorted(order), "equal scores are in the order of the corpus"


def test_bm25_needs_no_embeddings_and_no_encoder(tmp_path, corpus_tsv):
    query = write_jsonl(tmp_path / "q.jsonl", [{"id": "a", "question": "Rivers?"}, {"id": "b", "question": "zzz of the"}])
    retriever.main(["--query", str(query), "--passages", str(corpus_tsv), "--index", "bm25", "--output_file", str(tmp_path / "o.jsonl"),
                    "--model_name_or_path", "nowhere", "--passages_embeddings", "nothing/*"])
    stemmed, unknown = read_jsonl(tmp_path / "o.jsonl")
    assert len(stemmed["docs"]) == 50 and all("river" in doc["text"] for doc in stemmed["docs"]) and unknown["docs"] == []


def test_bm25_is_built_once_for_a_corpus(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "text": "oil"}, {"id": 2, "text": "gas"}])
    kept = bm25.open_bm25(open_passages(path)), (tmp_path / "c.jsonl.store" / "bm25").stat().st_mtime_ns
    bm25.open_bm25(open_passages(path))
    assert (tmp_path / "c.jsonl.store" / "bm25").stat().st_mtime_ns == kept[1]
    write_jsonl(path, [{"id": 1, "text": "gas"}, {"id": 2, "text": "gas"}, {"id": 3, "text": "oil"}])
    assert bm25.open_bm25(open_passages(path)).search(["oil"], 3)[1].tolist() == [[2, -1, -1]]
    write_jsonl(path, [{"id": 1, "text": "the of"}])
    with pytest.raises(UserError, match=at("c.jsonl.store")):
        bm25.open_bm25(open_passages(path))


# ---------------------------------------------------------------- runs and fusion


def trec(path, rankings):
    path.write_text("".join(f"{query} Q0 {doc} {rank} {score} other\n" for query, docs in rankings.items()
                            for rank, (doc, score) in enumerate(docs, start=1)))
    return path


def test_documents_of_another_system(tmp_path, search, corpus, caplog):
    run = trec(tmp_path / "other.trec", {"q3": [("p7", 3.5), ("p2", 3.5), ("p9", -1)], "q0": [("p1", 0.1)], "elsewhere": [("p1", 1)]})
    rows = search("run.jsonl", "--run", run, "--n_docs", 2)
    assert ids(rows) == [["p1"], [], [], ["p7", "p2"], *[[]] * 7]
    assert rows[3]["docs"][1] == {**corpus[2], "score": 3.5}
    assert logged(caplog, "other.trec", 9, 11) == 1
    with pytest.raises(UserError, match=at("other.trec", "'p999'", "'q1'")):
        search("x.jsonl", "--run", trec(tmp_path / "other.trec", {"q1": [("p1", 2), ("p999", 1)]}), "--overwrite")


def test_fusion_is_by_reciprocal_rank():
    first = np.array([[4, 2, 9], [1, -1, -1]])
    second = np.array([[2, 7], [3, 1]])
    scores, positions = fuse([first, second], 4)
    assert positions.tolist() == [[2, 4, 7, 9], [1, 3, -1, -1]]
    np.testing.assert_allclose(scores, [[1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], [1 / 61 + 1 / 62, 1 / 61, 0, 0]], rtol=1e-6)
    assert fuse([first, second], 1)[1].tolist() == [[2], [1]]
    assert fuse([np.array([[8, 5]]), np.array([[5, 8]])], 2)[1].tolist() == [[5, 8]], "a tie is in the order of the corpus"


def test_indexes_and_runs_fuse_in_one_search(tmp_path, search):
    flat, words = ids(search("a.jsonl", "--n_docs", 30)), ids(search("b.jsonl", "--index", "bm25", "--n_docs", 30))
    run = {f"q{number}": [("p5", 1.0)] for number in range(11)}
    fused = search("c.jsonl", "--index", "flat", "bm25", "--run", trec(tmp_path / "r.trec", run), "--n_docs", 30)
    for row, *rankings in zip(fused, flat, words, [["p5"]] * 11, strict=True):
        worth = Counter()
        for ranking in rankings:
            worth.update({doc: 1 / (60 + rank) for rank, doc in enumerate(ranking, start=1)})
        expected = sorted(worth, key=lambda doc: (-worth[doc], int(doc[1:])))[:30]
        assert [doc["id"] for doc in row["docs"]] == expected
        assert row["docs"][0]["score"] == pytest.approx(worth[expected[0]])


@pytest.mark.parametrize("flags, named", [
    (["--corpus_shard", "2/2"], ["--corpus_shard 2/2"]), (["--corpus_shard", "x"], ["--corpus_shard x"]), (["--corpus_shard", "0/0"], ["--corpus_shard 0/0"]),
    (["--corpus_shard", "0/2", "--index", "flat", "bm25"], ["--corpus_shard", "BM25"]), (["--corpus_shard", "0/2", "--run", "x"], ["--corpus_shard"]),
    (["--corpus_shard", "0/2", "--index", "flat", "HNSW8"], ["--corpus_shard", "--index_path"]), (["--index", "SQ8", "HNSW8", "--index_path", "x"], ["--index_path"]),
    (["--index"], ["--index", "--run"]), (["--questions_per_pass", "0"], ["--questions_per_pass", 1]),
])
def test_flags_that_do_not_go_together(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        retriever.parse_args(flags)
    assert stopped.value.code == 2 and names(capsys.readouterr().err.splitlines()[-1], *named)


def test_the_default_is_exact_search():
    assert retriever.parse_args([]).index == ["flat"] and retriever.parse_args(["--run", "x"]).index == []


def test_an_index_of_another_part_is_refused(tmp_path, search):
    search("a.jsonl", "--index", "IVF2,Flat", "--index_path", tmp_path / "kept.faiss", "--corpus_shard", "0/2")
    with pytest.raises(UserError, match=at("kept.faiss")):
        search("b.jsonl", "--index", "IVF2,Flat", "--index_path", tmp_path / "kept.faiss", "--corpus_shard", "1/2")


def test_a_run_of_other_questions_is_refused(tmp_path, search):
    run = trec(tmp_path / "r.trec", {"other": [("p1", 1)]})
    for name, *flags in [("a.jsonl",), ("b.jsonl", "--index", "flat")]:
        with pytest.raises(UserError, match=at("r.trec", 11, "questions.jsonl")):
            search(name, "--run", run, *flags)
        assert not list(tmp_path.glob(f"{name}*")), "refused before the search"


def test_a_run_of_a_few_questions_continues_where_it_has_none(tmp_path, search, monkeypatch):
    """The check is whether the run has any question of the file, not any of the questions that are left."""
    flags = ("--run", trec(tmp_path / "r.trec", {"q1": [("p1", 1)]}), "--questions_per_pass", 4)
    whole, attach = search("whole.jsonl", *flags), retriever.attach_docs

    def fail_later(rows, *rest):
        if rows[0]["id"] == "q4":
            raise KeyboardInterrupt
        return attach(rows, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(retriever, "attach_docs", fail_later)
        search("torn.jsonl", *flags)
    assert search("torn.jsonl", *flags) == whole


def test_vectors_stay_with_their_questions(tmp_path, encoder_dir, corpus_tsv, shards_dir):
    """A row that is valid only with --dataset is encoded and searched at the same place."""
    rows = [{"id": "bad", "question": ""}, {"id": "a", "question": "oil", "dataset": 7}, {"id": "b", "question": "river"}]
    flags = ("--on_error", "skip", "--dataset", "nq", "--n_docs", 5)
    found = retrieve(encoder_dir, corpus_tsv, shards_dir, write_jsonl(tmp_path / "q.jsonl", rows), tmp_path / "o.jsonl", *flags)
    alone = [{"id": "a", "question": "oil"}, {"id": "b", "question": "river"}]
    expected = retrieve(encoder_dir, corpus_tsv, shards_dir, write_jsonl(tmp_path / "p.jsonl", alone), tmp_path / "e.jsonl", *flags)
    assert ids(found) == ids(expected) and len(found) == 2
    assert not (tmp_path / "o.jsonl.queries.npy").exists()


def test_a_row_is_searched_with_its_own_vector_whichever_rows_are_skipped(search, monkeypatch):
    """Here a continued run gets the first rows last, and the number of finished rows is not kept."""
    expected = {row["id"]: row["docs"] for row in search("whole.jsonl", "--n_docs", 5)}
    assert len({json.dumps(docs) for docs in expected.values()}) > 5
    chunks = Output.chunks

    def first_rows_last(output, rows, size):
        first, *others = chunks(output, rows, size)
        for chunk in (*others, first):
            output.rows = 0
            yield chunk

    monkeypatch.setattr(Output, "chunks", first_rows_last)
    rows = search("skipped.jsonl", "--n_docs", 5, "--questions_per_pass", 4)
    assert [row["id"] for row in rows] == [f"q{number}" for number in (4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3)]
    assert {row["id"]: row["docs"] for row in rows} == expected


def test_no_two_runs_write_one_output(tmp_path, search, monkeypatch):
    """The second run is refused before it overwrites the vectors of the first one."""
    encode, tried = retriever.encode_questions, []

    def while_encoding(*given):
        encode(*given)
        if not tried:
            tried.append(1)
            with pytest.raises(UserError, match=at("a.jsonl.partial")):
                search("a.jsonl", "--n_docs", 5)
            tried.append(2)

    monkeypatch.setattr(retriever, "encode_questions", while_encoding)
    assert len(search("a.jsonl", "--n_docs", 5)) == 11 and tried == [1, 2]


def test_more_parts_than_vectors(tmp_path, search):
    with pytest.raises(UserError, match=naming(120, 500)):
        search("a.jsonl", "--corpus_shard", "0/500")


def test_embeddings_in_another_order_than_the_corpus(tmp_path, encoder_dir, corpus, shards_dir, questions):
    """A vector belongs to the passage with its id, not to the passage at its place."""
    expected = retrieve(encoder_dir, write_jsonl(tmp_path / "a.jsonl", corpus), shards_dir, questions, tmp_path / "x.jsonl", "--n_docs", 9)
    shuffled = [*random.Random(0).sample(corpus, len(corpus)), {"id": "more", "title": "", "text": make_text(random.Random(1))}]
    rows = retrieve(encoder_dir, write_jsonl(tmp_path / "b.jsonl", shuffled), shards_dir, questions, tmp_path / "y.jsonl", "--n_docs", 9)
    assert json.dumps(rows) == json.dumps(expected)
