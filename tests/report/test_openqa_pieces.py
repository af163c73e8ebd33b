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


splits, lists, contexts, store, gate, choose, answer, tables = map(load, ("splits", "lists", "contexts", "store", "gate", "choose", "answer", "tables"))
SETS = {"nq": 0, "hotpotqa": 3, "2wikimqa": 3, "musique": 3, "svamp": 0}  # documents of their own
SIZES = ["--dev", "8", "--dev_from_train", "2wikimqa=2,musique=1", "--test_cap", "svamp=2", "--generator", "12", "--cloning", "12", "--rl", "12",
         "--reranker_held_out", "20"]


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
            assert (row["part"] != "reranker") == path.name.startswith("asked_")
            assert bool(row.get("docs")) == path.name.endswith("_own.jsonl")
            parts.setdefault(row["part"], []).append(row)
    return parts


# ---------------------------------------------------------------- parts and lists


def test_the_parts_are_disjoint_and_have_the_sizes_asked_for(data, tmp_path):
    parts = divided(data, tmp_path / "q")
    ids = [row["id"] for rows in parts.values() for row in rows]
    assert len(ids) == len(set(ids))
    assert {part: len(rows) for part, rows in parts.items()} == {"dev": 8, "test": 18, "generator": 12, "cloning": 12, "rl": 12, "reranker": 61}
    assert {part: sum(row["held_out"] for row in rows) for part, rows in parts.items()} == {
        "dev": 8, "test": 18, "generator": 12, "cloning": 12, "rl": 12, "reranker": 20}
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
    assert store.AnswerStore(str(path), str(tmp_path / "model")).answers(pairs) == again and len(engine.batches) == 1


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
    assert gate.headroom(np.zeros((3, 4)), needs_second, PREFIXES).tolist() == [0, 0, 0]  # without a better set, the fixed number stays


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


# ---------------------------------------------------------------- choices, rewards and tables


def flags_of(folder: Path) -> list[str]:
    return ["--store", str(folder / "answers.jsonl"), "--generator", str(folder / "model")]


def test_the_rules_are_those_of_inference_and_are_answered_together(engine, tmp_path):
    rows = [reranked("dev", number, [0.9, 0.6, 0.2], [3]) for number in (1, 2)]
    for row in rows:
        row["docs"][0]["rerank_label"] = row["docs"][2]["rerank_label"] = "true"
    answer.main(["--input_file", str(write_jsonl(tmp_path / "dev.jsonl", rows)), "--output_file", str(tmp_path / "r/dev_{selector}.json"),
                 "--selectors", "none", "top:2", "monot5", "adaptive", "gold", *flags_of(tmp_path)])
    made = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "r").iterdir()}
    assert {name: [row["id_list"] for row in rows] for name, rows in made.items()} == {
        "dev_none": [[], []], "dev_top2": [[1, 2], [1, 2]], "dev_monot5": [[1, 3], [1, 3]], "dev_adaptive": [[1, 2], [1, 2]], "dev_gold": [[3], [3]],
    }
    assert made["dev_top2"] == made["dev_adaptive"] and [len(batch) for batch in engine.batches] == [2 * 4]
    assert made["dev_gold"][0]["response"] == rows[0]["docs"][2]["title"] and made["dev_gold"][0]["final_docs"] == rows[0]["gold_docs"]


def test_a_greedy_selection_is_answered_in_the_order_of_the_list_and_costs_both_calls(engine, tmp_path):
    engine.reply = lambda request, kind, titles: "[3], [1]" if kind == "select" else " ".join(titles)
    rows = [reranked("dev", number, [0.9, 0.6, 0.2], [3]) for number in (1, 2)]
    write_jsonl(tmp_path / "dev.jsonl", rows)
    choose.main(["--input_file", str(tmp_path / "dev.jsonl"), "--output_file", str(tmp_path / "chosen.jsonl"), "--llm-model", str(tmp_path / "model")])
    assert [row["id_list"] for row in read_jsonl(tmp_path / "chosen.jsonl")] == [[3, 1], [3, 1]]
    answer.main(["--input_file", str(tmp_path / "chosen.jsonl"), "--output_file", str(tmp_path / "dev.json"), *flags_of(tmp_path)])
    first = json.loads((tmp_path / "dev.json").read_text())[0]
    assert first["id_list"] == [1, 3] and first["response"] == " ".join(rows[0]["docs"][place]["title"] for place in (0, 2))
    assert first["usage"] == {"calls": 2, "prompt_tokens": (100 + 3) + (100 + 2), "generated_tokens": 2}


def test_a_selection_that_cannot_be_read_is_empty(engine, tmp_path):
    engine.reply = lambda request, kind, titles: "prose"
    write_jsonl(tmp_path / "dev.jsonl", [reranked("dev", 1, [0.9], [])])
    choose.main(["--input_file", str(tmp_path / "dev.jsonl"), "--output_file", str(tmp_path / "chosen.jsonl"), "--llm-model", str(tmp_path / "model")])
    assert [row["id_list"] for row in read_jsonl(tmp_path / "chosen.jsonl")] == [[]]


def test_sampled_selections_become_sets_that_are_answered_once(engine, tmp_path):
    engine.reply = lambda request, kind, titles: ["[2], [1]", "[1], [2]", "None"] if kind == "select" else " ".join(titles) or "nothing"
    row = reranked("rl", 1, [0.9, 0.6], [])
    write_jsonl(tmp_path / "rl.jsonl", [row])
    choose.main(["--input_file", str(tmp_path / "rl.jsonl"), "--output_file", str(tmp_path / "s.jsonl"), "--llm-model", str(tmp_path / "model"), "--num_samples", "3"])
    engine.batches.clear()
    answer.main(["--input_file", str(tmp_path / "s.jsonl"), "--output_file", str(tmp_path / "a.jsonl"), *flags_of(tmp_path)])
    assert [len(batch) for batch in engine.batches] == [2]
    [made] = read_jsonl(tmp_path / "a.jsonl")
    assert made["id_lists"] == [[1, 2], [1, 2], []] and made["selections"] == ["[2], [1]", "[1], [2]", "None"]
    both = " ".join(doc["title"] for doc in row["docs"])
    assert made["responses"] == [both, both, "nothing"] and made["generator_tokens"] == (102 + 1) + (100 + 1)


def results(run: Path, name: str, split: str, right: list[int], chosen: list[int], seed: int | None = None) -> None:
    """Write the results of a system: which questions it answers right, and how many of the documents (a, b, c) it chooses."""
    folder = run / (f"seed_{seed}/results" if seed else "results")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"q{number}", "dataset": "nq" if number % 4 else "musique", "question": "q?", "answers": ["yes it is"], "gold_docs": ["a", "b"][: number % 3],
             "response": "yes it is" if correct else "no", "final_docs": ["a", "b", "c"][:k], "usage": {"prompt_tokens": 100 * k}}
            for number, (correct, k) in enumerate(zip(right, chosen, strict=True))]
    (folder / f"{split}_{name}.json").write_text(json.dumps(rows))


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run of twelve questions. Two documents are best on dev, and one on test."""
    ones, half = [1] * 12, [1, 0] * 6
    for split, best in (("dev", "top2"), ("test", "top1")):
        for k, name in enumerate(("none", "top1", "top2")):
            results(tmp_path, name, split, ones if name == best else half, [k] * 12)
    results(tmp_path, "question_k", "test", half, [1] * 12)
    needed = [number % 3 for number in range(12)]
    for seed in (1, 2):
        results(tmp_path, "dpo", "test", [*ones[:11], seed % 2], needed, seed)
        results(tmp_path, "bc_plus", "test", half, [2] * 12, seed)
    results(tmp_path, "kto", "test", half, [0] * 12, 2)
    return tmp_path


def run_tables(run: Path) -> dict:
    tables.main(["--run", str(run), "--output_file", str(run / "o.json"), "--table_file", str(run / "o.md")])
    return json.loads((run / "o.json").read_text())


def test_the_fixed_number_is_chosen_on_dev_and_the_hypotheses_are_corrected_together(finished):
    figures = run_tables(finished)
    assert figures["fixed"] == "top2"
    first, second, third = figures["hypotheses"]
    assert [(row["system"], row["minus"], row["measure"]) for row in (first, second, third)] == [
        ("dpo", "top2", "f1"), ("dpo", "bc_plus", "f1"), ("dpo", "bc_plus", "selection_f1"),
    ]
    assert first["mean"] == pytest.approx(100 * (23 / 24 - 0.5)) and first["seeds"] == [1, 2]
    assert third["mean"] == pytest.approx(100 - 100 * np.mean([lists.set_f1(["a", "b"], ["a", "b"][: number % 3]) for number in range(12)]))
    assert all(row["holm"] >= row["p"] for row in figures["hypotheses"]) and sorted(row["holm"] for row in figures["hypotheses"])[0] > first["p"] / 2
    assert figures["systems"]["dpo"]["exact"] == 100 and figures["systems"]["dpo"]["k by needed"] == {"0": 0, "1": 1, "2": 2}
    assert "first 2 (chosen on dev)" in (finished / "o.md").read_text()


def test_an_arm_of_one_seed_is_compared_with_the_same_seed_of_another(finished):
    compared = {(row["system"], row["minus"]): row for row in run_tables(finished)["exploratory"]}
    assert compared["kto", "bc_plus"]["seeds"] == [2] and compared["kto", "bc_plus"]["mean"] == 0
    assert compared["kto", "top2"]["seeds"] == [2] and compared["dpo", "question_k"]["seeds"] == [1, 2]
    assert ("dpo", "bc_plus") not in compared  # a hypothesis


def test_the_cost_of_each_training_is_told(finished):
    folder = finished / "seed_1"
    write_jsonl(folder / "answered.jsonl", [{"generator_tokens": 30}, {"generator_tokens": 12}])
    for arm, name, rows in (("bc_plus", "reranker_bc_training", [{"output": "[1]"}] * 4), ("dpo", "m_reranker_dpo", [{"chosen": "[1]", "rejected": "None"}] * 3)):
        (folder / arm / "training_data").mkdir(parents=True)
        (folder / arm / f"training_data/{name}.json").write_text(json.dumps(rows))
        (folder / arm / f"training_data/{name}.json.manifest.json").write_text("{\n}")
    (folder / "dpo/model/dpo").mkdir(parents=True)
    (folder / "dpo/model/dpo/settings.txt").write_text("recipes/m/dpo.yaml dataset=m max_samples=2 seed=1\n")
    assert run_tables(finished)["trainings"] == [
        {"seed": "1", "arm": "bc_plus", "rows": 4, "sequences": 4, "generator tokens": 0}, {"seed": "1", "arm": "dpo", "rows": 2, "sequences": 4, "generator tokens": 42},
    ]


def test_macro_means_weight_the_data_sets_equally(finished):
    cells = np.array([[1, 0, 0, 0, 1, 0, 0, 0]], dtype=float)
    assert tables.macro(cells, ["musique", *["nq"] * 3, "musique", *["nq"] * 3]) == 0.5


def test_results_of_other_questions_are_refused_by_name(finished):
    path = finished / "seed_2/results/test_kto.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(UserError, match=at(path)):
        run_tables(finished)


# ---------------------------------------------------------------- the page


def test_the_page_shows_the_figures_of_gate_0():
    figures = json.loads((REPO / "docs/evidence/openqa/gate.json").read_text())
    page = (REPO / "docs/openqa.md").read_text()
    assert gate.table(figures) in page and figures["verdict"] == "go"
    of_test = json.loads((REPO / "docs/evidence/openqa/lists.json").read_text())["parts"]["test"]["all"]
    assert f"needed documents of {100 * of_test['all needed in list']:.0f} % of the test questions" in page
    assert f"its first document is needed in {100 * of_test['first is needed']:.0f} %" in page
