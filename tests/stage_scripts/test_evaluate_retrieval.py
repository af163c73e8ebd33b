"""evaluate_retrieval.py and TREC runs: measures against hand-computed numbers and a plain implementation, order, files."""

import errno
import json
import math
import os
import random
import re
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from conftest import at, logged, names, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate_retrieval
from dynamicrag.evaluation.metrics import bootstrap_interval
from dynamicrag.evaluation.retrieval import answer_rank, gold_measures
from dynamicrag.rows.trec import Run, read_qrels, write_run
from dynamicrag.stage import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_docs(ids: str, scores: list[float] | None = None, reranked: list[float] | None = None, **texts: str) -> list[dict]:
    """A document per letter, with falling scores. `texts` are the texts by letter."""
    docs = [{"id": doc_id, "title": "", "text": texts.get(doc_id, "nothing")} for doc_id in ids]
    for number, doc in enumerate(docs):
        doc["score"] = scores[number] if scores else float(-number)
        if reranked:
            doc["rerank_score"] = reranked[number]
    return docs


def make_row(number: int, docs: list[dict] | str = "abcd", **more) -> dict:
    return {"id": f"q{number}", "question": "?", "docs": make_docs(docs) if isinstance(docs, str) else docs, **more}


def run(*files: str, **flags) -> dict:
    """Run the stage. Returns the results of the measures file. Keyword arguments are flags, and a list is several values of a flag."""
    given = [str(word) for flag, value in flags.items() for word in (f"--{flag}", *(value if isinstance(value, list) else [value]))]
    evaluate_retrieval.main(["--results_file", *map(str, files), *given])
    return json.loads(Path(flags.get("output_file", f"{files[0]}.retrieval.json")).read_text())["results"]


def score(rows: list[dict], order: str = "retrieval", **flags) -> dict:
    return run(write_jsonl(Path("r.jsonl"), rows), **flags)["r"][order]


def refused(*files: str, **flags) -> str:
    with pytest.raises(UserError) as error:
        run(*files, **flags)
    return str(error.value)


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------- TREC runs


def written(rows: list[dict], key: str = "score", tag: str = "t") -> Run:
    write_run("x.run", rows, key, tag)
    return Run("x.run")


def test_a_run_is_written_best_first_with_ranks_from_1_and_scores_in_full():
    docs = make_docs("abc", [0.1, 0.30000000000000004, 0.1], [0.5, 1e-300, 0.25])
    assert write_run("x.run", [make_row(1, docs), make_row(2, ""), make_row(3, "é")], "score", "mine") == 4
    assert Path("x.run").read_text(encoding="utf-8").splitlines() == [
        "q1 Q0 b 1 0.30000000000000004 mine", "q1 Q0 a 2 0.1 mine", "q1 Q0 c 3 0.1 mine", "q3 Q0 é 1 0.0 mine",
    ]
    write_run("x.run", [make_row(1, docs)], "rerank_score", "mine")
    assert [line.split()[2:5] for line in Path("x.run").read_text().splitlines()] == [["a", "1", "0.5"], ["c", "2", "0.25"], ["b", "3", "1e-300"]]
    assert not list(Path().glob("*.writing"))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=4).filter(lambda text: text.split() == [text]),
                st.one_of(st.sampled_from([0.0, -0.0, 1.0, 0.1]), st.floats(allow_nan=False, allow_infinity=False, width=32)),
            ),
            max_size=6, unique_by=lambda pair: pair[0],
        ),
        min_size=1, max_size=4,
    )
)
def test_what_is_written_is_read_back_in_the_same_order(pairs):
    rows = [make_row(n, [{"id": doc_id, "score": value} for doc_id, value in found]) for n, found in enumerate(pairs)]
    if not any(pairs):
        return
    back = written(rows)
    assert len(back.query_ids) == sum(map(bool, pairs))
    for n, found in enumerate(pairs):
        assert back.ranking(f"q{n}") == sorted(found, key=lambda pair: -pair[1])


def test_equal_scores_go_by_rank_then_by_file_and_lines_of_a_query_may_be_apart():
    Path("x.run").write_bytes(
        "\ufeffq1 Q0 z 3 1.5 t\r\n\r\nq1\tQ0\tä 2  1.5 t\nq2 0 only 1 -7 t\n\n  q1 Q0 a 2 1.5 t\nq1 Q0 last 1 1e0 t\n \nq3 x y -1 2 t".encode()
    )
    found = Run("x.run")
    assert found.ranking("q1") == [("ä", 1.5), ("a", 1.5), ("z", 1.5), ("last", 1.0)]
    assert found.ranking("q2") == [("only", -7.0)]
    assert found.ranking("q3") == [("y", 2.0)]
    assert found.ranking("q4") == []
    assert set(found.query_ids) == {"q1", "q2", "q3"} and len(found.query_ids) == 3 and "q4" not in found.query_ids


def test_a_run_of_queries_that_alternate_is_read_whole():
    rng = random.Random(3)
    lines = [(f"q{n % 7}", f"d{n}", rng.choice([0.5, 0.25, n / 9])) for n in range(200)]
    rng.shuffle(lines)
    Path("x.run").write_text("".join(f"{query} Q0 {doc} {rank} {value!r} t\n" for rank, (query, doc, value) in enumerate(lines)))
    found = Run("x.run")
    for query in {query for query, _, _ in lines}:
        expected = sorted(((doc, value) for name, doc, value in lines if name == query), key=lambda pair: -pair[1])
        assert found.ranking(query) == expected


def test_memory_does_not_grow_with_the_documents():
    Path("x.run").write_text("".join(f"q{n // 5000} Q0 document-{n} {n} {-n} t\n" for n in range(10_000)))
    tracemalloc.start()
    found = Run("x.run")
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 20_000
    assert len(found.ranking("q1")) == 5000


def test_a_run_says_how_many_of_the_questions_it_lacks_and_refuses_to_lack_them_all(caplog):
    Path("x.run").write_text("q1 Q0 a 1 1 t\nq2 Q0 a 1 1 t\n")
    found = Run("x.run")
    found.check_questions(iter(["q2", "q1"]), "asked.jsonl", "so be it")
    assert not caplog.text, "queries beyond those asked do no harm, nor does the order"
    found.check_questions(iter(["q8", "q2", "q9"]), "asked.jsonl", "so be it")
    assert logged(caplog, "x.run", 2, 3, "so be it") == 1
    with pytest.raises(UserError, match=at("x.run", 2, "asked.jsonl")):
        found.check_questions(iter(["q8", "q9"]), "asked.jsonl", "so be it")


GOOD_LINE = "q1 Q0 d1 1 2.5 t\n"


@pytest.mark.parametrize(
    ("content", "place", "values"),
    [
        (b"", "x.run", []), (b" \n\r\n", "x.run", []), (b"\xef\xbb\xbf", "x.run", []),
        (b"q1 Q0 d2 2 1.5\n", "x.run:3", ["query_id Q0 doc_id rank score tag", 6, 5]), (b"q1 Q0 d2 2 1.5 t extra\n", "x.run:3", [6, 7]),
        (b"q1 Q0 d2 2 high t\n", "x.run:3: field 'score'", ["'high'"]), (b"q1 Q0 d2 2 nan t\n", "x.run:3: field 'score'", ["'nan'"]),
        (b"q1 Q0 d2 2 inf t\n", "x.run:3: field 'score'", []), (b"q1 Q0 d2 2 1e999 t\n", "x.run:3: field 'score'", []),
        (b"q1 Q0 d2 2.0 1.5 t\n", "x.run:3: field 'rank'", ["'2.0'"]), (b"q1 Q0 d2 first 1.5 t\n", "x.run:3: field 'rank'", []),
        (b"q1 Q0 d2 " + b"9" * 400 + b" 1.5 t\n", "x.run:3: field 'rank'", []), (b"q1 Q0 d\xff 2 1.5 t\n", "x.run:3", ["UTF-8"]),
    ],
)
def test_a_broken_run_is_named_by_file_and_line(content, place, values):
    Path("x.run").write_bytes(content if place == "x.run" else GOOD_LINE.encode() + b"\n" + content + GOOD_LINE.encode())
    with pytest.raises(UserError, match=at(place, *values)):
        Run("x.run")


def test_a_missing_run_and_a_folder_are_named():
    with pytest.raises(UserError, match=at("x.run", os.strerror(errno.ENOENT))):
        Run("x.run")
    Path("x.run").mkdir()
    with pytest.raises(UserError, match=at("x.run", os.strerror(errno.EISDIR))):
        Run("x.run")


def test_a_document_twice_for_a_query_is_named_by_both_lines():
    Path("x.run").write_text("q1 Q0 a 1 3 t\nq1 Q0 b 2 2 t\n\nq2 Q0 a 1 3 t\n\n\nq1 Q0 c 3 1 t\nq1 Q0 b 4 0 t\n")
    found = Run("x.run")
    assert found.ranking("q2") == [("a", 3.0)]
    with pytest.raises(UserError, match=at("x.run:8", "'b'", "'q1'", 2)):
        found.ranking("q1")


@pytest.mark.parametrize(
    ("row", "tag", "place"),
    [
        ({**make_row(1), "id": "q 1"}, "t", "x.run: row 'q 1'"), (make_row(1, [{"id": "a\tb", "score": 1.0}]), "t", "x.run: row 'q1', document 'a\\tb'"),
        (make_row(1, [{"id": "a\u00a0b", "score": 1.0}]), "t", "x.run: row 'q1', document 'a\\xa0b'"),
        (make_row(1, [{"id": " a", "score": 1.0}]), "t", "x.run: row 'q1', document ' a'"),
        (make_row(1, [{"id": "", "score": 1.0}]), "t", "x.run: row 'q1', document ''"),
        (make_row(1), "my system", "x.run: tag 'my system'"),
        (make_row(1, [{"id": "a", "score": 1.0}, {"id": "b"}]), "t", "x.run: row 'q1', document 'b'"),
        (make_row(1, [{"id": "a", "score": None}]), "t", "x.run: row 'q1', document 'a'"), (make_row(1, "aba"), "t", "x.run: row 'q1', document 'a'"),
        (make_row(1, ""), "t", "x.run"),
    ],
)
def test_what_a_run_cannot_hold_is_named_and_the_old_file_stays(row, tag, place):
    Path("x.run").write_text("old")
    with pytest.raises(UserError, match=at(place)):
        write_run("x.run", [row], "score", tag)
    assert Path("x.run").read_text() == "old" and not list(Path().glob("*.writing"))


def test_qrels_keep_what_is_relevant():
    Path("q").write_text("q1 0 a 2\nq1 0 b 0\nq2 0 a -1\n\nq3 0 c 1\nq3 0 c 1\n")
    assert read_qrels("q") == {"q1": {"a": 2}, "q3": {"c": 1}}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("q1 a 1", at("q:2", "query_id iteration doc_id relevance", 4, 3)), ("q1 0 a yes", at("q:2: field 'relevance'", "'yes'")),
        ("q1 0 a 1", at("q:2", "'a'", "'q1'", 1, 2)),
    ],
)
def test_broken_qrels_are_named_by_file_and_line(line, says):
    Path("q").write_text(f"q1 0 a 2\n{line}\n")
    assert re.match(says, refused(write_jsonl(Path("r.jsonl"), [make_row(1)]), qrels="q"))


# ---------------------------------------------------------------- gold documents


def test_hand_computed_measures():
    """The gold documents b and d have ranks 2 and 4 of a b c d e. Gold document x is not found. The third question's gold document is first."""
    rows = [
        make_row(1, "abcde", gold_docs=["b", "d"]), make_row(2, "abcde", gold_docs=["x"]), make_row(3, "abcde", gold_docs=["a"]),
        make_row(4, "", gold_docs=["a"]),
    ]
    found = score(rows, k=[1, 2, 4, 50])
    ndcg = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert (found["n"], found["gold"], found["answers"], found["left_out"], found["without_documents"]) == (4, 4, 0, 0, 1)
    assert found["documents"] == 15 / 4
    assert found["measures"] == pytest.approx({
        "R@1": 25.0, "R@2": 100 * 1.5 / 4, "R@4": 50.0, "R@50": 50.0, "nDCG@10": 100 * (ndcg + 1) / 4, "MRR@10": 100 * 1.5 / 4,
    })
    assert list(found["measures"]) == ["R@1", "R@2", "R@4", "R@50", "nDCG@10", "MRR@10"]
    assert found["main"] == "nDCG@10"
    assert (found["low"], found["high"]) == pytest.approx([100 * end for end in bootstrap_interval([ndcg, 0.0, 1.0, 0.0], 42)])


def test_the_eleventh_document_is_behind_the_cutoff_of_ndcg_and_mrr():
    letters = "abcdefghijkl"
    assert score([make_row(1, letters, gold_docs=["j"])])["measures"] == pytest.approx(
        {"R@1": 0, "R@5": 0, "R@10": 100, "R@20": 100, "R@50": 100, "nDCG@10": 100 / math.log2(11), "MRR@10": 10}
    )
    assert score([make_row(1, letters, gold_docs=["k"])])["measures"] == {
        "R@1": 0, "R@5": 0, "R@10": 0, "R@20": 100, "R@50": 100, "nDCG@10": 0, "MRR@10": 0,
    }


def plain_measures(doc_ids: list[str], gold: dict[str, int], cutoffs: list[int]) -> dict[str, float]:
    """The measures by their definitions. A repeated document does not count, but it has a rank."""
    gains = [gold.get(doc_id, 0) if doc_id not in doc_ids[:rank] else 0 for rank, doc_id in enumerate(doc_ids)]

    def dcg(values: list[int]) -> float:
        return sum(value / math.log2(rank + 2) for rank, value in enumerate(values[:10]))

    reciprocal = next((1 / (rank + 1) for rank, gain in enumerate(gains[:10]) if gain), 0.0)
    recall = {f"R@{k}": sum(gain > 0 for gain in gains[:k]) / len(gold) for k in cutoffs}
    return {**recall, "nDCG@10": dcg(gains) / dcg(sorted(gold.values(), reverse=True)), "MRR@10": reciprocal}


IDS = st.sampled_from([*"abcdefgh", "1", "2", "-1", "10", "ä", "nul\0a", "nul\0b", "with space"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(IDS, max_size=20), st.dictionaries(IDS, st.integers(1, 3), min_size=1, max_size=6)), max_size=4),
    st.sets(st.integers(1, 30), min_size=1, max_size=3),
)
def test_measures_of_gold_documents_equal_a_plain_implementation(ranked, cutoffs):
    found = gold_measures(ranked, sorted(cutoffs))
    assert len(found) == len(ranked)
    for measures, (doc_ids, gold) in zip(found, ranked, strict=True):
        expected = plain_measures(doc_ids, gold, sorted(cutoffs))
        assert measures == pytest.approx(expected)
        assert list(measures) == list(expected), "in the order of the table"


def test_a_whole_file_equals_a_plain_implementation_however_it_is_cut_into_chunks(monkeypatch):
    rng = random.Random(11)
    rows = []
    for number in range(40):
        docs = [{"id": f"d{n}", "text": "", "score": rng.choice([0.0, 0.5, 0.75]), "rerank_score": rng.choice([0.1, 0.9])} for n in range(15)]
        rows.append(make_row(number, rng.sample(docs, rng.randrange(16)), gold_docs=[f"d{n}" for n in rng.sample(range(20), rng.randint(1, 4))]))
    results = {}
    for size in (3, 1000):
        monkeypatch.setattr(evaluate_retrieval, "QUESTIONS_PER_CHUNK", size)
        results[size] = run(write_jsonl(Path("r.jsonl"), rows), k=[1, 3, 10])["r"]
    assert results[3] == results[1000]
    for order, key in (("retrieval", "score"), ("reranking", "rerank_score")):
        expected = []
        for row in rows:
            ids = [doc["id"] for doc in sorted(row["docs"], key=lambda doc: -doc[key])]
            expected.append(plain_measures(ids, dict.fromkeys(row["gold_docs"], 1), [1, 3, 10]))
        means = {name: 100 * sum(one[name] for one in expected) / len(rows) for name in expected[0]}
        assert results[3][order]["measures"] == pytest.approx(means)


@pytest.mark.parametrize("ids", ["ba", "ab"])
def test_equal_scores_are_scored_in_the_order_of_the_row(ids):
    """Libraries order equal scores by document id in either direction."""
    for gold, reciprocal in ((ids[0], 100.0), (ids[1], 50.0)):
        found = score([make_row(1, make_docs(ids, [1.0, 1.0]), gold_docs=[gold])], k=[1])["measures"]
        assert (found["MRR@10"], found["R@1"]) == (reciprocal, 100.0 * (reciprocal == 100))


def test_retrieval_order_is_by_score_and_where_one_is_missing_the_rows_own():
    docs = make_docs("abc", [1.0, 3.0, 2.0])
    assert score([make_row(1, docs, gold_docs=["b"])])["measures"]["MRR@10"] == 100
    del docs[0]["score"]
    assert score([make_row(1, docs, gold_docs=["b"])])["measures"]["MRR@10"] == 50


def test_gold_ids_may_be_integers_and_may_be_repeated():
    row = make_row(1, [{"id": 7, "text": "", "score": 2.0}, {"id": "8", "text": "", "score": 1.0}], gold_docs=[8, "8", 9, 8])
    found = score([row], k=[1, 2])["measures"]
    assert (found["R@1"], found["R@2"], found["MRR@10"]) == (0, 50, 50)


@pytest.mark.parametrize("key", ["passage_id", "psg_id", "id"])
def test_positive_ctxs_are_gold_documents(key):
    row = make_row(1, "ab", positive_ctxs=[{key: "b", "title": "t"}])
    assert score([row])["measures"]["MRR@10"] == 50
    assert score([{**row, "gold_docs": ["a"]}])["measures"]["MRR@10"] == 100  # documents with these scores come first
    assert score([make_row(1, "a1", positive_ctxs=[{key: 1, "title": "t"}])])["measures"]["MRR@10"] == 50


@pytest.mark.parametrize(
    ("gold", "says"),
    [
        ({"gold_docs": "a"}, "key 'gold_docs'"), ({"gold_docs": [["a"]]}, "key 'gold_docs'"),
        ({"gold_docs": [True]}, "key 'gold_docs'"), ({"gold_docs": [None]}, "key 'gold_docs'"), ({"gold_docs": {"a": 1}}, "key 'gold_docs'"),
        ({"positive_ctxs": [{"id": "a"}, {"title": "t"}]}, "key 'positive_ctxs'"),
        ({"positive_ctxs": ["a"]}, "key 'positive_ctxs'"), ({"positive_ctxs": {"id": "a"}}, "key 'positive_ctxs'"),
    ],
)
def test_malformed_gold_documents_are_named_by_file_row_and_key(gold, says):
    path = write_jsonl(Path("r.jsonl"), [make_row(1), make_row(2, **gold)])
    assert refused(path).startswith(f"r.jsonl: row q2: {says}: ")
    Path("q").write_text("q2 0 a 1\n")
    assert run(path, qrels="q")["r"]["retrieval"]["gold"] == 1


def test_qrels_stand_in_for_the_rows_gold_documents_with_their_gains():
    Path("q").write_text("q1 0 c 3\nq1 0 a 1\nq1 0 b 0\nq2 0 a 0\nq9 0 a 1\n")
    found = score([make_row(1, gold_docs=["d"]), make_row(2, gold_docs=["a"])], qrels="q", k=[1, 3])
    assert (found["n"], found["left_out"]) == (1, 1)  # the second question has no relevant document
    assert found["measures"] == pytest.approx({
        "R@1": 50, "R@3": 100, "MRR@10": 100, "nDCG@10": 100 * (1 + 3 / math.log2(4)) / (3 + 1 / math.log2(3)),
    })


@pytest.mark.parametrize(("gold", "docs"), [("wiki:12", "12"), ("12", "wiki:12"), ("12", "12"), ("wiki:12", "wiki:12")])
@pytest.mark.parametrize("where", ["gold_docs", "positive_ctxs", "eval_file", "qrels", "run"])
def test_gold_ids_are_those_of_the_documents_with_or_without_dprs_prefix(gold, docs, where, caplog):
    found = [{"id": docs, "text": "", "score": 2.0}, {"id": "13", "text": "", "score": 1.0}]
    row = make_row(1, found)
    Path("q").write_text(f"q1 0 {gold} 1\n")
    if where in ("eval_file", "run"):
        write_jsonl(Path("asked.jsonl"), [{"id": "q1", "question": "?", "gold_docs": [gold]}])
    if where == "run":
        Path("r.run").write_text(f"q1 Q0 {docs} 1 2 t\n")
        measures = run("r.run", eval_file="asked.jsonl")["r"]["retrieval"]["measures"]
    else:
        own = {"gold_docs": {"gold_docs": [gold]}, "positive_ctxs": {"positive_ctxs": [{"psg_id": gold}]}}.get(where, {})
        measures = score([{**row, **own}], **{"eval_file": {"eval_file": "asked.jsonl"}, "qrels": {"qrels": "q"}}.get(where, {}))["measures"]
    assert measures["MRR@10"] == 100
    assert not logged(caplog, 1)


def test_a_document_that_has_the_gold_id_itself_stands_before_one_with_the_prefix():
    docs = [{"id": "wiki:1", "text": "", "score": 2.0}, {"id": "1", "text": "", "score": 1.0}]
    assert score([make_row(1, docs, gold_docs=["1"])])["measures"]["MRR@10"] == 50
    assert score([make_row(1, docs, gold_docs=["wiki:1"])])["measures"]["MRR@10"] == 100


def test_gold_ids_that_match_no_document_are_said_once_with_their_number(caplog):
    rows = [make_row(n, "ab", gold_docs=["doc-1", "doc-2"], dataset="nq") for n in range(3)] + [make_row(3, "ab", gold_docs=["b"], dataset="fever"), make_row(4, "", gold_docs=["z"], dataset="popqa")]
    assert score(rows)["n"] == 5
    assert logged(caplog, "r.jsonl", 6, "nq") == logged(caplog, "r.jsonl") == 1 and not logged(caplog, "fever")
    caplog.clear()
    score([*rows, make_row(5, "ab", gold_docs=["a"], dataset="nq")])
    assert not logged(caplog, "r.jsonl"), "a document that was not retrieved is no other corpus"


def test_results_may_be_ids_and_documents_alone():
    write_jsonl(Path("asked.jsonl"), [{"id": f"q{n}", "question": "?", "gold_docs": ["a"], "answers": ["gold"], "dataset": "NQ"} for n in (1, 2)])
    rows = [{"id": "q1", "docs": make_docs("ab", a="gold")}, {"id": "q2", "docs": make_docs("ba")}]
    found = score(rows, eval_file="asked.jsonl", k=[1])
    assert (found["n"], found["gold"], found["answers"], found["measures"]["R@1"], found["measures"]["answer@1"]) == (2, 2, 2, 50, 50)
    assert list(found["groups"]) == ["nq"]


def test_qrels_of_other_questions_are_an_error_and_missing_ones_are_said(caplog):
    Path("q").write_text("x1 0 a 1\n")
    path = write_jsonl(Path("r.jsonl"), [make_row(1, answers=["x"])])
    assert re.match(at("r.jsonl", "q"), refused(path, qrels="q"))
    Path("q").write_text("q1 0 a 1\nx1 0 a 1\n")
    assert run(path, qrels="q")["r"]["retrieval"]["n"] == 1
    assert logged(caplog, "r.jsonl", 1, 2, "--eval_file") == 1


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("a party in town", "art", False), ("modern art in town", "art", True), ("Art.", "ART", True), ("art", "art gallery", False),
        ("Art.", "the art", False), ("the art of the gallery", "art gallery", False), ("an Art  Gallery", "art gallery", True),
        ("artgallery", "art", False), ("art-gallery", "art gallery", False), ("art - gallery", "art-gallery", True), ("snake_case", "snake", True),
        ("cost 1999 or so", "199", False), ("it is $ 2.911 billion", "$2.911 billion", True), ("it is 2.911 billion", "$2.911 billion", False),
        ("“Carmen” – an opera", "carmen", True), ("(c++) is", "C++", True), ("x", ".*", False), ("a|b", "b", True), ("Ｐaris", "paris", False),
        ("São Tomé", "sa\u0303o tome\u0301", True), ("Sao Tome", "São Tomé", False), ("", "x", False), ("x", "\u200b", False), ("北京是中国的首都", "首都", False),
    ],
)
def test_an_answer_is_found_by_dprs_rule(text, answer, found):
    assert (answer_rank([{"title": "", "text": text}], [answer]) == 1) is found


def plain_tokens(text: str) -> list[str]:
    """DPR's SimpleTokenizer, character by character. A token is a run of letters, numbers and marks, or any other character except spaces and controls."""
    tokens, run = [], ""
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            run += character
            continue
        tokens += [run] if run else []
        run = ""
        if kind not in "ZC":
            tokens.append(character)
    return [token.lower() for token in [*tokens, *([run] if run else [])]]


def plain_has_answer(text: str, answer: str) -> bool:
    tokens, wanted = plain_tokens(text), plain_tokens(answer)
    return bool(wanted) and any(tokens[start : start + len(wanted)] == wanted for start in range(len(tokens) - len(wanted) + 1))


def test_answers_are_found_as_a_plain_implementation_of_dprs_rule_finds_them():
    rng = random.Random(5)
    pieces = [
        "art", "Art", "art's", "party", "the", "1999", "199", "3.5", "$", "%", "C++", "São", "Sa\u0303o", "é", "e\u0301", "東京", "東", "京都", "Москва", "กรุงเทพ", "مرحبا",
        "नमस्ते", "İ", "ß", "SS", "Σας", "ΣΑΣ", "½", "²", "Ⅳ", "_", "-", "–", "“", "”", "'", "’", ".", ",", "\u0000", "\u200b", "\u00ad", "\t", "🙂", "\u0489", "ﬁ", "ﬁve",
    ]
    spaces = ["", "", " ", " ", " ", "\u00a0", "\n", "\u2003"]
    found = 0
    for _ in range(3000):
        words = rng.choices(pieces, k=rng.randint(1, 12))
        text = "".join(f"{word}{rng.choice(spaces)}" for word in words)
        start = rng.randrange(len(words))
        some = words[start : start + rng.randint(1, 3)] if rng.random() < 0.7 else rng.choices(pieces, k=2)
        answer = rng.choice([str, str.lower, str.upper])("".join(f"{word}{rng.choice(spaces)}" for word in some))
        expected = plain_has_answer(text, answer)
        assert (answer_rank([{"title": answer, "text": text}], [answer]) == 1) is expected, (text, answer)
        found += expected
    assert 800 < found < 2200


def test_any_answer_counts_and_the_title_is_not_looked_at():
    docs = make_docs("abc", None, None, b="one two")
    docs[2]["title"] = "Three"
    assert answer_rank(docs, ["four", "two"]) == 2
    assert answer_rank(docs, ["three"]) == answer_rank(docs, ["four"]) == math.inf
    assert answer_rank([], ["four"]) == math.inf


def test_answer_recall_counts_questions_by_the_first_document_that_holds_one():
    ids = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        make_row(1, make_docs("ab", a="gold"), answers=["Gold"]), make_row(2, make_docs("abcde", c="so gold", d="gold"), answers=["x", "gold"]),
        make_row(3, make_docs(ids, v="gold"), answers=["gold"]), make_row(4, make_docs("a"), answers=["gold"]), make_row(5, "", answers=["gold"]),
    ]
    found = score(rows, k=[1, 2, 3, 22])
    assert found["measures"] == {"answer@1": 20, "answer@2": 20, "answer@3": 40, "answer@20": 40, "answer@22": 60}
    assert (found["n"], found["gold"], found["answers"], found["main"]) == (5, 0, 5, "answer@20")
    assert (found["low"], found["high"]) == pytest.approx([100 * end for end in bootstrap_interval([1, 1, 0, 0, 0], 42)])


def test_an_answer_is_looked_for_in_each_order_of_the_documents():
    docs = make_docs("abc", None, [0.1, 0.2, 0.9], c="gold")
    results = run(write_jsonl(Path("r.jsonl"), [make_row(1, docs, answers=["gold"])]), k=[1, 3])["r"]
    assert results["retrieval"]["measures"] == {"answer@1": 0, "answer@3": 100, "answer@20": 100}
    assert results["reranking"]["measures"] == {"answer@1": 100, "answer@3": 100, "answer@20": 100}


def test_each_measure_is_over_the_questions_that_have_it_and_rows_with_nothing_gold_are_left_out(capsys, caplog):
    rows = [
        make_row(1, make_docs("ab", a="gold"), gold_docs=["b"], answers=["gold"]), make_row(2, "ab", answers=["gold"]),
        make_row(3, "ab", gold_docs=["a"]), make_row(4, "ab"), make_row(5, "ab", gold_docs=[], answers=["", " "]),
    ]
    found = score(rows, k=[1])
    assert (found["n"], found["gold"], found["answers"], found["left_out"], found["main"]) == (3, 2, 2, 2, "nDCG@10")
    assert found["measures"]["R@1"] == 50 and found["measures"]["answer@1"] == 50
    header, _, line = table(capsys.readouterr().out)
    assert header == ["system", "order", "n", "documents", "gold", "R@1", "nDCG@10", "MRR@10", "answers", "answer@1", "answer@20", "left out"]
    assert line[:6] == ["r", "retrieval", "3", "2.0", "2", "50.0"] and line[7:] == ["75.0", "2", "50.0", "50.0", "2"]
    assert logged(caplog, "r.jsonl", 2) == 1
    assert line[6] == f"{found['measures']['nDCG@10']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


def test_nothing_to_score_against_is_an_error():
    assert re.match(at("r.jsonl", "--qrels"), refused(write_jsonl(Path("r.jsonl"), [make_row(1)])))


# ---------------------------------------------------------------- orders


def test_reranked_rows_make_two_lines(capsys):
    rows = [make_row(1, make_docs("ab", None, [0.2, 0.8]), gold_docs=["b"]), make_row(2, "", gold_docs=["b"])]
    results = run(write_jsonl(Path("r.jsonl"), rows))["r"]
    assert {order: summary["measures"]["MRR@10"] for order, summary in results.items()} == {"retrieval": 25, "reranking": 50}
    assert [line[:2] for line in table(capsys.readouterr().out)[2:]] == [["r", "retrieval"], ["r", "reranking"]]
    assert list(run("r.jsonl", stage="retrieval")["r"]) == ["retrieval"]
    assert list(run("r.jsonl", stage="reranking")["r"]) == ["reranking"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_where_one_document_was_not_judged_the_rerankers_order_is_not_scored(number, monkeypatch):
    monkeypatch.setattr(evaluate_retrieval, "QUESTIONS_PER_CHUNK", 1)
    rows = [make_row(n, make_docs("ab", None, [0.2, 0.8]), gold_docs=["b"]) for n in range(3)]
    rows[number]["docs"][1]["rerank_score"] = None
    path = write_jsonl(Path("r.jsonl"), rows)
    results = run(path)["r"]
    assert list(results) == ["retrieval"] and results["retrieval"]["n"] == 3
    assert re.match(at(f"r.jsonl: row q{number}", "rerank_score", "reranker.py"), refused(path, stage="reranking"))


def test_a_file_without_any_document_was_not_reranked():
    assert list(run(write_jsonl(Path("r.jsonl"), [make_row(1, "", gold_docs=["a"])]))["r"]) == ["retrieval"]


# ---------------------------------------------------------------- what was asked


def asked(*numbers: int, **more) -> str:
    write_jsonl(Path("asked.jsonl"), [{"id": f"q{n}", "question": "?", "dataset": "nq" if n < 3 else "fever", **more} for n in numbers])
    return "asked.jsonl"


def test_questions_missing_from_the_results_count_as_zero(caplog):
    rows = [make_row(1, make_docs("a", a="gold"), dataset="nq"), make_row(3, make_docs("a", a="gold"), dataset="fever")]
    found = score(rows, eval_file=asked(1, 2, 3, 4, 5, gold_docs=["a"], answers=["gold"]), k=[1])
    assert (found["n"], found["gold"], found["answers"], found["without_documents"], found["documents"]) == (5, 5, 5, 3, 2 / 5)
    assert set(found["measures"].values()) == {40.0}
    groups = {name: (group["n"], group["measures"]["R@1"]) for name, group in found["groups"].items()}
    assert groups == {"fever": (3, pytest.approx(100 / 3)), "nq": (2, 50.0)}
    assert logged(caplog, "r.jsonl", 3, 5) == 1


def test_what_the_results_say_stands_before_what_the_questions_say():
    found = score([make_row(1, make_docs("ab", b="two"), gold_docs=["b"], answers=["two"])], eval_file=asked(1, gold_docs=["a"], answers=["one"]), k=[2])
    assert (found["measures"]["MRR@10"], found["measures"]["answer@2"]) == (50, 100)
    found = score([make_row(1, make_docs("ab", b="two"), gold_docs=[], answers=[])], eval_file="asked.jsonl", k=[2])
    assert (found["measures"]["MRR@10"], found["measures"]["answer@2"]) == (100, 0)


@pytest.mark.parametrize("kind", ["rows", "run"])
def test_documents_of_other_questions_are_refused(kind):
    if kind == "rows":
        write_jsonl(Path("r"), [make_row(1), make_row(7)])
    else:
        Path("r").write_text("q1 Q0 a 1 1 t\nq7 Q0 a 1 1 t\n")
    assert re.match(at("r", "row q7", "asked.jsonl"), refused("r", eval_file=asked(1, 2, gold_docs=["a"])))


def test_a_trec_run_is_scored_like_the_rows_it_was_written_from(caplog):
    rng = random.Random(2)
    rows = [make_row(n, make_docs("abcde", [rng.choice([0.5, 1.0]) for _ in range(5)], [rng.random() for _ in range(5)]),
                     gold_docs=[rng.choice("abcdefg")], dataset="nq") for n in range(1, 21)]
    rows[4]["docs"] = []
    write_jsonl(Path("my rows.jsonl"), rows)
    results = {}
    for order in ("retrieval", "reranking"):
        results[order] = run("my rows.jsonl", stage=order, run_file=f"deep/{order}.run")["my rows"][order]
        assert Path(f"deep/{order}.run").read_text().splitlines()[0].split()[-1] == f"my_rows_{order}"
        again = run(f"deep/{order}.run", eval_file="my rows.jsonl")[order]["retrieval"]
        assert again == results[order]
    assert results["retrieval"]["measures"] != results["reranking"]["measures"]
    assert logged(caplog, "deep/retrieval.run", 1, 20) == logged(caplog, "deep/reranking.run", 1, 20) == 1
    run("my rows.jsonl", run_file="auto.run")
    assert Path("auto.run").read_text() == Path("deep/reranking.run").read_text(), "the reranker's where it is there"


def test_a_trec_run_needs_the_questions_and_gold_documents():
    Path("x.run").write_text("\n q1 Q0 a 1 1 t\n")
    assert re.match(at("x.run", "--eval_file"), refused("x.run"))
    assert re.match(at("x.run", "--qrels"), refused("x.run", eval_file=asked(1, answers=["gold"])))
    assert re.match(at("x.run: row q1", "rerank_score"), refused("x.run", eval_file="asked.jsonl", stage="reranking"))
    Path("q").write_text("q1 0 a 1\n")
    found = run("x.run", eval_file="asked.jsonl", qrels="q")["x"]["retrieval"]
    assert (found["gold"], found["answers"], found["measures"]["MRR@10"]) == (1, 0, 100)


@pytest.mark.parametrize("content", ["[{row}]", "\ufeff\n [\n{row}]", " \n{row}\n"])
def test_rows_are_told_from_runs_by_content(content):
    Path("r.run").write_text(content.replace("{row}", json.dumps(make_row(1, gold_docs=["a"]))), encoding="utf-8")
    assert run("r.run")["r"]["retrieval"]["n"] == 1


def test_rows_without_documents_are_named_by_file_line_and_key():
    Path("r.jsonl").write_text(json.dumps(make_row(1)) + "\n\n" + json.dumps({"id": "q2", "question": "?"}) + "\n")
    assert refused("r.jsonl").startswith("r.jsonl:3: key 'docs': ")


# ---------------------------------------------------------------- groups, tables, files


def test_several_files_make_one_table_and_measures_are_broken_down_by_any_key(capsys):
    write_jsonl(Path("one.jsonl"), [
        make_row(1, gold_docs=["a"], kind="x"), make_row(2, gold_docs=["z"], kind="y"), make_row(3, answers=["gold"], kind="w"),
    ])
    write_jsonl(Path("two.jsonl"), [make_row(1, answers=["nothing"], kind="x")])
    results = run("one.jsonl", "two.jsonl", group_by="kind", output_file="deep/m.json", table_file="deeper/t.md", k=[1])
    assert list(results) == ["one", "two"]
    assert {name: group["n"] for name, group in results["one"]["retrieval"]["groups"].items()} == {"w": 1, "x": 1, "y": 1}
    printed = capsys.readouterr().out
    assert printed == Path("deeper/t.md").read_text()
    lines = table(printed)
    assert lines[0][4:] == ["gold", "R@1", "nDCG@10", "MRR@10", "answers", "answer@1", "answer@20"]
    assert lines[2][:6] == ["one", "retrieval", "3", "4.0", "2", "50.0"] and lines[2][8:] == ["1", "0.0", "0.0"]
    assert lines[3][2:] == ["1", "4.0", "0", "", "", "", "1", "100.0", "100.0 (100.0 to 100.0)"]
    assert "By kind:" in printed
    assert lines[4] == ["system", "order", "measure", "w", "x", "y"]
    assert lines[6] == ["one", "retrieval", "nDCG@10", "", "100.0 (100.0 to 100.0)", "0.0 (0.0 to 0.0)"]
    assert lines[7] == ["two", "retrieval", "answer@20", "", "100.0 (100.0 to 100.0)", ""]


def test_the_group_is_the_rows_else_the_questions_and_the_flag_stands_before_both():
    rows = [make_row(1, gold_docs=["a"]), make_row(3, gold_docs=["a"], dataset="popqa")]
    assert set(score(rows)["groups"]) == {"", "popqa"}
    assert set(score(rows, eval_file=asked(1, 3))["groups"]) == {"nq", "popqa"}
    assert set(score(rows, eval_file=asked(1, 3, 4, gold_docs=["a"]), dataset="eli5")["groups"]) == {"eli5"}


def test_what_was_scored_is_named_in_the_measures_file_and_seeds_make_the_interval():
    rows = [make_row(n, gold_docs=["abcdefg"[n % 7]]) for n in range(40)]
    one, two, other = score(rows, k=[5, 1, 5]), score(rows, k=[1, 5]), score(rows, seed=7)
    assert one == two
    assert list(one["measures"]) == ["R@1", "R@5", "nDCG@10", "MRR@10"]
    assert (one["low"], one["high"]) != (other["low"], other["high"]) and one["measures"]["R@5"] == other["measures"]["R@5"]
    assert json.loads(Path("r.jsonl.retrieval.json").read_text())["arguments"]["seed"] == 7


@pytest.mark.parametrize("k", [["0"], ["5", "-1"]])
def test_cutoffs_are_positive(k, capsys):
    with pytest.raises(SystemExit):
        evaluate_retrieval.parse_args(["--k", *k])
    assert names(capsys.readouterr().err, "--k", 1)


def test_run_file_is_of_one_file_of_rows_and_no_output_replaces_an_input():
    write_jsonl(Path("r.jsonl"), [make_row(1, gold_docs=["a"])])
    Path("x.run").write_text(GOOD_LINE)
    before = Path("r.jsonl").read_bytes()
    assert refused("r.jsonl", "r.jsonl", run_file="y.run").startswith("--run_file: ")
    assert re.match(at("x.run", "--run_file"), refused("x.run", run_file="y.run", eval_file="r.jsonl"))
    for flag in ("output_file", "run_file", "table_file"):
        assert refused("r.jsonl", **{flag: "./r.jsonl"}).startswith("./r.jsonl: ")
    assert refused("r.jsonl", table_file="t.md", run_file="./t.md").startswith("./t.md: ")
    assert Path("r.jsonl").read_bytes() == before
