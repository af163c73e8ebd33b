"""The pieces of experiments/openqa.sh: disjoint parts, lists without added documents, one answer per set, and gate 0."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import StubEngine, at, read_jsonl, write_jsonl
from stages import REPO
from stubs import documents

from dynamicrag.llm import requests
from dynamicrag.stage import UserError


def load(name: str):
    """A piece, which finds its neighbours by their bare names, as when it is run."""
    sys.path.insert(0, str(REPO / "experiments/openqa"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPO / "experiments/openqa"))


splits, lists, contexts, store, gate = (load(name) for name in ("splits", "lists", "contexts", "store", "gate"))
SETS = {"nq": 0, "hotpotqa": 3, "2wikimqa": 3, "musique": 3, "svamp": 0}  # documents of their own
SIZES = ["--dev", "8", "--dev_from_train", "2wikimqa=2,musique=1", "--test_cap", "svamp=2", "--generator", "12", "--cloning", "12", "--rl", "12"]


def row_of(dataset: str, number: int, name: str) -> dict:
    docs = {"docs": documents(SETS[dataset], f"{name}{number}_")} if SETS[dataset] else {}
    gold = {"nq": ["p1"], "svamp": []}.get(dataset, [f"{name}{number}_1", f"{name}{number}_2"])
    return {"id": f"{dataset}_{name}_{number}", "dataset": dataset, "question": f"what is {number}?", "answers": [f"the {number}"], "gold_docs": gold, **docs}


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of the form of openmix, in which train has 20 questions of each data set."""
    (tmp_path / "data").mkdir()
    for name, count, sets in (("train", 20, SETS), ("dev", 9, ("nq", "hotpotqa", "svamp")), ("test", 4, SETS)):
        write_jsonl(tmp_path / f"data/{name}.jsonl", [row_of(dataset, number, name) for dataset in sets for number in range(count)])
    return tmp_path / "data"


def divided(data: Path, output: Path, *flags: str) -> dict[str, list[dict]]:
    splits.main(["--data", str(data), "--output_dir", str(output), *SIZES, *flags])
    parts: dict[str, list[dict]] = {}
    for path in output.iterdir():
        for row in read_jsonl(path):
            assert row["held_out"] == (row["part"] != "reranker") == path.name.startswith("asked_")
            assert bool(row.get("docs")) == path.name.endswith("_own.jsonl")
            parts.setdefault(row["part"], []).append(row)
    return parts


# ---------------------------------------------------------------- parts and lists


def test_the_parts_are_disjoint_and_have_the_sizes_asked_for(data, tmp_path):
    parts = divided(data, tmp_path / "q")
    ids = [row["id"] for rows in parts.values() for row in rows]
    assert len(ids) == len(set(ids))
    assert {part: len(rows) for part, rows in parts.items()} == {"dev": 8, "test": 18, "generator": 12, "cloning": 12, "rl": 12, "reranker": 61}
    assert Counter(row["dataset"] for row in parts["test"]) == {"nq": 4, "hotpotqa": 4, "2wikimqa": 4, "musique": 4, "svamp": 2}
    assert Counter(row["dataset"] for row in parts["rl"]) == {"nq": 6, "hotpotqa": 3, "2wikimqa": 2, "svamp": 1}
    of_dev = Counter((row["dataset"], row["id"].split("_")[1]) for row in parts["dev"])
    assert of_dev["2wikimqa", "train"] == 2 and of_dev["musique", "train"] == 1 and sum(of_dev[name, "dev"] for name in SETS) == 5


def test_a_part_depends_on_the_seed_and_not_on_the_order_of_the_rows(data, tmp_path):
    def rl(folder: str, *flags: str) -> set[str]:
        return {row["id"] for row in divided(data, tmp_path / folder, *flags)["rl"]}

    first = rl("a")
    for path in data.iterdir():
        write_jsonl(path, read_jsonl(path)[::-1])
    assert rl("b") == first != rl("c", "--seed", "7")


def test_too_few_questions_are_refused_by_data_set_and_flag(data, tmp_path):
    with pytest.raises(UserError, match=at("train", "musique", "--dev_from_train")):
        divided(data, tmp_path / "q", "--dev", "40", "--dev_from_train", "musique=30")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=at(tmp_path / "train.jsonl")):
        splits.main(["--data", str(tmp_path), "--output_dir", str(tmp_path / "q")])


def reranked(part: str, number: int, scores: list[float], gold: list[int]) -> dict:
    docs = [doc | {"rerank_score": score, "rerank_label": "false"} for doc, score in zip(documents(len(scores), f"{part}{number}_"), scores, strict=True)]
    return {"id": f"{part}_{number}", "part": part, "dataset": "nq", "question": f"what is {number}?", "answers": ["a"], "docs": docs,
            "gold_docs": [docs[position - 1]["id"] for position in gold]}


def test_the_labels_are_calibrated_on_dev_and_no_document_is_added(tmp_path):
    rows = [
        *(reranked("dev", number, [0.9, 0.35, 0.25, 0.1], [1, 2]) for number in range(3)),  # 0.25 < threshold < 0.35
        reranked("test", 1, [0.8, 0.4, 0.2, 0.1], [4]),
    ]
    lists.main(["--input_file", str(write_jsonl(tmp_path / "r.jsonl", rows)), "--output_dir", str(tmp_path / "lists"), "--n_docs", "3"])
    [row] = read_jsonl(tmp_path / "lists/test.jsonl")
    assert [doc["rerank_label"] for doc in row["docs"]] == ["true", "true", "false"]
    summary = json.loads((tmp_path / "lists/summary.json").read_text())
    assert 0.25 <= summary["threshold"] < 0.35 and summary["dev selection F1"] == 1
    assert summary["parts"]["test"]["all"]["all needed in list"] == 0


def test_the_generator_learns_from_none_from_the_first_and_from_the_needed_documents(tmp_path):
    rows = [reranked("generator", number, [0.9 - 0.05 * place for place in range(12)], [2, 9]) for number in range(200)]
    contexts.main(["--input_file", str(write_jsonl(tmp_path / "r.jsonl", rows)), "--output_dir", str(tmp_path)])
    halves = [read_jsonl(tmp_path / f"contexts_{number}.jsonl") for number in (1, 2)]
    assert [len(rows) for rows in halves] == [100, 100] and not {row["id"] for row in halves[0]} & {row["id"] for row in halves[1]}
    chosen = [row["true_id"] for rows in halves for row in rows]
    assert all(ids == sorted(set(ids)) and len(ids) <= 6 for ids in chosen)
    needed = sum({2, 9} <= set(ids) for ids in chosen)
    assert 15 <= sum(not ids for ids in chosen) <= 50 and 45 <= needed <= 95
    assert {len(ids) for ids in chosen if ids == list(range(1, len(ids) + 1))} == set(range(7))


# ---------------------------------------------------------------- answers


@pytest.fixture
def engine(monkeypatch, tmp_path) -> StubEngine:
    """The generator answers with the titles of the documents that it is shown, in the folder tmp_path/model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    stub = StubEngine(lambda request, kind, titles: " ".join(titles) or "nothing")
    monkeypatch.setattr(requests, "load_engine", lambda options: stub)
    return stub


def test_a_set_is_answered_once_whatever_its_order(engine, tmp_path):
    rows = [reranked("dev", number, [0.9, 0.5, 0.1], []) for number in (1, 2)]
    answers = store.AnswerStore(str(tmp_path / "a.jsonl"), str(tmp_path / "model"))
    first = answers.answers([(rows[0], (2, 1)), (rows[0], (1, 2)), (rows[1], ())])
    assert first[0] == first[1] and first[2].response == "nothing"
    assert first[0].response == " ".join(doc["title"] for doc in rows[0]["docs"][:2])
    assert [len(batch) for batch in engine.batches] == [2]
    again = store.AnswerStore(str(tmp_path / "a.jsonl"), str(tmp_path / "model"))
    assert again.answers([(rows[0], (1, 2))]) == first[:1] and len(engine.batches) == 1


def test_an_interruption_loses_at_most_one_batch(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BATCH", 2)
    rows = [reranked("dev", number, [0.9, 0.5], []) for number in range(3)]
    pairs = [(row, (1,)) for row in rows]
    path = tmp_path / "a.jsonl"
    store.AnswerStore(str(path), str(tmp_path / "model")).answers(pairs)
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the third answer
    engine.batches.clear()
    again = store.AnswerStore(str(path), str(tmp_path / "model")).answers(pairs)
    assert [len(batch) for batch in engine.batches] == [1]
    assert [answer.response for answer in again] == [row["docs"][0]["title"] for row in rows]
    assert len(path.read_bytes().splitlines()) == 4


def test_answers_of_another_generator_are_refused(engine, tmp_path):
    path = str(tmp_path / "a.jsonl")
    store.AnswerStore(path, str(tmp_path / "model")).answers([(reranked("dev", 1, [0.9], []), (1,))])
    (tmp_path / "model/config.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match=at(path)):
        store.AnswerStore(path, str(tmp_path / "model"))


# ---------------------------------------------------------------- gate 0

PREFIXES = [0, 1, 3]  # of the sets (), (1,), (2,), (1, 2)


def test_the_share_that_repeats_is_that_of_the_common_effect():
    rng = np.random.default_rng(0)
    common, first, second = rng.normal(size=(3, 4000, 8))
    assert gate.repeated_share(common, common) == pytest.approx(1)
    assert gate.repeated_share(common + first, common + second) == pytest.approx(0.5, abs=0.02)
    assert gate.repeated_share(first, second) == pytest.approx(0, abs=0.02)
    by_question = rng.normal(size=(4000, 1))  # a difference between questions is no effect of the documents
    assert gate.repeated_share(by_question + first, by_question + second) == pytest.approx(0, abs=0.02)
    assert gate.repeated_share(np.ones((3, 4)), np.ones((3, 4))) == 0


def test_the_headroom_counts_only_what_holds_under_the_other_wording():
    needs_second = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=float)  # the best fixed number is 1
    assert gate.headroom(needs_second, needs_second, PREFIXES).tolist() == [1, 0, 0]
    accident = needs_second.copy()
    accident[0] = [1, 0, 0, 0]  # another set is right under the second wording
    assert gate.headroom(needs_second, accident, PREFIXES).tolist() == [0, 0, 0]


def test_a_set_that_is_only_as_good_as_the_fixed_number_is_not_chosen():
    assert gate.best_sets(np.array([[1, 1, 0, 1], [0, 0, 1, 1]], dtype=float), fixed=1).tolist() == [1, 2]


def run_gate(engine, folder: Path, reply, *flags: str) -> dict:
    engine.reply = reply
    rows = [reranked("dev", number, [0.9, 0.5, 0.4, 0.2], []) for number in range(12)]
    for row in rows:
        row["answers"] = [row["docs"][2]["title"]]
    gate.main(["--input_file", str(write_jsonl(folder / "dev.jsonl", rows)), "--output_file", str(folder / "gate.json"), "--generator", str(folder / "model"),
               "--store", str(folder / "1.jsonl"), "--second_store", str(folder / "2.jsonl"),
               "--second_prompts", str(REPO / "experiments/openqa/wording_2.yaml"), *flags])
    return json.loads((folder / "gate.json").read_text())


def test_gate_0_goes_on_if_the_documents_decide_the_answers(engine, tmp_path):
    def third_only(request, kind, titles):  # the answer is right if the third document alone is read, in either wording
        shown = [line for line in request.messages[-1]["content"].splitlines() if line.startswith(("[1]", "Passage 1"))]
        return shown[0].split(" ", 1)[1].removeprefix("1: ") if shown else "nothing"

    figures = run_gate(engine, tmp_path, third_only)
    assert (figures["questions"], figures["sets"], figures["verdict"]) == (12, 1 + 4 + 6 + 4 + 1, "go")
    assert figures["repeated share"] == pytest.approx(1) and figures["headroom"] > 50 and figures["reasons"] == []


def test_gate_0_stops_if_the_documents_make_no_difference(engine, tmp_path, capsys):
    figures = run_gate(engine, tmp_path, lambda request, kind, titles: "always this")
    assert (figures["verdict"], figures["headroom"], figures["repeated share"], len(figures["reasons"])) == ("stop", 0, 0, 2)
    assert "stop" in capsys.readouterr().out
