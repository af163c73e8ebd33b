"""The terms beside the published five: score, gain over a fixed list, likelihood of the gold answer, and boundary."""

import json
import math
from pathlib import Path

import pytest
from conftest import at, names, naming, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from stubs import make_tiny_llama

import reward_trajectories
from dynamicrag.evaluation.answers import score_question
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.prompts import Prompts
from dynamicrag.reward.likelihood import Likelihood
from dynamicrag.reward.terms import BOUNDARY, boundary_term, combine, gain_term
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.stage import UserError


def make_row(trajectories: list[tuple[list[int], str]], number: int = 1, **more) -> dict:
    docs = [{"id": f"d{number}{n}", "title": f"Title {n}", "text": f"river number {n}", "score": 0.5} for n in range(1, 5)]
    ids, responses = map(list, zip(*trajectories, strict=True))
    return {"id": f"q{number}", "question": "which river is it?", "dataset": "musique", "answers": ["the blue Nile"], "docs": docs, "docs_shown": 4,
            "id_lists": ids, "responses": responses, **more}


ROW = make_row([([1], "blue Nile"), ([1, 2], "Nile"), ([2], "oil"), ([1], "blue Nile")], baseline_k=2, baseline_response="Nile")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def reward(rows: list[dict], weights: str, *flags: str) -> list[dict]:
    write_jsonl(Path("in.jsonl"), rows)
    reward_trajectories.main(["--input_file", "in.jsonl", "--output_file", "out.jsonl", "--overwrite", "--weights", weights, *flags])
    return [row for _, row in read_json("out.jsonl")]


def term(rows: list[dict], name: str, *flags: str) -> list[float]:
    return [terms[name] for terms in reward(rows, f"{name}=1,em=0", *flags)[0]["score_terms"]]


# ---------------------------------------------------------------- score and gain


def test_the_score_is_what_evaluation_gives_by_the_data_sets_metric_or_another():
    for flags, metric in ((), None), (("--metric", "rouge"), "rouge"):
        scores = [score_question({**ROW, "response": response}, metric, "dataset", "x").score for response in ROW["responses"]]
        assert term([ROW], "score", *flags) == scores and len(set(scores)) == 3


def test_the_gain_is_the_score_minus_that_of_the_fixed_list():
    scores, gains = term([ROW], "score"), term([ROW], "gain")
    assert gains == pytest.approx([(1 + score - scores[1]) / 2 for score in scores]) and gains[1] == 0.5
    assert (gain_term(1, 0), gain_term(0, 1)) == (1, 0)
    with pytest.raises(UserError, match=at("in.jsonl:1: key 'baseline_response'")):
        term([{key: value for key, value in ROW.items() if key != "baseline_response"}], "gain")
    with pytest.raises(UserError, match=at("in.jsonl:1: key 'baseline_response'")):
        term([{**ROW, "baseline_response": ["the Nile"]}], "gain")


# ---------------------------------------------------------------- boundary


@pytest.mark.parametrize(("right", "value"), [(0, 0), (BOUNDARY / 2, 0.5), (BOUNDARY, 1), (0.8, 0.5), (1, 0)])
def test_the_boundary_term_is_highest_where_three_of_five_answers_are_right(right, value):
    assert boundary_term(right) == pytest.approx(value)


def test_the_boundary_weights_the_whole_question():
    """Half of the boundary's weight is kept by a question that is always right, and all by one at the boundary."""
    five = make_row([([1], "the blue Nile")] * 3 + [([2], "oil")] * 2)
    plain, weighted = (reward([five], weights)[0]["response_scores"] for weights in ("em=1,length=1", "em=1,length=1,boundary=1"))
    assert weighted == pytest.approx(plain)
    always = make_row([([1], "the blue Nile"), ([1, 2], "the blue Nile")])
    plain, weighted = (reward([always], weights)[0]["response_scores"] for weights in ("em=1,length=1", "em=1,length=1,boundary=1"))
    assert weighted == pytest.approx([score / 2 for score in plain])


@given(em=st.floats(0, 1), boundary=st.floats(0, 1), weight=st.floats(0, 9))
def test_the_boundary_never_raises_a_reward_and_changes_no_order(em, boundary, weight):
    lower, higher = (combine({"em": value, "boundary": boundary}, {"em": 1.0, "boundary": weight}) for value in (em / 2, em))
    assert 0 <= lower <= higher <= em + 1e-9


# ---------------------------------------------------------------- likelihood


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    make_tiny_llama(folder)
    return folder


def by_hand(folder: Path, row: dict, ids: list[int]) -> float:
    """exp of the mean log-probability of the gold answer's tokens, from one forward pass over the whole text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dynamicrag.llm.templates import PromptTokenizer
    from dynamicrag.models.chat_templates import read_template

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = Prompts().generator(row["question"], [row["docs"][n - 1] for n in ids], Prompts().instruction(row), ids)
    prompt = PromptTokenizer(tokenizer, read_template("template/llama3.jinja")).ids(asked)
    answer = tokenizer.encode(row["answers"][0], add_special_tokens=False)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([prompt + answer])).logits[0]
    logs = logits.log_softmax(dim=-1)
    return math.exp(sum(float(logs[len(prompt) - 1 + n, token]) for n, token in enumerate(answer)) / len(answer))


def test_the_likelihood_is_that_of_the_gold_answer_after_the_prompt_of_inference(generator, monkeypatch):
    Path("template").symlink_to(Path(__file__).parents[2] / "template")
    monkeypatch.setattr("dynamicrag.models.device._multiplies_bfloat16", lambda device: False)
    rows = [ROW, make_row([([3, 1, 2, 4], "x"), ([], "y")], 2, answers=["Zambezi"])]
    flags = ["--llm-model", str(generator), "--template", "template/llama3.jinja", "--device", "cpu"]
    for row, rewarded in zip(rows, reward(rows, "likelihood=1,em=0", *flags), strict=True):
        values = [terms["likelihood"] for terms in rewarded["score_terms"]]
        assert values == pytest.approx([by_hand(generator, row, ids) for ids in row["id_lists"]], rel=1e-4)
        assert rewarded["response_scores"] == values
    assert read_manifest("out.jsonl")["counts"]["likelihoods"] == 3 + 2, "equal selections are computed once"
    scored = Likelihood(str(generator), "template/llama3.jinja", None, "cpu", batch_tokens=1).of_trajectories(rows)
    assert [value for of_row in scored for value in of_row] == pytest.approx([by_hand(generator, row, ids) for row in rows for ids in row["id_lists"]], rel=1e-4)


def test_a_likelihood_without_a_generator_is_refused(capsys, generator):
    with pytest.raises(SystemExit):
        reward([ROW], "likelihood=1")
    assert names(capsys.readouterr().err, "--llm-model")
    with pytest.raises(UserError, match=naming("missing/model")):
        reward([ROW], "likelihood=1", "--llm-model", "missing/model")
    with pytest.raises(UserError, match=at("in.jsonl:1: key 'docs'")):
        reward([{key: value for key, value in ROW.items() if key != "docs"}], "likelihood=1", "--llm-model", str(generator))


def test_the_new_terms_are_combined_again_without_a_model():
    rewarded = reward([ROW], "score=1,gain=2,boundary=1")
    write_jsonl(Path("old.jsonl"), rewarded)
    reward_trajectories.main(["--input_file", "old.jsonl", "--output_file", "again.jsonl", "--reweight", "--weights", "score=1"])
    [again] = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert again["response_scores"] == [terms["score"] for terms in rewarded[0]["score_terms"]]
