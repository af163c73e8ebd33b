"""sampling_dpo_trajectories.py: trajectories with a stub in place of the LLM, and with the real engine and a tiny LLM."""

import json
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import at, logged, write_jsonl
from stages import REPO
from stubs import StubEngine, documents, make_text, make_tiny_llama, question

import sampling_dpo_trajectories
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.rows.expert import expert_sequence
from dynamicrag.rows.identifiers import summarise_selections
from dynamicrag.rows.manifest import read_manifest
from dynamicrag.stage import UserError, options_from


def caller(reply, *flags: str) -> RequestBuilder:
    return RequestBuilder(StubEngine(reply), options_from(sampling_dpo_trajectories.parse_args(list(flags)), CallOptions))


def read(path: str) -> list[dict]:
    return [row for _, row in read_json(path)]


def sampled(rows, texts, *flags: str):
    """The sampled rows and the engine. The n selections of each row are the first n of `texts`."""
    call = caller(lambda request, kind, titles: texts[: request.n] if kind == "select" else "from " + " ".join(titles), *flags)
    args = sampling_dpo_trajectories.parse_args(list(flags))
    return sampling_dpo_trajectories.sample_trajectories(rows, (call, call), args), call.engine


EIGHT = ["[1], [2]", "prose", "[2], [1]", "[1], [2]", "None", "[9]", "[2], [1], [2]", "[3]"]


def test_a_bad_trajectory_costs_that_trajectory_alone():
    [row], _ = sampled([question()], EIGHT)
    assert row["id_lists"] == [[1, 2], [2, 1], [1, 2], [], [2, 1], [3]]
    assert row["responses"] == ["from d1 d2", "from d2 d1", "from d1 d2", "from ", "from d2 d1", "from d3"]
    assert row["selections"] == [text for text in EIGHT if text not in ("prose", "[9]")]
    assert row["invalid_selections"] == ["prose", "[9]"]
    assert row["from_expert"] == [False] * 6
    assert row["response_tokens"] == [1] * 6


def test_all_samples_share_a_prompt_and_every_distinct_selection_is_answered_once():
    rows, engine = sampled([question(1), question(2)], EIGHT)
    selections, answers = engine.batches
    assert [request.n for request in selections] == [8, 8]
    assert {request.temperature for request in selections} == {1.0}
    assert len({request.seed for request in selections}) == 2
    assert len(answers) == 2 * 4
    assert {(request.n, request.temperature) for request in answers} == {(1, 0.0)}
    assert len({request.seed for request in answers}) == 8
    assert rows[0]["usage"] == {"calls": 5, "prompt_tokens": 105 + 102 + 102 + 100 + 101, "generated_tokens": 8 + 4}


def test_a_set_has_one_answer_if_documents_are_shown_as_retrieved():
    [row], engine = sampled([question()], EIGHT, "--answer-order", "retrieval")
    assert row["id_lists"] == [[1, 2], [2, 1], [1, 2], [], [2, 1], [3]], "selections stay as sampled"
    assert len(engine.batches[1]) == 3 == row["usage"]["calls"] - 1
    assert row["responses"] == ["from d1 d2"] * 3 + ["from ", "from d1 d2", "from d3"]


def test_a_question_without_any_readable_trajectory_is_kept_and_empty():
    [row, other], _ = sampled([question(1), question(2)], ["prose"] * 8)
    assert row["id_lists"] == row["responses"] == row["selections"] == row["response_tokens"] == row["from_expert"] == []
    assert len(row["invalid_selections"]) == 8
    seen = summarise_selections([row, other])
    assert seen["malformed"] == 16 and seen["k_mean"] == seen["none_share"] == 0


def test_trajectories_are_counted():
    rows, _ = sampled([question()], EIGHT)
    assert summarise_selections(rows) == pytest.approx({
        "questions": 1, "trajectories": 8, "malformed": 2, "out_of_range": 1, "repeated": 1, "none_share": 1 / 6,
        "k_mean": 9 / 6, "k_spread": (17 / 6 - 1.5**2) ** 0.5, "distinct_selections": 4, "distinct_answers": 4,
    })


def test_the_sampling_flags_reach_the_requests():
    _, engine = sampled([question(docs=9)], EIGHT, "--num-samples", "3", "--temperature", "0.7", "--top-p", "0.9", "--topn", "4")
    [request], _ = engine.batches
    assert (request.n, request.temperature, request.top_p) == (3, 0.7, 0.9)
    assert len(StubEngine.titles(request.messages)) == 4


@pytest.mark.parametrize(("k", "shown"), [(2, 2), (9, 5)])
def test_the_answer_from_the_fixed_list_is_no_trajectory_and_is_asked_once(k, shown):
    rows, engine = sampled([question(1), {**question(2), "baseline_response": "of an earlier run"}], EIGHT, "--baseline-top", str(k))
    fixed = list(range(1, shown + 1))
    for row in rows:
        assert (row["baseline_k"], row["baseline_response"]) == (shown, "from " + " ".join(f"d{n}" for n in fixed))
        assert len(row["id_lists"]) == len(row["responses"]) == 6
        assert row["usage"]["calls"] == 1 + len({*map(tuple, row["id_lists"]), tuple(fixed)})
    assert len(engine.batches[1]) == sum(row["usage"]["calls"] - 1 for row in rows)
    [row], _ = sampled(rows[:1], EIGHT)
    assert "baseline_k" not in row and "baseline_response" not in row
    assert sampling_dpo_trajectories.no_trajectory(question(), "too long", k)["baseline_response"] == ""


# ---------------------------------------------------------------- the expert's trajectory


def judged(*scores: float, **more) -> dict:
    """A question whose documents have these rerank scores. The label is true for a score above 0.5."""
    docs = [{**doc, "rerank_score": score, "rerank_label": "true"} for doc, score in zip(documents(len(scores)), scores, strict=True)]
    return question(1, docs, true_id=[n for n, score in enumerate(scores, start=1) if score > 0.5], **more)


@pytest.mark.parametrize(
    ("scores", "expert"), [((0.1, 0.6, 0.9), [3, 2]), ((0.1, 0.2), []), ((0.9, 0.9), [1, 2]), ((0.1, 0.1, 0.1, 0.1, 0.1, 0.9), [])]
)
def test_the_expert_is_one_more_trajectory_among_the_documents_shown(scores, expert):
    [row], engine = sampled([judged(*scores)], ["[1]"] * 8, "--include-expert", "--topn", "5")
    assert row["id_lists"] == [[1]] * 8 + [expert]
    assert row["from_expert"] == [False] * 8 + [True]
    assert row["responses"][-1] == "from " + " ".join(f"d{n}" for n in expert)
    assert [len(batch) for batch in engine.batches] == [1, 1 if expert == [1] else 2]
    assert summarise_selections([row])["k_mean"] == 1, "what the model wrote, without the expert"


def test_an_expert_that_agrees_with_a_sample_is_not_answered_again():
    _, engine = sampled([judged(0.9, 0.1)], ["[1]"] * 8, "--include-expert")
    assert len(engine.batches[1]) == 1


@pytest.mark.parametrize(
    ("rows", "says"), [([question()], at("q.jsonl:1: key 'true_id'")), ([judged(0.9), question(2, true_id=[1])], at("q.jsonl: row q2", "docs[0]", "rerank_score"))]
)
def test_an_expert_without_labels_or_scores_is_an_error_before_a_model_is_loaded(here, rows, says):
    write_jsonl(Path("q.jsonl"), rows)
    with pytest.raises(UserError, match=says):
        sampling_dpo_trajectories.main(["--input-jsonl", "q.jsonl", "--template", "t.jinja", "--include-expert"])
    assert here == []


@pytest.mark.parametrize(("flags", "status"), [([], None), (["--topn", "3"], 3), (["--topn", "4"], None), (["--topn", "2"], 2)])
def test_documents_shown_are_those_that_were_labelled_or_both_numbers_are_named(here, flags, status, monkeypatch):
    """Each question has 4 documents, and all 4 were labelled. Any number of at least 4 shows them all."""
    row = question(docs=documents(4), true_id=[1], false_id=[2, 3, 4])
    write_jsonl(Path("q.jsonl"), [row])

    def load(engine, calls):
        raise RuntimeError("a model is loaded")

    monkeypatch.setattr(sampling_dpo_trajectories, "load_builders", load)
    arguments = ["--input-jsonl", "q.jsonl", "--template", "t.jinja", "--overwrite", *flags]
    if status is None:
        with pytest.raises(RuntimeError, match="a model is loaded"):
            sampling_dpo_trajectories.main(arguments)
        return
    with pytest.raises(UserError, match=at(f"q.jsonl: row {row['id']}", f"--topn {status}", "--topn 4", f"--n_docs {status}")):
        sampling_dpo_trajectories.main(arguments)


def test_the_expert_of_published_labels_is_in_the_order_of_the_documents(caplog):
    rows = [{**question(), "docs": documents(3, rerank_label="true"), "true_id": [3, 1]}]
    sampling_dpo_trajectories.check_judged("q.jsonl", rows)
    assert logged(caplog, "q.jsonl", 1, "rerank_score") == 1
    assert sampling_dpo_trajectories.expert_selection(rows[0], 3) == [1, 3]


@pytest.mark.parametrize("flags", [["--num-samples", "0"], ["--temperature", "-1"], ["--temperature", "2.1"], ["--temperature", "0"], ["--top-p", "0"], ["--top-p", "1.1"]])
def test_sampling_that_makes_no_sense_is_refused(flags):
    with pytest.raises(SystemExit):
        sampling_dpo_trajectories.parse_args(flags)


def test_the_expert_is_the_one_that_is_cloned():
    docs = documents(3, rerank_score=0.7)
    assert expert_sequence(docs, [1, 3]) == [1, 3] and expert_sequence(docs, [1, 2, 3], 2) == [1, 2]


# ---------------------------------------------------------------- documents in another order for each sample


def first_shown(request, kind, titles):
    return ["[1], [2]"] * request.n if kind == "select" else "from " + " ".join(titles)


def test_permuted_identifiers_are_mapped_back_to_the_documents_they_named():
    call = caller(first_shown)
    rows = [question(n, 6) for n in (1, 2)]
    args = sampling_dpo_trajectories.parse_args(["--permute", "--num-samples", "20"])
    results = sampling_dpo_trajectories.sample_trajectories(rows, (call, call), args)
    requests = call.engine.batches[0]
    assert len(requests) == 40 and {request.n for request in requests} == {1}
    assert len({request.seed for request in requests}) == 40
    for result, asked in zip(results, (requests[:20], requests[20:]), strict=True):
        shown = [StubEngine.titles(request.messages) for request in asked]
        assert all(sorted(titles) == [f"d{n}" for n in range(1, 7)] for titles in shown)
        assert len(set(map(tuple, shown))) > 15
        assert [[f"d{n}" for n in ids] for ids in result["id_lists"]] == [titles[:2] for titles in shown]
        assert result["selections"] == ["[1], [2]"] * 20
        assert result["responses"] == ["from " + " ".join(titles[:2]) for titles in shown]
    again = sampling_dpo_trajectories.sample_trajectories(rows[1:], (call, call), args)
    assert again == results[1:], "the orders of a question do not depend on the others"


def test_an_order_that_does_not_fit_the_window_falls_back_to_the_retrievers():
    call = caller(first_shown)
    call.engine.fits = lambda messages, max_tokens: StubEngine.titles(messages) in (["d1", "d2", "d3"], [])
    args = sampling_dpo_trajectories.parse_args(["--permute"])
    [row] = sampling_dpo_trajectories.sample_trajectories([question(1, 3)], (call, call), args)
    assert row["docs_shown"] == 3 and row["id_lists"] == [[1, 2]] * 8


# ---------------------------------------------------------------- the stage


def test_sampling_writes_what_the_reward_stage_reads(here):
    sampling_dpo_trajectories.main(["--input-jsonl", "q.jsonl", "--output-json", "s.json", "--template", "t.jinja"])
    rows = read("s.json")
    assert [row["id"] for row in rows] == ["q1", "q2", "q3"]
    assert [len(row["id_lists"]) for row in rows] == [8, 0, 8]
    for row in rows:
        assert {"docs_shown", "id_lists", "responses", "answers", "docs", "usage"} <= row.keys()
    manifest = read_manifest("s.json")
    assert manifest["counts"] == {"rows": 3, "trajectories": 24, "malformed": 8}
    assert manifest["summary"]["distinct_selections"] == pytest.approx(2 / 3)


def test_an_interrupted_run_continues_to_the_same_bytes(here, monkeypatch):
    flags = ["--input-jsonl", "q.jsonl", "--output-json", "s.json", "--template", "t.jinja", "--chunk-size", "1"]
    sampling_dpo_trajectories.main(flags)
    whole, real, chunks = Path("s.json").read_bytes(), sampling_dpo_trajectories.sample_trajectories, []

    def dies_on_the_third(*args, **named):
        chunks.append(None)
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return real(*args, **named)

    monkeypatch.setattr(sampling_dpo_trajectories, "sample_trajectories", dies_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        sampling_dpo_trajectories.main([*flags, "--overwrite"])
    sampling_dpo_trajectories.main(flags)
    assert len(chunks) == 4 and Path("s.json").read_bytes() == whole


def test_another_model_may_choose(here):
    flags = ["--input-jsonl", "q.jsonl", "--output-json", "s.json", "--template", "t.jinja"]
    sampling_dpo_trajectories.main([*flags, "--llm-model", "G", "--reranker-model", "C"])
    kinds = {engine.model: {StubEngine.kind(request) for batch in engine.batches for request in batch} for engine in here}
    assert kinds == {"G": {"answer"}, "C": {"select"}}


@pytest.mark.slow
def test_real_trajectories_depend_on_the_seed_and_on_nothing_else(tmp_path, monkeypatch, warm):
    """Two models in one process, constrained and not: chunks, order and other questions change no trajectory of a question.

    The engine computes in float32. benchmarks/sampling.py measures the share that stays the same in bfloat16, whose rounding depends on
    the batch. The test needs a new process, since vLLM inspects all imported modules and fails at one of them.
    """
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(warm.python))
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(compare_real_trajectories, tmp_path).result()


def compare_real_trajectories(folder: Path) -> None:
    rng = random.Random(4)
    rows = [
        {"id": f"q{n}", "question": make_text(rng, 3, 8), "answers": ["oil"], "true_id": [1],
         "docs": [{"id": f"d{i}", "title": "", "text": make_text(rng), "rerank_score": 1 - i / 10} for i in range(5)]}
        for n in range(6)
    ]
    make_tiny_llama(folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    args = sampling_dpo_trajectories.parse_args([
        "--llm-model", str(folder / "model"), "--reranker-model", str(folder / "other"), "--dtype", "float32", "--include-expert",
        "--template", str(REPO / "template/llama3.jinja"), "--max-model-len", "1024", "--answer-max-tokens", "6", "--num-samples", "4",
    ])
    calls = options_from(args, CallOptions)
    loaded = sampling_dpo_trajectories.load_builders(options_from(args, EngineOptions), calls)
    for permute, constrain in ((False, "on"), (True, "on"), (False, "off")):
        args.permute = permute
        callers = tuple(RequestBuilder(of_model.engine, replace(calls, constrain_ids=constrain)) for of_model in loaded)

        def sample(some, callers=callers):
            return {row["id"]: row for row in sampling_dpo_trajectories.sample_trajectories(some, callers, args)}

        together = sample(rows)
        alone = {row_id: row for one in reversed(rows) for row_id, row in sample([one]).items()}
        for row_id, row in together.items():
            assert row["id_lists"] == alone[row_id]["id_lists"] and row["responses"] == alone[row_id]["responses"]
            assert constrain == "off" or not row["invalid_selections"], "what the grammar admits can be read"
        if constrain == "on":
            assert len({json.dumps(row["id_lists"]) for row in together.values()}) > 1
