"""The number of documents from the question alone: what is predicted, and which documents a later stage answers from."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import at, write_jsonl

import inference
from dynamicrag.files.jsonio import read_json
from dynamicrag.stage import UserError

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(FOLDER))
question_k = importlib.import_module("question_k")
sys.path.remove(str(FOLDER))

FORMS = {0: "add the numbers {} and {}", 1: "what is the capital of {} {}", 2: "which one is larger {} or {}"}


def questions(count: int) -> list[dict]:
    return [{"id": f"q{n}", "question": FORMS[n % 3].format(f"w{n}", f"w{n + 7}"), "true_count": n % 3} for n in range(count)]


def run(tmp_path: Path, encoder: Path, train: list[dict], rows: list[dict], *flags: str) -> list[dict]:
    output = tmp_path / "out.jsonl"
    question_k.main(["--train_files", str(write_jsonl(tmp_path / "train.jsonl", train)), "--input_file", str(write_jsonl(tmp_path / "in.jsonl", rows)),
                     "--output_file", str(output), "--encoder", str(encoder), "--device", "cpu", *flags])
    return [row for _, row in read_json(output)]


class Words:
    """An encoder whose vectors say which of a few words a text has. The tiny encoder of the other tests knows no words."""

    def __init__(self, *_, **__):
        pass

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.array([[float(word in text.split()) for word in ("add", "what", "which", "numbers")] for text in texts])


def test_the_first_k_documents_are_answered_from_and_k_is_that_of_the_question(tmp_path, monkeypatch):
    monkeypatch.setattr(question_k, "Encoder", Words)
    docs = [{"id": f"d{n}", "title": "t", "text": "x", "rerank_score": 0.9 - n / 10, "rerank_label": "true"} for n in range(5)]
    rows = [{"id": f"t{n}", "question": FORMS[n % 3].format(f"v{n}", f"v{n + 3}"), "docs": docs} for n in range(12)]
    found = run(tmp_path, Path("words"), questions(60), rows, "--n_docs", "4")
    assert [row["question_k"] for row in found] == [n % 3 for n in range(12)]
    assert [inference.select_by_rule("monot5", row["docs"][:4]) for row in found] == [[*range(1, n % 3 + 1)] for n in range(12)]
    assert [row["id"] for row in found] == [row["id"] for row in rows]


@pytest.mark.parametrize(("counts", "k"), [([2, 2, 2], 2), ([9, 9, 9], 3)])
def test_rows_that_all_need_the_same_number_give_this_number_at_most_those_shown(tmp_path, encoder_dir, counts, k):
    train = [{**row, "true_count": count} for row, count in zip(questions(3), counts, strict=True)]
    [row] = run(tmp_path, encoder_dir, train, [{"id": "t", "question": "anything", "docs": [{"id": f"d{n}"} for n in range(5)]}], "--n_docs", "3")
    assert row["question_k"] == k and [doc["rerank_label"] for doc in row["docs"]] == ["true"] * k + ["false"] * (5 - k)


@pytest.mark.parametrize(("train", "rows", "place"), [
    ([{"question": "x"}], [{"question": "x", "docs": []}], ("train.jsonl:1", "true_count")),
    ([{"question": "x", "true_count": 1}], [{"question": "x"}], ("in.jsonl:1", "docs")),
    ([{"question": "x", "true_count": 1}], [{"question": None, "docs": []}], ("in.jsonl:1", "question")),
])
def test_a_row_that_lacks_a_key_is_named(tmp_path, encoder_dir, train, rows, place):
    with pytest.raises(UserError, match=at(*place)):
        run(tmp_path, encoder_dir, train, rows)
