"""From reranked documents to SFT sets: process_training_data, reranker_sequence, split_for_sft_dpo, construct_generator_sft."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import at, logged, naming

import construct_generator_sft
import process_training_data
import reranker_sequence
import split_for_sft_dpo
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts
from dynamicrag.rows import tasks
from dynamicrag.rows.identifiers import parse_ids
from dynamicrag.rows.tasks import derive_dataset
from dynamicrag.stage import UserError


def make_row(number: int, scores: list[float], **more) -> dict:
    docs = [
        {
            "id": f"{number}/{n}", "title": f"title {n}", "text": f"text {number} {n}", "score": 1.0 - n / 100,
            "rerank_score": score, "rerank_label": "true" if score > 0.5 else "false",
        }
        for n, score in enumerate(scores, start=1)
    ]
    return {"id": f"q{number}", "question": f"what is {number}?", "answers": [f"answer {number}"], "docs": docs, **more}


def make_rows(count: int, n_docs: int = 25, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [make_row(n, [round(rng.random(), 3) for _ in range(n_docs)]) for n in range(count)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path) -> list[dict]:
    return [row for _, row in read_json(path)]


SEQUENCES = Path("training_data/retrieval_data_rerank_sequence.jsonl")
NORMAL = Path("training_data/retrieval_data_rerank_normal.jsonl")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def process(rows: list[dict], *flags: str) -> tuple[list[dict], list[dict]]:
    write(Path("output/retrieval_data_rerank.jsonl"), rows)
    process_training_data.main(["--overwrite", *flags])
    return tuple(read(path) if path.stat().st_size else [] for path in (SEQUENCES, NORMAL))


# ---------------------------------------------------------------- expert sequences


def test_an_expert_sequence_is_the_relevant_documents_best_first():
    [row], _ = process([make_row(1, [0.6, 0.1, 0.9, 0.6, 0.7, 0.2])], "--max_rows", "1")
    assert row["true_id"] == [1, 3, 4, 5]
    assert row["false_id"] == [2, 6]
    assert row["true_count"] == 4
    assert row["sequence"] == [3, 5, 1, 4], "equal scores keep the retriever's order"
    assert row["sequence_length"] == 4


def test_gold_documents_are_the_labels_where_asked_for():
    rows = [make_row(1, [0.6, 0.1, 0.9], gold_docs=["1/2", "1/3", "elsewhere"]), make_row(2, [0.9, 0.8, 0.7], gold_docs=[])]
    expert, _ = process(rows, "--max_rows", "2", "--labels", "gold")
    assert {row["id"]: (row["true_id"], row["false_id"], row["sequence"]) for row in expert} == {
        "q1": ([2, 3], [1], [3, 2]), "q2": ([], [1, 2, 3], []),
    }
    with pytest.raises(UserError, match=naming("row q3", "gold_docs", "positive_ctxs")):
        process([*rows, make_row(3, [0.9])], "--labels", "gold")


def test_a_question_without_relevant_documents_is_an_expert_row_that_says_none():
    expert, _ = process([make_row(1, [0.1, 0.2])], "--max_rows", "1")
    assert (expert[0]["sequence"], expert[0]["sequence_length"]) == ([], 0)
    reranker_sequence.main([])
    assert read("training_data/reranker_bc_training.json")[0]["output"] == "None"


def test_a_sequence_stops_at_max_length_with_the_best():
    expert, _ = process([make_row(1, [0.51 + n / 100 for n in range(20)])], "--max_rows", "1")
    assert expert[0]["sequence"] == list(range(20, 6, -1))
    assert expert[0]["true_count"] == 20


def test_only_the_documents_shown_are_labelled():
    expert, others = process(make_rows(30, n_docs=40), "--n_docs", "7")
    for row in expert + others:
        assert sorted(row["true_id"] + row["false_id"]) == list(range(1, 8))
        assert len(row["docs"]) == 40
    for row in expert:
        assert max(row["sequence"], default=0) <= 7


def test_every_row_is_labelled_and_in_exactly_one_file_also_after_the_caps_are_full():
    rows = make_rows(60)
    expert, others = process(rows, "--max_rows", "5", "--max_per_length", "1")
    assert len(expert) == 5
    assert len(others) == 55
    assert sorted(row["id"] for row in expert + others) == sorted(row["id"] for row in rows)
    for row in expert + others:
        labels = [doc["rerank_label"] == "true" for doc in row["docs"][:40]]
        assert row["true_id"] == [n for n, label in enumerate(labels, start=1) if label]
        assert row["true_count"] == sum(labels)


def test_one_question_has_one_target():
    expert, _ = process(make_rows(60))
    assert len({row["id"] for row in expert}) == len(expert)


@pytest.mark.parametrize(("flags", "most", "most_per_length"), [
    (["--max_rows", "20"], 20, 10**6), (["--max_rows", "50", "--max_per_length", "3"], 50, 3),
])
def test_caps_are_full_and_never_exceeded(flags, most, most_per_length):
    rows = make_rows(80)
    expert, _ = process(rows, *flags)
    lengths = Counter(row["sequence_length"] for row in expert)
    assert max(lengths.values()) <= most_per_length
    available = Counter(min(14, sum(doc["rerank_score"] > 0.5 for doc in row["docs"])) for row in rows)
    assert len(expert) == min(most, sum(min(count, most_per_length) for count in available.values()))


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (4, 1), (10, 2), (53, 10)])
def test_a_small_data_set_gives_a_fifth_and_says_so(rows, expected, caplog):
    expert, others = process(make_rows(rows, 3))
    assert (len(expert), len(others)) == (expected, rows - expected)
    assert logged(caplog, rows, "150,000", expected) == 1


def test_a_data_set_of_published_size_gives_the_published_number_without_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(process_training_data, "PUBLISHED_EXPERT_ROWS", 6)
    expert, _ = process(make_rows(40, 3))
    assert len(expert) == 6
    assert not logged(caplog)


def test_the_published_recipe_pads_every_length_from_the_relevant_ones_up():
    scores = [0.9, 0.1, 0.8, 0.2, 0.3, 0.4]
    expert, others = process([make_row(1, scores)], "--targets", "padded", "--max_rows", "99", "--max_length", "5")
    assert others == []
    assert [row["sequence_length"] for row in expert] == [2, 3, 4, 5]
    assert len({row["id"] for row in expert}) == 4
    for row in expert:
        assert len(row["sequence"]) == row["sequence_length"]
        assert sorted(row["sequence"][:2]) == [1, 3]
        assert set(row["sequence"][2:]) <= {2, 4, 5, 6}
        assert len(set(row["sequence"])) == len(row["sequence"])


def test_the_published_recipe_has_no_target_for_more_relevant_documents_than_a_sequence_holds():
    expert, others = process([make_row(1, [0.9] * 6), make_row(2, [0.9, 0.1])], "--targets", "padded", "--max_rows", "99", "--max_length", "5")
    assert {row["id"] for row in expert} == {"q2/1", "q2/2"}
    assert [row["id"] for row in others] == ["q1"]


def test_padded_targets_shuffle_and_expert_ones_do_not():
    rows = [make_row(n, [0.9] * 6) for n in range(30)]
    padded, _ = process(rows, "--targets", "padded", "--max_rows", "99")
    assert len({tuple(row["sequence"]) for row in padded}) > 5
    expert, _ = process(rows, "--max_rows", "99")
    assert {tuple(row["sequence"]) for row in expert} == {(1, 2, 3, 4, 5, 6)}


@pytest.mark.parametrize("targets", ["expert", "padded"])
def test_equal_seeds_give_equal_bytes_and_another_seed_another_choice(targets):
    rows = make_rows(60)
    runs = []
    for seed in ("1", "1", "2"):
        process(rows, "--seed", seed, "--targets", targets)
        runs.append((SEQUENCES.read_bytes(), NORMAL.read_bytes()))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


def test_documents_without_labels_are_refused_by_name_and_with_the_command_that_makes_them():
    rows = make_rows(3, 3)
    del rows[1]["docs"][2]["rerank_label"]
    with pytest.raises(UserError, match=naming("row q1", "1/3", "rerank_label", "reranker.py")):
        process(rows)
    assert not SEQUENCES.exists()
    assert len(process(rows, "--n_docs", "2")[0]) == 1, "documents that are not shown need no label"


def published(row: dict) -> dict:
    """The row in the form of published training data: labels without scores."""
    return {**row, "docs": [{key: value for key, value in doc.items() if key not in ("rerank_score", "score")} for doc in row["docs"]]}


@pytest.mark.parametrize("targets", ["expert", "padded"])
def test_labels_without_scores_are_taken_in_the_order_of_the_documents_and_it_is_said_once(targets, caplog):
    expert, others = process([published(make_row(n, [0.6, 0.1, 0.9, 0.7])) for n in range(10)], "--targets", targets)
    assert {tuple(row["true_id"]) for row in expert + others} == {(1, 3, 4)}
    if targets == "expert":
        assert {tuple(row["sequence"]) for row in expert} == {(1, 3, 4)}
    assert all("rerank_score" not in doc for row in expert + others for doc in row["docs"]), "none is made up"
    assert [record.args[1:] for record in caplog.records if "rerank_score" in record.getMessage()] == [(10, 10)], "of 10 rows"
    [example] = generator_examples([published(labelled(1, [0.6, 0.1, 0.9, 0.7]))])
    assert titles(example) == ["1", "3", "4"]
    assert logged(caplog, 1, "rerank_score") == 1


def test_documents_half_of_which_have_a_score_are_refused():
    row = make_row(1, [0.6, 0.1, 0.9])
    del row["docs"][1]["rerank_score"]
    with pytest.raises(UserError, match=naming("row q1", "1/2", "rerank_label", "rerank_score")):
        process([row])
    row = process_training_data.label(make_row(1, [0.6, 0.1, 0.9]), 20)
    del row["docs"][2]["rerank_score"]
    with pytest.raises(UserError, match=naming("row q1", "docs[2]", "rerank_score")):
        generator_examples([row])


@pytest.mark.parametrize(("given", "label"), [(True, "true"), (False, "false"), ("True", "true"), ("maybe", None), (None, None)])
def test_a_label_is_true_or_false_in_any_spelling_and_nothing_else(given, label):
    row = make_row(1, [0.9, 0.1])
    row["docs"][0]["rerank_label"] = given
    if label is None:
        with pytest.raises(UserError, match=r"output/retrieval_data_rerank\.jsonl:1: key 'docs\[0\]\.rerank_label'"):
            process([row])
    else:
        assert process([row])[0][0]["true_id"] == ([1] if label == "true" else [])


def test_unknown_keys_and_answers_in_any_form_pass_through():
    rows = [make_row(1, [0.9], answers=None, answer="Paris", note={"a": [1]}), make_row(2, [0.9], answers=["a", " b "])]
    expert, others = process(rows)
    found = {row["id"]: row for row in expert + others}
    assert found["q1"]["answers"] == ["Paris"]
    assert found["q1"]["note"] == {"a": [1]}
    assert found["q2"]["answers"] == ["a", " b "]


# ---------------------------------------------------------------- the reranker's SFT set


def test_the_reranker_learns_from_exactly_the_documents_that_were_labelled():
    rows = make_rows(40, n_docs=30)
    expert, _ = process(rows, "--n_docs", "6", "--max_rows", "40")
    reranker_sequence.main([])
    examples = read("training_data/reranker_bc_training.json")
    assert len(examples) == len(expert) == 40
    for row, example in zip(expert, examples, strict=True):
        assert set(example) == {"instruction", "input", "output", "system"}
        assert example["input"] == ""
        assert parse_ids(example["output"], 6).ids == row["sequence"]
        assert [f"[{n}] title {n}\n" in example["instruction"] for n in range(1, 9)] == [True] * 6 + [False] * 2


def test_one_prompts_file_changes_both_sets():
    Path("prompts.yaml").write_text("reranker: {system: RERANK}\ngenerator: {system: GENERATE}\n")
    process(make_rows(20))
    reranker_sequence.main(["--prompts", "prompts.yaml"])
    assert {row["system"] for row in read("training_data/reranker_bc_training.json")} == {"RERANK"}
    split_for_sft_dpo.main([])
    construct_generator_sft.main(["--prompts", "prompts.yaml"])
    assert {row["system"] for row in read("training_data/generator_sft_training.json")} == {"GENERATE"}


# ---------------------------------------------------------------- the division


@pytest.mark.parametrize(
    ("rows", "flags", "sft", "dpo"),
    [
        (2, [], 1, 1), (3, [], 2, 1), (10, [], 6, 4), (101, [], 61, 40), (10, ["--sft_size", "3"], 3, 7),
        (10, ["--dpo_size", "1"], 6, 1), (10, ["--sft_size", "8", "--dpo_size", "5"], 8, 2),
    ],
)
def test_the_rest_divides_without_loss_overlap_or_an_empty_part(rows, flags, sft, dpo, caplog):
    made = [process_training_data.label(row, 3) for row in make_rows(rows, 3)]
    write(NORMAL, made)
    split_for_sft_dpo.main(flags)
    parts = read("training_data/training_data_sft.jsonl"), read("training_data/training_data_dpo.jsonl")
    assert tuple(map(len, parts)) == (sft, dpo)
    ids = [row["id"] for part in parts for row in part]
    assert len(set(ids)) == len(ids)
    by_id = {row["id"]: row for row in made}
    assert all(row == by_id[row["id"]] for part in parts for row in part), "rows are unchanged"
    assert logged(caplog, rows, "120,000") == ("--sft_size" not in flags)


@pytest.mark.parametrize(("flags", "sizes"), [(["--dev_size", "20"], (48, 32, 20)), (["--dev_size", "5", "--sft_size", "10", "--dpo_size", "7"], (10, 7, 5))])
def test_questions_held_out_are_in_no_other_part(flags, sizes):
    write(NORMAL, [process_training_data.label(row, 3) for row in make_rows(100, 3)])
    split_for_sft_dpo.main(flags)
    parts = [read(f"training_data/training_data_{part}.jsonl") for part in ("sft", "dpo", "dev")]
    assert tuple(map(len, parts)) == sizes
    assert len({row["id"] for part in parts for row in part}) == sum(sizes)


@pytest.mark.parametrize(
    ("rows", "flags"),
    [(1, []), (5, ["--sft_size", "5"]), (5, ["--sft_size", "0"]), (5, ["--dpo_size", "0"]), (5, ["--dev_size", "4"]), (5, ["--dev_size", "9"])],
)
def test_an_empty_part_is_an_error(rows, flags):
    write(NORMAL, [process_training_data.label(row, 3) for row in make_rows(rows, 3)])
    with pytest.raises(UserError, match=naming(rows, "--sft_size", "--dev_size")):
        split_for_sft_dpo.main(flags)


def test_published_sizes_are_published_numbers(caplog):
    parts = split_for_sft_dpo.places(120_000, None, None, 0)
    assert [split_for_sft_dpo.divide(120_000, parts, 1).count(number) for number in range(4)] == [0, 70_000, 50_000, 0]
    assert not caplog.text


def test_the_division_is_random_and_seeded():
    parts = split_for_sft_dpo.places(100, None, None, 0)
    divisions = [split_for_sft_dpo.divide(100, parts, seed) for seed in (1, 1, 2)]
    assert divisions[0] == divisions[1] != divisions[2]
    assert divisions[0] != bytearray(60 * b"\x01" + 40 * b"\x02")


# ---------------------------------------------------------------- the generator's SFT set


def generator_examples(rows: list[dict], *flags: str) -> list[dict]:
    write(Path("training_data/training_data_sft.jsonl"), rows)
    construct_generator_sft.main(["--overwrite", *flags])
    return read("training_data/generator_sft_training.json")


def labelled(number: int, scores: list[float], **more) -> dict:
    return process_training_data.label(make_row(number, scores, **more), 20)


def titles(example: dict) -> list[str]:
    return re.findall(r"^\[\d+\] title (\d+)$", example["instruction"], re.MULTILINE)


def test_the_generator_learns_from_the_relevant_documents_best_first():
    [example] = generator_examples([labelled(1, [0.6, 0.1, 0.9, 0.7])])
    assert set(example) == {"instruction", "input", "output", "system"}
    assert titles(example) == ["3", "4", "1"]
    assert example["output"] == "answer 1"
    assert "what is 1?" in example["instruction"]


@pytest.mark.parametrize(("documents", "shown"), [("labelled", [3, 1]), ("top:2", [1, 2]), ("top:9", [1, 2, 3, 4])])
def test_the_generator_is_shown_the_labelled_or_the_first_documents(documents, shown):
    [example] = generator_examples([labelled(1, [0.6, 0.1, 0.9, 0.2])], "--documents", documents)
    assert titles(example) == [str(position) for position in shown]


@pytest.mark.parametrize("value", ["top:0", "top", "3", "gold"])
def test_other_documents_than_labelled_or_the_first_are_refused(value):
    with pytest.raises(SystemExit, match="2"):
        construct_generator_sft.main(["--documents", value])


def test_the_generator_is_shown_no_more_than_max_docs():
    [example] = generator_examples([labelled(1, [0.6, 0.1, 0.9, 0.7])], "--max_docs", "2")
    assert titles(example) == ["3", "4"]


def test_no_relevant_document_is_a_question_without_documents():
    [example] = generator_examples([labelled(1, [0.1, 0.2])])
    assert example["instruction"] == Prompts().generator("what is 1?", [], tasks.DEFAULT_TASK.instruction)[1]["content"]


def test_rows_without_labels_never_train_on_no_documents():
    with pytest.raises(UserError, match=at("training_data_sft.jsonl:1: key 'true_id'")):
        generator_examples([make_row(1, [0.9])])


@pytest.mark.parametrize(
    ("more", "output"),
    [
        ({"answers": "Paris"}, "Paris"), ({"answers": None, "answer": "Paris"}, "Paris"),
        ({"answers": None, "golden_answers": ["Lyon", "Paris"]}, "Lyon"), ({"answers": ["", " ", "Paris"]}, "Paris"),
        ({"dataset": "fever", "answers": ["SUPPORTS"]}, "SUPPORTS"),
        ({"dataset": "asqa", "qa_pairs": [{"short_answers": ["one", "1"]}, {"short_answers": ["two"]}]}, "one; two"),
        ({"dataset": "asqa", "qa_pairs": [{"short_answers": []}, {"short_answers": ["", "two"]}]}, "two"),
        ({"dataset": "asqa"}, "answer 1"),
    ],
)
def test_the_target_is_a_whole_gold_answer(more, output):
    assert [example["output"] for example in generator_examples([labelled(1, [0.9], **more)])] == [output]


def test_a_question_without_any_gold_answer_trains_nothing_and_is_counted(caplog):
    examples = generator_examples([
        labelled(1, [0.9], answers=[]), labelled(2, [0.9], answers=["  "]), labelled(4, [0.9], answers=None), labelled(3, [0.9]),
    ])
    assert [example["output"] for example in examples] == ["answer 3"]
    assert logged(caplog, 3, "q1") == 1


@pytest.mark.parametrize(
    ("identifier", "stem", "dataset"),
    [
        ("nq_17", "", "nq"), ("tc_5", "", "triviaqa"), ("batch_3", "", None), ("x_nq_17", "", None), ("5", "nq", "nq"),
        ("5", "nq_dev", None), ("5", "research", None), ("arc_1", "", "arc"), ("search_1", "", None), ("asqa_1", "nq", "asqa"),
    ],
)
def test_a_data_set_is_recognised_by_exact_prefix_or_stem_only(identifier, stem, dataset):
    assert derive_dataset(identifier, stem) == dataset


def test_the_data_set_decides_the_instruction():
    examples = generator_examples([labelled(1, [0.9], dataset="fever"), labelled(2, [0.9], dataset="eli5"), labelled(3, [0.9], id="batch_3")])
    for example, task in zip(examples, (tasks.TASKS["fever"], tasks.TASKS["eli5"], tasks.DEFAULT_TASK), strict=True):
        assert task.instruction in example["instruction"]


def test_the_whole_part_of_the_chain_loses_no_question(caplog):
    rows = make_rows(50)
    expert, _ = process(rows)
    split_for_sft_dpo.main([])
    reranker_sequence.main([])
    construct_generator_sft.main([])
    dpo = read("training_data/training_data_dpo.jsonl")
    examples = read("training_data/generator_sft_training.json")
    assert len(expert) + len(examples) + len(dpo) == 50
    assert (len(expert), len(examples), len(dpo)) == (10, 24, 16)
    asked = {re.search(r"what is (\d+)\?", example["instruction"])[1] for example in examples}
    assert not asked & {row["id"].removeprefix("q") for row in expert + dpo}


@pytest.mark.parametrize(
    ("stage", "path", "broken", "says"),
    [
        (reranker_sequence, SEQUENCES, {"sequence": "[1]"}, "sequence"),
        (reranker_sequence, SEQUENCES, {"sequence": [4]}, "sequence"),
        (reranker_sequence, SEQUENCES, {"sequence": [0]}, "sequence"),
        (reranker_sequence, SEQUENCES, {"true_id": None}, "true_id"),
        (construct_generator_sft, Path("training_data/training_data_sft.jsonl"), {"true_id": [4]}, "true_id"),
        (construct_generator_sft, Path("training_data/training_data_sft.jsonl"), {"true_id": [0]}, "true_id"),
        (construct_generator_sft, Path("training_data/training_data_sft.jsonl"), {"true_id": ["1"]}, "true_id"),
    ],
)
def test_positions_that_name_no_document_are_refused_with_file_line_and_key(stage, path, broken, says):
    good = {**labelled(1, [0.9, 0.1, 0.8]), "sequence": [1, 3], "sequence_length": 2}
    write(path, [good, {**good, "id": "q2", **broken}])
    with pytest.raises(UserError, match=rf"{path}:2: key '{says}'"):
        stage.main([])
