"""construct_best_of_n.py and construct_kto.py: training rows with one output each, from rewarded trajectories."""

import itertools
import statistics
from pathlib import Path

import pytest
from conftest import logged, naming, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from trajectories import RIGHT, WORSE, WRONG, make_row, trajectory

import construct_best_of_n
import construct_kto
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.training_rows import TrainingWindow
from dynamicrag.reward.single_rows import ROLES, fitted
from dynamicrag.rows.identifiers import format_ids
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.stage import UserError

PROMPTS = Prompts()
REWARDED = "training_data/llama3_8b_output_dpo.jsonl"
STAGES = {"best_of_n": construct_best_of_n, "kto": construct_kto}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("training_data").mkdir()


def made(kind: str, rows: list[dict], *flags: str) -> dict[str, list[dict]]:
    """The rows of each role that a stage writes."""
    write_jsonl(Path(REWARDED), rows)
    STAGES[kind].main(["--overwrite", *flags])
    return {role: [row for _, row in read_json(path)] for role in ROLES if (path := Path(f"training_data/llama3_8b_{role}_{kind}.json")).exists()}


def tags(row: dict, role: str = "reranker", **how) -> dict[str, bool]:
    return {format_ids(single.ids) + f" {single.answer}" * (role == "generator"): single.more["kto_tag"] for single in construct_kto.tagged(row, role, **how)}


# ---------------------------------------------------------------- best of n


@pytest.mark.parametrize(("trajectories", "best"), [
    ([WRONG, RIGHT, WORSE], "[1]"), ([RIGHT], None), ([], None),
    ([([1, 2], "a", 0.9, 1.0), ([3], "b", 0.9, 1.0), ([4], "c", 0.9, 1.0), WRONG], "[3]"),  # fewest documents, then the first
    ([([], "a", 0.9, 1.0), ([3], "b", 0.9, 1.0), WRONG], "None"),
    ([([1], "a", 0.5, 0.0), ([2], "b", 0.5, 0.0)], None),  # equal rewards
])
def test_the_best_selection_of_a_question_is_the_target(trajectories, best):
    row = make_row(trajectories)
    assert [format_ids(single.ids) for single in construct_best_of_n.best_of(row, "reranker")] == ([best] if best else [])
    kept = construct_best_of_n.best_of(row, "reranker", keep_equal=True) if trajectories else []
    assert len(kept) == min(1, len(trajectories)), "--keep-equal"


@given(trajectories=st.lists(trajectory, min_size=1, max_size=8))
def test_no_other_trajectory_is_better_or_as_good_with_fewer_documents(trajectories):
    row = make_row([(ids, response, reward, float(response == "gold 1")) for ids, response, reward in trajectories])
    for single in construct_best_of_n.best_of(row, "reranker"):
        mine = row["id_lists"].index(single.ids)
        reward = max(score for ids, score in zip(row["id_lists"], row["response_scores"], strict=True) if ids == single.ids)
        assert all((reward, -len(single.ids)) >= (score, -len(ids)) for ids, score in zip(row["id_lists"], row["response_scores"], strict=True)), mine


def test_both_roles_are_asked_as_at_inference_and_learn_from_one_trajectory():
    row = make_row([WRONG, ([5, 2], "a sampled answer", 0.9, 1.0), WORSE])
    rows = made("best_of_n", [row])
    [reranker], [generator] = rows["reranker"], rows["generator"]
    system, user = PROMPTS.reranker(row["question"], row["docs"][:5])
    assert reranker == {"instruction": user["content"], "input": "", "output": "[5], [2]", "system": system["content"]}
    _, user = PROMPTS.generator(row["question"], [row["docs"][4], row["docs"][1]], PROMPTS.instruction(row), [5, 2])
    assert (generator["instruction"], generator["output"]) == (user["content"], "gold 1")
    assert made("best_of_n", [row], "--generator-chosen", "best")["generator"][0]["output"] == "a sampled answer"


# ---------------------------------------------------------------- KTO


def test_a_set_is_desirable_if_its_mean_reward_is_above_that_of_all_trajectories():
    row = make_row([([1, 2], "x", 0.5, 0.0), ([2, 1], "x", 0.9, 1.0), ([3], "x", 0.6, 0.0), ([4], "x", 0.1, 0.0), ([1, 2], "x", 0.5, 0.0), ([], "x", 0.52, 0.0)])
    # Mean 0.52. The set {1, 2} has (0.5 + 0.9 + 0.5) / 3, and is written in the order of its best trajectory; None is at the mean.
    assert tags(row) == {"[2], [1]": True, "[3]": True, "[4]": False}
    assert tags(row, min_distance=0.1) == {"[2], [1]": True, "[4]": False}


def test_the_generators_answer_is_judged_by_its_correctness_alone():
    """A right answer from two documents has the lower reward because of brevity, but it is not undesirable."""
    row = make_row([([1, 2], "gold 1", 0.5, 1.0), ([1], "gold 1", 0.9, 1.0), ([3], "bad", 0.6, 0.0), ([4], "", 0.1, 0.0)])
    assert tags(row, "generator") == {"[1], [2] gold 1": True, "[1] gold 1": True, "[3] bad": False}


@given(trajectories=st.lists(trajectory, max_size=8))
def test_every_set_has_one_tag_and_equal_rewards_have_none(trajectories):
    row = make_row([(ids, response, reward, float(response == "gold 1")) for ids, response, reward in trajectories])
    singles = construct_kto.tagged(row, "reranker")
    assert len({frozenset(single.ids) for single in singles}) == len(singles)
    if len(set(row["response_scores"])) < 2:
        assert singles == []
    for single in singles:
        mine = [score for ids, score in zip(row["id_lists"], row["response_scores"], strict=True) if {*ids} == {*single.ids}]
        assert (statistics.fmean(mine) > statistics.fmean(row["response_scores"])) == single.more["kto_tag"]
        assert list(single.ids) in row["id_lists"]


def test_the_output_before_a_row_is_never_of_its_own_question():
    """LLaMA-Factory estimates KL from the output of the row before, which must not be an output for the same prompt."""
    rows = [make_row([RIGHT, WRONG, WORSE], number) for number in range(1, 6)]
    written = made("kto", rows)["reranker"]
    assert len(written) == 15 and [row["kto_tag"] for row in written].count(True) == 5
    prompts = [row["instruction"] for row in written]
    assert all(before != after for before, after in itertools.pairwise(prompts))
    assert sorted(prompts) == sorted(3 * list(dict.fromkeys(prompts)))


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("kind", STAGES)
def test_only_the_roles_asked_for_are_written(kind):
    assert list(made(kind, [make_row([RIGHT, WORSE])], "--roles", "generator")) == ["generator"]
    assert read_manifest(f"training_data/llama3_8b_generator_{kind}.json")["counts"].keys().isdisjoint({"reranker_rows"})


@pytest.mark.parametrize("kind", STAGES)
def test_a_role_without_rows_is_refused_before_anything_is_written(kind):
    with pytest.raises(UserError, match=naming(REWARDED, "reranker")):
        made(kind, [make_row([RIGHT])])
    assert [path.name for path in Path("training_data").glob("*.json")] == []


@pytest.mark.parametrize("kind", STAGES)
def test_a_row_that_names_a_removed_document_is_left_out_and_an_equal_row_is_written_once(kind, caplog):
    rows = [make_row([([1], "gold 1", 0.9, 1.0), ([4], "bad", 0.1, 0.0)]), make_row([([4], "gold 2", 0.9, 1.0), ([1], "bad", 0.1, 0.0)], 2)]
    whole = TrainingWindow()
    single = {"best_of_n": construct_best_of_n.best_of, "kto": construct_kto.tagged}[kind]
    first = fitted((0, rows[0]), "reranker", single, PROMPTS, whole)[0].row
    cutoff = TrainingWindow(10**6).prompt_tokens(PROMPTS.reranker("what is 1?", rows[0]["docs"][:3])) + 2
    left = made(kind, [*rows, {**rows[0], "id": "again"}], "--cutoff_len", str(cutoff), "--tokenizer", "no/model", "--roles", "reranker")["reranker"]
    assert len(left) == (1 if kind == "best_of_n" else 2) and left[0]["output"] == first["output"] == "[1]"
    assert "title 3" in left[0]["instruction"] and "title 4" not in left[0]["instruction"]
    assert read_manifest(f"training_data/llama3_8b_reranker_{kind}.json")["counts"]["left_out"] > 0 and logged(caplog, "cutoff_len", cutoff)
