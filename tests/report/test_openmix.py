"""examples/openmix/build.py, on small files in the forms that the authors of the five data sets publish."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest
from conftest import at, read_jsonl, write_jsonl
from stages import REPO

from dynamicrag.stage import UserError

sys.path.insert(0, str(REPO / "examples/openmix"))
build = importlib.import_module("build")
sys.path.remove(str(REPO / "examples/openmix"))


def hotpot(number: int, kind: str = "bridge") -> dict:
    context = [[f"Title {number} {place}", [f"Sentence of {place}.", f" It is  {number}."]] for place in range(10)]
    return {"_id": f"5a{number}", "answer": "yes", "question": f"Is hotpot {number} a bridge?", "type": kind, "level": "hard",
            "supporting_facts": [[f"Title {number} 3", 0], [f"Title {number} 7", 1], [f"Title {number} 3", 1]], "context": context}


def musique(number: int) -> dict:
    paragraphs = [{"idx": place, "title": f"M {place}", "paragraph_text": f"Paragraph {place} of {number}.", "is_supporting": place in (2, 5)} for place in range(20)]
    return {"id": f"2hop__{number}_9", "paragraphs": paragraphs, "question": f"Musique {number}?", "question_decomposition": [], "answer": "A", "answer_aliases": ["A", "B"],
            "answerable": True}


def nq(number: int) -> dict:
    doc = {"title": "Nobel  prize", "text": f"Prize {number}  was awarded.", "hasanswer": True, "isgold": True}
    return {"question": f"who got prize {number}", "answers": ["Röntgen"], "ctxs": [doc], "nq_annotated_gold": {"title": "Nobel prize"}}


def arithmetic(number: int, answer: float = 51.0) -> dict:
    return {"ID": f"chal-{number}", "Body": f"A pack costs {number} dollars", "Question": "How much is it?", "Equation": "( 76.0 - 25.0 )", "Answer": answer, "Type": "Subtraction"}


@pytest.fixture
def source(tmp_path) -> Path:
    """The five files, each with twelve questions, one of them gzipped."""
    folder = tmp_path / "source"
    folder.mkdir()
    with gzip.open(folder / "nq-open-oracle.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(nq(number)) + "\n" for number in range(12))
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps([hotpot(number) for number in range(12)]))
    (folder / "2wikimultihop_dev.json").write_text(json.dumps([hotpot(number + 50, "compositional") | {"evidences": []} for number in range(12)]))
    write_jsonl(folder / "musique_ans_v1.0_dev.jsonl", [musique(number) for number in range(12)])
    (folder / "SVAMP.json").write_text(json.dumps([arithmetic(number, 22090603.0 if number == 1 else 0.5 if number == 2 else 51.0) for number in range(12)]))
    return folder


def built(source: Path, output: Path, *flags: str) -> dict[str, list[dict]]:
    build.main(["--source_dir", str(source), "--output_dir", str(output), *flags])
    return {path.stem: read_jsonl(path) for path in output.iterdir()}


def test_a_row_of_each_data_set_is_read_as_its_authors_publish_it(source):
    rows = {dataset: list(build.published(build.read_source(source, dataset))) for dataset in build.SOURCES}
    needed = build.passage("Nobel prize", "Prize 3 was awarded.")
    assert rows["nq"][3] == {"id": "nq_3", "dataset": "nq", "kind": "one", "question": "who got prize 3", "answers": ["Röntgen"], "gold_docs": [needed["id"]]}
    first = rows["hotpotqa"][0]
    assert (first["id"], first["kind"], first["answers"]) == ("hotpotqa_5a0", "bridge", ["yes"])
    assert [doc["title"] for doc in first["docs"]] == [f"Title 0 {place}" for place in range(10)]
    assert first["docs"][3]["text"] == "Sentence of 3. It is 0." and first["gold_docs"] == [first["docs"][place]["id"] for place in (3, 7)]
    assert (rows["2wikimultihopqa"][1]["id"], rows["2wikimultihopqa"][1]["kind"]) == ("2wiki_5a51", "compositional")
    of_musique = rows["musique"][4]
    assert (of_musique["id"], of_musique["kind"], of_musique["answers"], len(of_musique["docs"])) == ("musique_2hop__4_9", "2hop", ["A", "B"], 20)
    assert of_musique["gold_docs"] == [of_musique["docs"][place]["id"] for place in (2, 5)]
    assert rows["svamp"][3] == {"id": "svamp_chal-3", "dataset": "svamp", "kind": "subtraction", "question": "A pack costs 3 dollars. How much is it?",
                                "answers": ["51"], "gold_docs": []}
    assert [rows["svamp"][number]["answers"] for number in (1, 2)] == [["22090603"], ["0.5"]]


def test_the_parts_do_not_overlap_and_the_corpus_has_every_document(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SIZES", dict.fromkeys(build.SIZES, (6, 2, 3)))
    files = built(source, tmp_path / "a")
    parts = {part: files[part] for part in build.PARTS}
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 30, "dev": 10, "test": 15}
    ids = [row["id"] for rows in parts.values() for row in rows]
    assert len(set(ids)) == len(ids)
    corpus = {doc["id"]: doc for doc in files["passages"]}
    assert len(corpus) == len(files["passages"]) and all({*row["gold_docs"]} <= corpus.keys() for rows in parts.values() for row in rows)
    assert sum(doc["title"] == "Nobel prize" for doc in corpus.values()) == 12  # of questions in no part, too
    assert built(source, tmp_path / "b") == files


def test_a_question_that_shares_its_wording_or_a_needed_passage_with_test_is_left_out():
    def row(row_id: str, question: str, *gold: str) -> dict:
        return {"id": row_id, "question": question, "gold_docs": list(gold)}

    parts = build.apart({"test": [row("t", "Who is it?", "p")], "dev": [row("a", "who is it"), row("b", "other", "q")],
                         "train": [row("c", "new", "p", "r"), row("d", "OTHER?"), row("e", "newer", "r")]})
    assert {part: [kept["id"] for kept in rows] for part, rows in parts.items()} == {"train": ["e"], "dev": ["b"], "test": ["t"]}


def test_listed_ids_give_the_parts_and_an_unknown_one_is_named(source, tmp_path):
    (tmp_path / "ids").mkdir()
    for part, ids in (("train", "nq_4 svamp_chal-1"), ("dev", "nq_2"), ("test", "musique_2hop__1_9")):
        (tmp_path / f"ids/{part}.txt").write_text("\n".join(ids.split()))
    files = built(source, tmp_path / "a", "--ids", str(tmp_path / "ids"))
    assert {part: [row["id"] for row in files[part]] for part in build.PARTS} == {"train": ["nq_4", "svamp_chal-1"], "dev": ["nq_2"], "test": ["musique_2hop__1_9"]}
    (tmp_path / "ids/dev.txt").write_text("nq_99")
    with pytest.raises(UserError, match=at(tmp_path / "ids/dev.txt", "nq_99")):
        built(source, tmp_path / "b", "--ids", str(tmp_path / "ids"))


def test_a_missing_file_and_another_form_are_named(source, tmp_path):
    (source / "SVAMP.json").write_text(json.dumps([arithmetic(1), {"ID": "x"}]))
    with pytest.raises(UserError, match=at(f"{source / 'SVAMP.json'}:1", "Body")):
        built(source, tmp_path / "a")
    (source / "SVAMP.json").unlink()
    with pytest.raises(UserError, match=at(source / "SVAMP.json")):
        built(source, tmp_path / "a")
