"""Selections and answers with a stub in place of the LLM: inference.py, top_inference.py, sampling_dpo_trajectories.py."""

import json
import random
import re
import time
from pathlib import Path

import pytest
from conftest import at, naming
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import StubEngine, documents, question

import inference
import sampling_dpo_trajectories
import top_inference
from dynamicrag.evaluation.answers import unanswered_reason
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.choosing import reduce_to_window
from dynamicrag.llm.completion import Completion, Usage
from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import RequestBuilder, documents_that_fit, work_on_fitting
from dynamicrag.rows.identifiers import Selection, format_ids, summarise_selections
from dynamicrag.rows.row import fail_unanswered
from dynamicrag.rows.tasks import derive_dataset, name_of_file
from dynamicrag.stage import UserError, options_from


def caller(reply=None, module=inference, window: int = 10**6, *flags: str) -> RequestBuilder:
    return RequestBuilder(StubEngine(reply, window), options_from(module.parse_args(list(flags)), CallOptions))


def answered(rows, selector="dynamic", reply=None, topn=20, window=10**6, *flags):
    call = caller(reply, inference, window, *flags)
    return inference.answer_rows(rows, (call, call), selector, topn, "q.jsonl"), call.engine


def choosing(text: str):
    return lambda request, kind, titles: text if kind == "select" else f"from {' '.join(titles)}"


# ---------------------------------------------------------------- one question, two calls


def test_the_answer_is_given_from_the_chosen_documents_in_the_chosen_order():
    rows, engine = answered([question()], reply=choosing("[4], [2]"))
    row = rows[0]
    assert (row["id_list"], row["final_docs"], row["response"]) == ([4, 2], ["d4", "d2"], "from d4 d2")
    assert row["docs_shown"] == 5
    assert len(row["docs"]) == 5
    assert row["usage"] == {"calls": 2, "prompt_tokens": 105 + 102, "generated_tokens": 2}
    assert [len(batch) for batch in engine.batches] == [1, 1]


def test_all_questions_are_asked_in_two_batches():
    rows, engine = answered([question(n) for n in range(7)], reply=choosing("[1]"))
    assert [len(batch) for batch in engine.batches] == [7, 7]
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(7)]


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        ("None", []), ("none", []), ("[2], [2], [1]", [2, 1]), ("[0], [3], [41]", [3]), ("I need [5] and [1].", None), ("[5, 1]", [5, 1]),
        ("[6], [7]", None), ("prose", None), ("", None), ("[None]", []), ("[9], None", None),
    ],
)
def test_what_the_model_writes_becomes_a_selection_or_an_error(written, ids):
    rows, _ = answered([question(1), question(2)], reply=lambda request, kind, titles: (
        "an answer" if kind == "answer" else "[1]" if "is 2?" in request.messages[1]["content"] else written
    ))
    row = rows[0]
    if ids is None:
        assert "response" not in row
        assert "id_list" not in row
        assert repr(written) in row["error"]
        assert row["usage"]["calls"] == 1
    else:
        assert row["id_list"] == ids
        assert isinstance(row["response"], str)
        assert "error" not in row
    assert rows[1]["id_list"] == [1]
    assert rows[1]["response"] == "an answer"


def test_only_the_first_topn_documents_are_shown():
    rows, engine = answered([question(docs=30)], reply=choosing("[20], [21]"), topn=20)
    assert rows[0]["id_list"] == [20]
    assert StubEngine.titles(engine.batches[0][0].messages) == [f"d{n}" for n in range(1, 21)]


def test_documents_that_do_not_fit_are_not_shown_and_cannot_be_chosen():
    rows, _ = answered([question(docs=9)], reply=choosing("[3], [4]"), window=3)
    assert rows[0]["docs_shown"] == 3
    assert rows[0]["id_list"] == [3]


def test_no_documents_is_a_question_answered_without_any():
    rows, engine = answered([question(docs=0), question(2)], reply=choosing("[1]"))
    assert [row["id_list"] for row in rows] == [[], [1]] and all("response" in row for row in rows)
    assert [len(batch) for batch in engine.batches] == [1, 2], "nothing is chosen where there is nothing to choose from"
    assert rows[0]["usage"]["calls"] == 1


@pytest.mark.parametrize(("constrain", "constrained"), [("on", True), ("off", False)])
def test_identifiers_are_constrained_to_the_documents_shown(constrain, constrained):
    _, engine = answered([question(docs=9)], "dynamic", choosing("[1]"), 20, 3, "--constrain-ids", constrain)
    pattern = engine.batches[0][0].pattern
    assert (pattern is not None) == constrained
    if constrained:
        assert re.fullmatch(pattern, "[3], [1]")
        assert not re.fullmatch(pattern, "[4]")
    assert engine.batches[1][0].pattern is None


def test_a_row_of_an_earlier_run_carries_nothing_of_it_over():
    """The remain file and a result file are usable inputs. Keys of the last run are removed from their rows."""
    old = {"error": "old", "response": "old", "id_list": [5], "final_docs": ["d5"]}
    rows, _ = answered([question(1, **old), question(2, **old)], reply=lambda request, kind, titles: (
        "new" if kind == "answer" else "[1]" if "is 1?" in request.messages[1]["content"] else "prose"
    ))
    assert "error" not in rows[0]
    assert rows[0]["response"] == "new"
    assert "old" not in rows[1]["error"]
    assert not {"response", "id_list", "final_docs"} & rows[1].keys()


def test_seeds_depend_on_the_row_and_not_on_its_neighbours():
    rows = [question(n) for n in range(6)]
    shuffled = random.Random(1).sample(rows, 6)
    seeds = []
    for some in (rows, shuffled, rows[2:3]):
        _, engine = answered(some, reply=choosing("[1]"))
        seeds.append({
            (kind, row["id"]): request.seed
            for kind, batch in zip(("select", "answer"), engine.batches, strict=True)
            for row, request in zip(some, batch, strict=True)
        })
    assert seeds[0] == seeds[1]
    assert seeds[2].items() <= seeds[0].items()
    assert len(set(seeds[0].values())) == 12


# ---------------------------------------------------------------- selectors


RANKED = [
    {"id": f"d{n}", "title": f"d{n}", "text": "t", "score": score, "rerank_score": rerank, "rerank_label": "true" if rerank > 0.5 else "false"}
    for n, (score, rerank) in enumerate([(9.0, 0.1), (8.0, 0.9), (7.0, 0.85), (6.0, 0.6), (5.0, 0.05)], start=1)
]
PLAIN = [{key: value for key, value in doc.items() if not key.startswith("rerank")} for doc in RANKED]


@pytest.mark.parametrize(
    ("selector", "docs", "ids"),
    [
        ("none", RANKED, []), ("all", RANKED, [1, 2, 3, 4, 5]), ("top:2", RANKED, [1, 2]), ("top:9", RANKED, [1, 2, 3, 4, 5]),
        ("monot5", RANKED, [2, 3, 4]), ("monot5", [], []), ("monot5", RANKED[:1], []),
        ("adaptive", RANKED, [2, 3, 4]), ("adaptive", RANKED[:1], [1]), ("adaptive", [], []), ("all", [], []), ("top:3", [], []),
        ("adaptive", PLAIN, [1]), ("adaptive", [{**doc, "score": s} for doc, s in zip(PLAIN, [9, 8, 1, 1, 0], strict=True)], [1, 2]),
        ("pointwise", RANKED, [2, 5]),
    ],
)
def test_each_selector_chooses_by_its_own_rule(selector, docs, ids):
    def reply(request, kind, titles):
        content = request.messages[1]["content"]
        return ("Yes" if "\nd2\n" in content or "\nd5\n" in content else "No") if kind == "judge" else "an answer"

    rows, engine = answered([question(docs=docs)], selector, reply)
    assert rows[0]["id_list"] == ids
    assert rows[0]["final_docs"] == [docs[position - 1]["id"] for position in ids]
    assert rows[0]["response"] == "an answer"
    assert rows[0]["usage"]["calls"] == (len(docs) + 1 if selector == "pointwise" else 1)
    if selector == "pointwise":
        assert {request.pattern for request in engine.batches[0]} == {"(Yes|No)"}
        assert len({request.seed for request in engine.batches[0]}) == len(docs)


@pytest.mark.parametrize(
    ("selector", "docs"),
    [
        ("monot5", PLAIN), ("adaptive", [{"id": "x", "title": "", "text": "t"}]), ("monot5", [{"id": "x", "title": "", "text": "t"}]),
    ],
)
def test_a_rule_without_its_scores_is_an_error_that_names_the_document(selector, docs):
    with pytest.raises(UserError, match=at(f"--selector {selector}", docs[0]["id"], "reranker.py")):
        answered([question(docs=docs)], selector)


def test_scores_without_labels_are_labels_above_a_half():
    scores = (0.9, 0.5, 0.51)
    rows, _ = answered([question(docs=[{**doc, "rerank_score": score} for doc, score in zip(documents(3), scores, strict=True)])], "monot5")
    assert rows[0]["final_docs"] == ["d1", "d3"]


def test_gold_documents_are_those_needed_that_are_shown():
    rows, engine = answered([question(1, gold_docs=["d4", "d2", "d9"]), question(2, gold_docs=[]), question(3, positive_ctxs=[{"id": "d3"}])], "gold", topn=4)
    assert [row["final_docs"] for row in rows] == [["d2", "d4"], [], ["d3"]]
    assert [row["usage"]["calls"] for row in rows] == [1, 1, 1] and len(engine.batches) == 1
    with pytest.raises(UserError, match=at("q.jsonl: row q4", "gold_docs", "positive_ctxs")):
        answered([question(4)], "gold")


# ---------------------------------------------------------------- the window


@given(fitting=st.integers(0, 60), count=st.integers(0, 60))
def test_documents_go_from_the_end_and_as_few_as_possible(fitting, count):
    engine = StubEngine(window=fitting)
    docs = documents(count)

    def build(some):
        return [{"role": "user", "content": "\n".join(f"[{n}] {doc['title']}" for n, doc in enumerate(some, start=1))}]

    kept = documents_that_fit(engine, build, docs, 10)
    assert kept == docs[: max((n for n in range(count + 1) if engine.fits(build(docs[:n]), 10)), default=0)]


def test_a_question_longer_than_the_window_is_an_error_that_quotes_it():
    engine = StubEngine(window=-1)
    with pytest.raises(UserError, match=naming("--max-model-len", "'what is this'")):
        documents_that_fit(engine, lambda docs: [{"role": "user", "content": "what is this"}], documents(3), 10)


# ---------------------------------------------------------------- the stage


def run(module, *flags: str) -> None:
    files = ["--input-json", "q.jsonl", "--output-json", "out/{selector}.json", "--remain-output-json", "out/{selector}_remain.json"]
    module.main([*files, "--template", "t.jinja", *flags])


def read(path: str) -> list[dict]:
    return [row for _, row in read_json(path)]


@pytest.mark.parametrize(
    ("module", "flags", "out"),
    [(inference, [], "dynamic"), (top_inference, ["--max-context-window", "2", "--topn", "4"], "{selector}")],
)
def test_rows_without_an_answer_go_to_the_remain_file_and_all_others_to_the_output(here, module, flags, out):
    run(module, *flags)
    rows, remain = read(f"out/{out}.json"), read(f"out/{out}_remain.json")
    assert [row["id"] for row in rows] == ["q1", "q3"]
    assert [row["id"] for row in remain] == ["q2"]
    assert all(isinstance(row["response"], str) and "error" not in row for row in rows)
    assert unanswered_reason(remain[0]) == "no_selection"
    manifest = json.loads(Path(f"out/{out}.json.manifest.json").read_text())
    assert manifest["counts"] == {"rows": 3, "answered": 2, "unanswered": 1}
    assert not list(Path("out").glob("*.partial*"))


def test_several_selectors_load_one_model_and_write_a_file_each(here):
    run(inference, "--selector", "dynamic", "top:2", "pointwise")
    assert len(here) == 1
    for name, ids in {"dynamic": [1], "top2": [1, 2], "pointwise": [1, 2, 3, 4, 5]}.items():
        assert [row["id_list"] for row in read(f"out/{name}.json") if row["id"] != "q2"] == [ids, ids]
    run(inference, "--selector", "dynamic", "top:2", "pointwise")
    assert len(here) == 1, "a finished run loads nothing"


def test_several_files_load_one_model_and_each_is_as_if_it_were_answered_alone(here):
    Path("more.jsonl").write_text("".join(json.dumps(question(n)) + "\n" for n in (2, 5)))
    several = ["--input-json", "q.jsonl", "more.jsonl", "--output-json", "several/{input}_{selector}.json"]
    inference.main([*several, "--template", "t.jinja", "--selector", "dynamic", "none"])
    assert len(here) == 1
    for name in ("q", "more"):
        inference.main(["--input-json", f"{name}.jsonl", "--output-json", f"alone/{name}_dynamic.json", "--template", "t.jinja"])
        for suffix in ("", "_remain"):
            assert Path(f"several/{name}_dynamic{suffix}.json").read_bytes() == Path(f"alone/{name}_dynamic{suffix}.json").read_bytes()
    assert [row["id_list"] for row in read("several/more_none.json")] == [[], []]
    loaded = len(here)
    inference.main([*several, "--template", "t.jinja", "--selector", "dynamic", "none"])
    assert len(here) == loaded, "a finished run loads nothing"


def test_the_seconds_of_a_run_are_its_own(here, monkeypatch):
    real = inference.answer_rows

    def slow(rows, callers, selector, *given):
        time.sleep(0.3 if selector == "all" else 0)
        return real(rows, callers, selector, *given)

    monkeypatch.setattr(inference, "answer_rows", slow)
    run(inference, "--selector", "all", "none")
    seconds = [json.loads(Path(f"out/{selector}.json.manifest.json").read_text())["seconds"] for selector in ("all", "none")]
    assert seconds[0] >= 0.3 > 0.2 >= seconds[1]


def test_a_broken_file_among_several_is_found_before_a_model_is_loaded(here):
    Path("broken.jsonl").write_text(json.dumps({**question(1), "docs": "none"}))
    with pytest.raises(UserError, match=at("broken.jsonl:1: key 'docs'")):
        run(inference, "--input-json", "q.jsonl", "broken.jsonl", "--output-json", "out/{input}.json", "--remain-output-json", "out/{input}_r.json")
    assert here == [] and not list(Path("out").glob("*.json"))


def test_several_numbers_of_documents_load_one_model_and_write_a_file_each(here):
    run(top_inference, "--topn", "2", "5", "--max-context-window", "2", "--output-json", "out/{input}_{topn}.json", "--remain-output-json", "out/r{topn}")
    assert len(here) == 1
    assert [row["usage"]["calls"] for row in read("out/q_2.json")] == [2, 2], "one window, and the answer"
    assert [row["usage"]["calls"] for row in read("out/q_5.json")] == [3 + 2 + 1 + 1] * 2, "three windows, two, the last, and the answer"


@pytest.mark.parametrize(("selector", "models"), [("dynamic", ["G", "C"]), ("all", ["G"])])
def test_a_reranker_model_chooses_where_given_and_is_loaded_only_where_it_is_asked(here, selector, models):
    run(inference, "--selector", selector, "--llm-model", "G", "--reranker-model", "C")
    assert [engine.model for engine in here] == models
    assert sum(engine.memory for engine in here) == 0.9, "two models share the GPU"
    kinds = [{StubEngine.kind(request) for batch in engine.batches for request in batch} for engine in here]
    assert kinds == ([{"answer"}, {"select"}] if selector == "dynamic" else [{"answer"}])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--selector", "all", "none", "--output-json", "one.json"], at("one.json", 2, "{input}", "{selector}", "--output-json")),
        (["--selector", "all", "none", "--remain-output-json", "one.json"], at("one.json", "{input}", "--remain-output-json")),
        (["--input-json", "q.jsonl", "more.jsonl"], at("out/dynamic.json", 2)),
        (["--prompts", "missing.yaml"], at("missing.yaml")), (["--template", "missing.jinja"], at("missing.jinja")),
        (["--input-json", "missing.jsonl"], at("missing.jsonl")),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(here, flags, says):
    with pytest.raises(UserError, match=says):
        run(inference, *flags)
    assert here == []


@pytest.mark.parametrize("selector", ["monot5", "adaptive", "gold"])
def test_a_selector_that_cannot_run_is_found_before_any_other_has_asked(here, selector):
    good = [question(n, docs=RANKED, gold_docs=["d1"]) for n in (1, 2)]
    lacking = question(2, docs=[{"id": "x", "title": "", "text": "t"}])
    for name, rows in {"good.jsonl": good, "plain.jsonl": [good[0], lacking]}.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--output-json", "out/{input}_{selector}.json", "--remain-output-json", "out/{input}_{selector}_remain.json", "--selector", "none", selector]
    with pytest.raises(UserError) as error:
        run(inference, "--input-json", "good.jsonl", "plain.jsonl", *flags)
    assert str(error.value).startswith("plain.jsonl: row q2: ") and f"--selector {selector}" in str(error.value)
    assert here == [] and not list(Path("out").glob("*.json"))
    run(inference, "--input-json", "good.jsonl", *flags)


def test_the_name_advised_for_a_file_called_as_another_keeps_its_data_set(here):
    for name in ("nq", "triviaqa"):
        Path(name).mkdir()
        Path(name, "test.jsonl").write_bytes(Path("q.jsonl").read_bytes())
    with pytest.raises(UserError) as error:
        run(inference, "--input-json", "nq/test.jsonl", "triviaqa/test.jsonl", "--output-json", "out/{input}_{selector}.json")
    [advised] = re.findall(r"\S+_test\.jsonl", str(error.value))
    assert derive_dataset("test_0", name_of_file(advised)) == "triviaqa" and here == []


def test_a_chunk_at_a_time_writes_the_same_bytes(here):
    run(inference)
    whole = Path("out/dynamic.json").read_bytes(), Path("out/dynamic_remain.json").read_bytes()
    run(inference, "--chunk-size", "1", "--overwrite")
    assert (Path("out/dynamic.json").read_bytes(), Path("out/dynamic_remain.json").read_bytes()) == whole


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_an_interrupted_run_continues_to_the_same_bytes(here, monkeypatch, suffix):
    flags = ["--chunk-size", "1", "--output-json", f"a.{suffix}", "--remain-output-json", f"b.{suffix}"]
    run(inference, *flags)
    whole = Path(f"a.{suffix}").read_bytes(), Path(f"b.{suffix}").read_bytes()
    real, chunks = inference.answer_rows, []

    def dies_on_the_third(*args, **named):
        chunks.append(None)
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return real(*args, **named)

    monkeypatch.setattr(inference, "answer_rows", dies_on_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(inference, *flags, "--overwrite")
    with Path(f"a.{suffix}.partial").open("ab") as file:
        file.write(b'{"torn')
    run(inference, *flags)
    assert len(chunks) == 4
    assert (Path(f"a.{suffix}").read_bytes(), Path(f"b.{suffix}").read_bytes()) == whole


# ---------------------------------------------------------------- windows


def picks(*positions: int):
    """A selector of the same positions in every window, if the window has them."""
    return lambda windows: [Selection([p for p in positions if p <= len(docs)], True) for _, docs in windows]


def always_last(windows):
    return [Selection([len(docs)], True) for _, docs in windows]


def test_positions_within_a_window_become_documents_before_windows_are_merged():
    kept = reduce_to_window([documents(500)], 40, always_last)
    assert [doc["id"] for doc in kept[0]] == [f"d{n}" for n in (*range(40, 481, 40), 500)]


def test_top_500_with_a_model_that_takes_the_last_of_each_window():
    def reply(request, kind, titles):
        if kind == "answer":
            return "a"
        return format_ids(range(1, len(titles) + 1)) if titles[0] == "d40" else format_ids([len(titles)])

    call = caller(reply, top_inference)
    [row] = by_windows([question(docs=500)], call)
    expected = [*range(40, 481, 40), 500]
    assert row["id_list"] == expected
    assert row["final_docs"] == row["candidates"] == [f"d{n}" for n in expected]
    assert [len(batch) for batch in call.engine.batches] == [13, 1, 1]
    assert row["usage"]["calls"] == 15


def by_windows(rows: list[dict], call: RequestBuilder, *flags: str) -> list[dict]:
    args = top_inference.parse_args(list(flags))
    return top_inference.answer_rows(rows, (call, call), args.topn[0], args.max_context_window, args.order)


def test_the_final_window_is_ordered_by_the_model_and_earlier_ones_by_retrieval():
    def reply(request, kind, titles):
        if kind == "answer":
            return "from " + " ".join(titles)
        return "[2], [1]" if len(titles) > 1 else "[1]"

    call = caller(reply, top_inference)
    [row] = by_windows([question(docs=6)], call, "--max-context-window", "3", "--topn", "6")
    # {d1 d2 d3} and {d4 d5 d6} keep d1 d2 d4 d5; then {d1 d2 d4} {d5} keep d1 d2 d5; of these [2], [1]
    assert row["candidates"] == ["d1", "d2", "d5"]
    assert row["final_docs"] == ["d2", "d1"]
    assert row["id_list"] == [2, 1]
    assert row["response"] == "from d2 d1"
    assert row["usage"]["calls"] == 2 + 2 + 1 + 1


@pytest.mark.parametrize(("order", "chosen"), [("final", ["d5", "d1", "d3"]), ("retrieval", ["d1", "d3", "d5"])])
def test_the_documents_are_read_in_the_order_of_the_last_window_or_of_retrieval(order, chosen):
    call = caller(lambda request, kind, titles: "from " + " ".join(titles) if kind == "answer" else "[3], [1], [2]", top_inference)
    flags = ["--order", order, "--max-context-window", "3", "--topn", "5"]
    [row] = by_windows([question(docs=[doc for doc in documents(5) if doc["id"] in ("d1", "d3", "d5")])], call, *flags)
    assert (row["final_docs"], row["response"]) == (chosen, "from " + " ".join(chosen))
    assert row["id_list"] == [{"d1": 1, "d3": 2, "d5": 3}[doc_id] for doc_id in chosen]


WRITTEN = st.one_of(
    st.text(max_size=30), st.just("None"), st.lists(st.integers(-3, 1100), max_size=60).map(lambda ids: ", ".join(f"[{n}]" for n in ids)),
)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 1000), window=st.integers(1, 1100), written=st.lists(WRITTEN, min_size=1, max_size=8), seed=st.integers(0, 99),
       order=st.sampled_from(["final", "retrieval"]))
def test_whatever_the_model_writes_the_answer_is_from_documents_of_the_question(count, window, written, seed, order):
    """Documents have repeated ids, and a selection may be any text. No foreign document is selected, none twice, and the loop ends."""
    rng = random.Random(seed)
    docs = [{**doc, "id": f"d{rng.randrange(count)}"} for doc in documents(count)]
    read_from = []

    def reply(request, kind, titles):
        if kind == "answer":
            read_from.append(titles)
            return "an answer"
        return rng.choice(written)

    call = caller(reply, top_inference)
    flags = ["--max-context-window", str(window), "--topn", str(count), "--order", order]
    [row] = by_windows([question(docs=docs)], call, *flags)
    unique = {doc["id"]: doc for doc in reversed(docs)}
    if len(unique) > window:
        assert len(call.engine.batches[0]) == -(-len(unique) // window)
    assert len(row["candidates"]) <= window and len(set(row["candidates"])) == len(row["candidates"])
    if "response" in row:
        assert set(row["final_docs"]) <= set(row["candidates"]) <= unique.keys()
        assert len(set(row["final_docs"])) == len(row["final_docs"])
        assert [docs[position - 1]["id"] for position in row["id_list"]] == row["final_docs"]
        assert read_from == [[unique[doc_id]["title"] for doc_id in row["final_docs"]]]
        if order == "retrieval":
            assert row["id_list"] == sorted(row["id_list"])
    else:
        assert unanswered_reason(row) == "no_selection"


def test_a_window_of_which_nothing_is_chosen_leaves_an_answer_without_documents():
    call = caller(choosing("None"), top_inference)
    [row] = by_windows([question(docs=90)], call)
    assert (row["id_list"], row["final_docs"], row["candidates"]) == ([], [], [])
    assert isinstance(row["response"], str)


def test_a_window_that_cannot_be_read_keeps_its_documents_and_a_last_one_is_an_error():
    def reply(request, kind, titles):
        return "a" if kind == "answer" else "prose" if titles[0] == "d1" else "[1]"

    call = caller(reply, top_inference)
    rows = by_windows([question(docs=6), question(2, 0)], call, "--max-context-window", "4")
    # {d1..d4} unreadable, kept; {d5 d6} keeps d5; five are cut again: {d1..d4} kept, {d5} kept: no shrinking, cut to four
    assert rows[0]["candidates"] == ["d1", "d2", "d3", "d4"]
    assert "error" in rows[0]
    assert "response" not in rows[0]
    assert rows[1]["response"] == "a"


def test_documents_are_identified_by_id_not_by_position_or_text():
    docs = [{**doc, "text": "same", "title": f"d{n}", "id": f"d{n % 5}"} for n, doc in enumerate(documents(12))]
    kept = reduce_to_window([docs], 3, picks(1, 2, 3))
    assert [doc["id"] for doc in kept[0]] == ["d0", "d1", "d2"]
    call = caller(choosing("[2], [1]"), top_inference)
    [row] = by_windows([question(docs=docs)], call, "--max-context-window", "5")
    assert row["final_docs"] == ["d1", "d0"]
    assert row["id_list"] == [2, 1]


def test_top_inference_shows_no_more_than_topn():
    call = caller(choosing("[1]"), top_inference)
    [row] = by_windows([question(docs=90)], call, "--topn", "50")
    assert row["candidates"] == ["d1", "d41"]


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 1000), min_size=1, max_size=3), window=st.integers(1, 120), seed=st.integers(0, 10**6),
    greed=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]), repeats=st.booleans(),
)
def test_reduction_always_ends_within_the_window_and_invents_nothing(counts, window, seed, greed, repeats):
    rng = random.Random(seed)
    questions = [
        [{"id": f"{q}/{rng.randrange(count) if repeats else n}"} for n in range(count)] for q, count in enumerate(counts)
    ]
    rounds = []

    def choose(windows):
        rounds.append(windows)
        assert len(rounds) <= max(counts) + 1, "it goes on for ever"
        assert all(1 <= len(docs) <= window for _, docs in windows)
        selections = []
        for _, docs in windows:
            ids = [position for position in range(1, len(docs) + 1) if rng.random() < greed]
            rng.shuffle(ids)
            selections.append(Selection(ids, rng.random() > 0.1))
        return selections

    kept = reduce_to_window(questions, window, choose)
    for number, (docs, rest) in enumerate(zip(questions, kept, strict=True)):
        order = list(dict.fromkeys(doc["id"] for doc in docs))
        ids = [doc["id"] for doc in rest]
        assert len(ids) <= window
        assert len(set(ids)) == len(ids)
        assert ids == [identifier for identifier in order if identifier in set(ids)]
        if len(order) <= window:
            assert ids == order
        first = [shown for asked, shown in rounds[0] if asked == number] if rounds else []
        assert len(first) <= -(-len(docs) // window)


def test_one_question_that_needs_more_rounds_does_not_ask_the_finished_ones_again():
    rounds = []

    def choose(windows):
        rounds.append({number for number, _ in windows})
        return picks(1, 2)(windows)

    reduce_to_window([documents(3), documents(9), documents(90)], 4, choose)
    assert rounds[0] == {1, 2}
    assert all(some == {2} for some in rounds[2:])


def test_a_window_of_no_documents_is_refused(here):
    with pytest.raises(UserError, match=at("--max-context-window", 1)):
        run(top_inference, "--max-context-window", "0")


def test_usage_adds_up():
    usage = Usage()
    usage.add(Completion(["a"], 10, 2))
    usage.add(Completion(["a", "b"], 5, 4))
    assert usage == Usage(2, 15, 6)


# ---------------------------------------------------------------- questions longer than the window


def test_an_overlong_question_costs_itself_and_not_the_run():
    call = caller(choosing("[1]"), inference)
    fits = call.engine.fits
    call.engine.fits = lambda messages, max_tokens: "endless" not in messages[-1]["content"] and fits(messages, max_tokens)
    rows = [question(1), {**question(2), "question": "endless", "response": "of an earlier run"}, question(3)]
    results = work_on_fitting(
        rows, (call, call), lambda some: inference.answer_rows(some, (call, call), "dynamic", 20, "q.jsonl"), fail_unanswered
    )
    assert [row["id"] for row in results] == ["q1", "q2", "q3"]
    assert results[0]["response"] and results[2]["response"] and "response" not in results[1]
    assert unanswered_reason(results[1]) == "question_too_long"

    call = caller(lambda request, kind, titles: ["[1]"] * request.n if kind == "select" else "an answer", sampling_dpo_trajectories)
    call.engine.fits = lambda messages, max_tokens: "endless" not in messages[-1]["content"]
    sampled = work_on_fitting(
        rows, (call, call), lambda some: sampling_dpo_trajectories.sample_trajectories(some, (call, call), sampling_dpo_trajectories.parse_args([])),
        sampling_dpo_trajectories.no_trajectory,
    )
    assert [len(row["id_lists"]) for row in sampled] == [8, 0, 8]
    assert summarise_selections(sampled)["trajectories"] == 16
