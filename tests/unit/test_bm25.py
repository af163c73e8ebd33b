"""BM25 in any script: which words count, and a warning if the corpus has no word of a question."""

import logging
import random
import re

import pytest
from conftest import read_jsonl, write_jsonl
from stubs import make_text

import retriever
from dynamicrag.search import bm25
from dynamicrag.search.passages import open_passages

CITIES = [{"id": "1", "title": "北京", "text": "北京是中华人民共和国的首都。"}, {"id": "2", "title": "東京", "text": "東京都は日本の首都です。"},
          {"id": "3", "title": "กรุงเทพ", "text": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"}, {"id": "4", "title": "दिल्ली", "text": "दिल्ली भारत की राजधानी है।"},
          {"id": "5", "title": "서울", "text": "서울은 대한민국의 수도이다."}, {"id": "6", "title": "Paris", "text": "Paris is the capital of France, in Cafe\u0301s."}]


@pytest.mark.parametrize(("text", "words"), [
    ("長江流經上海", ["長江", "江流", "流經", "經上", "上海"]), ("K線, 茶!", ["線", "茶"]), ("東京tower 2号", ["東京", "tower", "号"]),
    ("हिन्दी भाषा", ["हिन्दी", "भाषा"]), ("ไทย", ["ไท", "ทย"]), ("서울은", ["서울", "울은"]),
    ("Ｒｉｖｅｒｓ １０", ["river", "10"]), ("cafe\u0301", ["café"]), ("𠮷野家", ["𠮷野", "野家"]), ("", []), ("。", []),
])
def test_words_of_each_script(text, words):
    assert bm25.words(text) == words


def test_words_of_latin_script_are_what_they_were():
    """Words are in lower case, have two letters or more, and are stemmed. Stop words are left out. Accents, signs and emoji between words change nothing."""
    rng = random.Random(0)
    texts = [f"{make_text(rng)} the naïve Rivers’ café™ ½ x a–b {n}_Ångström №{n} é 😀 running" for n in range(20)]
    texts += [text.encode("ascii", "ignore").decode() for text in texts]
    for text in texts:
        plain = [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in bm25._stop_words()]
        assert bm25.words(text) == [bm25._stem(word) for word in plain]


@pytest.mark.parametrize(("question", "first"), [
    ("中国的首都是哪里？", "1"), ("日本の首都はどこですか", "2"), ("เมืองหลวงของไทย", "3"), ("भारत की राजधानी", "4"), ("한국의 수도 서울", "5"), ("cafés", "6"), ("京", None),
])
def test_questions_of_each_script(tmp_path, question, first):
    index = bm25.open_bm25(open_passages(write_jsonl(tmp_path / "c.jsonl", CITIES)))
    position = index.search([question], 6)[1][0, 0]
    assert (CITIES[position]["id"] if position >= 0 else None) == first


def test_questions_without_a_document_are_counted(tmp_path, caplog):
    questions = [{"id": str(n), "question": text} for n, text in enumerate(["首都", "zzz", "Paris", "the of", "?"])]
    flags = ["--query", write_jsonl(tmp_path / "q.jsonl", questions), "--passages", write_jsonl(tmp_path / "c.jsonl", CITIES), "--index", "bm25"]
    retriever.main([*map(str, flags), "--output_file", str(tmp_path / "o.jsonl")])
    assert [len(row["docs"]) for row in read_jsonl(tmp_path / "o.jsonl")] == [2, 0, 1, 0, 0]
    assert [record.args[:2] for record in caplog.records if record.levelno == logging.WARNING] == [(3, 5)]
    caplog.clear()
    write_jsonl(tmp_path / "q.jsonl", questions[:1])
    retriever.main([*map(str, flags), "--output_file", str(tmp_path / "p.jsonl")])
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("version", [None, b"1", b"\xff"])
def test_an_index_of_other_words_is_built_again(tmp_path, version, monkeypatch):
    path = write_jsonl(tmp_path / "c.jsonl", CITIES)
    with monkeypatch.context() as patch:
        patch.setattr(bm25, "words", lambda text: text.split())
        bm25.open_bm25(open_passages(path))
    kept = tmp_path / "c.jsonl.store" / "bm25.version"
    kept.unlink() if version is None else kept.write_bytes(version)
    assert bm25.open_bm25(open_passages(path)).search(["首都"], 3)[1].tolist() == [[1, 0, -1]]
