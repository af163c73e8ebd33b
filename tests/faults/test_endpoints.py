"""Servers that misbehave, addresses that hold a password, and keys: the error has one line, and the key is nowhere."""

import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import at, logged, names, naming, write_jsonl
from running import make_good, run
from stages import LLM_STAGES, REPO, flags_of, row
from stubs import StubServer, chat_completion

from dynamicrag.evaluation.answers import unanswered_reason
from dynamicrag.files.jsonio import read_json
from dynamicrag.llm.endpoint import check_url, read_key
from dynamicrag.llm.engine import ApiEngine, Request
from dynamicrag.stage import UserError

SECRET = "sk-canary-0123456789"
GOOD = chat_completion("a")
REPLIES: dict[str, tuple[int, bytes, str | None]] = {  # status, body, and the part of it that the error names
    "not JSON": (200, b"<html>", None),
    "empty": (200, b"", None),
    "null": (200, b"null", None),
    "a list": (200, b"[]", None),
    "a number": (200, b"7", None),
    "no choices": (200, b'{"id": "x"}', None),
    "choices that are null": (200, json.dumps({**GOOD, "choices": None}).encode(), None),
    "choices that are texts": (200, json.dumps({**GOOD, "choices": ["a"]}).encode(), None),
    "a choice without a message": (200, json.dumps({**GOOD, "choices": [{"index": 0}]}).encode(), None),
    "content that is a list": (200, json.dumps({**GOOD, "choices": [{"index": 0, "message": {"content": ["a"]}}]}).encode(), None),
    "an error with status 200": (200, json.dumps({"error": {"message": "overloaded"}}).encode(), "overloaded"),
    "100,000 brackets": (200, b"[" * 100_000, None),
    "invalid UTF-8": (200, b'{"id": "\xff"}', None),
    "an error that repeats the key": (401, json.dumps({"error": {"message": f"bad key {SECRET}"}}).encode(), "[key]"),
    "an error in HTML": (500, b"<html>\n<body>\x1b[2Jbroken</body></html>", "HTTP 500"),
}


@pytest.fixture(scope="module")
def listening():
    """The address of a server that gives each request the status and the bytes of `reply`, and that list."""
    reply = [200, b""]
    server = StubServer(lambda request, body: tuple(reply))
    yield server.url, reply
    server.close()


@pytest.fixture
def server(listening, monkeypatch):
    monkeypatch.setattr("dynamicrag.llm.endpoint.ATTEMPTS", 1)
    monkeypatch.setattr("dynamicrag.llm.server_calls.RETRY_SECONDS", 0)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    return listening


@pytest.mark.parametrize("case", REPLIES)
def test_a_server_that_answers_with_something_else(server, case):
    url, reply = server
    reply[:2] = REPLIES[case][:2]
    with pytest.raises(UserError, match=naming(url, *filter(None, REPLIES[case][2:]))) as error:
        ApiEngine(url, "m").complete([Request([{"role": "user", "content": "q"}], seed=1, max_tokens=5)])
    assert SECRET not in str(error.value)


def test_half_a_surrogate_pair_is_no_reason_to_end_a_run(server):
    url, reply = server
    reply[:] = 200, json.dumps({**GOOD, "choices": [{"index": 0, "message": {"role": "assistant", "content": "a\ud800b"}}]}).encode()
    [completion] = ApiEngine(url, "m").complete([Request([{"role": "user", "content": "q"}], seed=1, max_tokens=5)])
    assert completion.texts == ["a?b"]


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": None, "completion_tokens": None}, {"prompt_tokens": "many", "completion_tokens": True}, {"prompt_tokens": -1}])
def test_a_reply_without_its_cost_is_an_answer_that_cost_nothing_known(server, usage):
    url, reply = server
    reply[:] = 200, json.dumps({**GOOD, **({"usage": usage} if usage is not None else {})}).encode()
    [completion] = ApiEngine(url, "m").complete([Request([{"role": "user", "content": "q"}], seed=1, max_tokens=5)])
    assert (completion.texts, completion.prompt_tokens, completion.generated_tokens) == (["a"], None, None)


@pytest.mark.parametrize("url", [
    "http://user:password@host/v1", "http://host/v1?api-version=2024&api_key=secret", "http://host/v1?api-key=secret", "http://host/v1?api_key=secret", "http://host/v1#secret", "ftp://host/v1", "host/v1", "", "http://", "http://ho st/v1", "http://host:port/v1",
])
def test_an_address_that_may_hold_a_key_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=at("--api-base", "OPENAI_API_KEY")) as error:
        ApiEngine(url, "m")
    assert not url or url not in str(error.value)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1/", "https://x.openai.azure.com/openai/deployments/d?api-version=2024-10-21", "https://api.openai.com/v1", "http://[::1]:8000/v1", "http://10.0.0.1"])
def test_an_address_is_taken_as_it_is(url):
    assert check_url("--api-base", url, "KEY") == url.rstrip("/")


@pytest.mark.parametrize("key", ["sk-line\nend", "sk-\u2026", "sk with space", "sk-\x00"])
def test_a_key_no_header_can_hold_is_refused_and_not_repeated(monkeypatch, key):
    with monkeypatch.context() as patch:
        if "\0" in key:
            patch.setattr("os.environ", {"OPENAI_API_KEY": key})
        else:
            patch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=at("OPENAI_API_KEY")) as error:
            read_key("OPENAI_API_KEY")
    assert key not in str(error.value)


def test_the_key_is_in_no_file_and_no_message(server, tmp_path, monkeypatch, encoder_dir, caplog):
    """The engine is the real ApiEngine. test_judge.py tests the judge's key."""
    url, reply = server
    (tmp_path / "good").mkdir()
    good, out = make_good(tmp_path / "good", encoder_dir), tmp_path / "out"
    rows = write_jsonl(tmp_path / "rows_0.jsonl", [row(1)])
    completion = chat_completion("[1]", "[1]")
    for status, content, expected in ((200, json.dumps(completion).encode(), 0), (401, REPLIES["an error that repeats the key"][1], 2)):
        reply[:2] = status, content
        flags = flags_of("inference", good, out / str(expected), rows, f"--api-base {url} --llm-model m")
        assert run("inference", flags, monkeypatch, ApiEngine(url, "m"))[0] == expected
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "good" not in str(path)]
    assert len(written) > 3 and not any(SECRET.encode() in path.read_bytes() for path in written)
    assert SECRET not in caplog.text and Path(f"{out}/0/answered.json.manifest.json") in written


# ---------------------------------------------------------------- servers that differ, refuse and fail


class Fake(StubServer):
    """A chat endpoint. `behave(body)` returns a status with an error, or changes of the completion. If it returns None, the server behaves well.

    A good server selects [1], and its answer has the question's number. `paid` holds the question of every call that it answered.
    """

    def __init__(self, behave=lambda body: None):
        self.behave, self.bodies, self.paid, self.paths, self.headers_seen = behave, [], [], [], []
        super().__init__(self.reply)

    def reply(self, request, body: dict) -> tuple | None:
        with self.lock:
            self.bodies.append(body)
            self.paths.append(request.path)
            self.headers_seen.append(dict(request.headers))
        changes = self.behave(body)
        if changes == "cut":
            return None
        if isinstance(changes, tuple):
            status, content, *kind = changes
            return status, content, {"Content-Type": kind[0] if kind else "application/json"}
        content = completion_for(body, **(changes or {}))
        with self.lock:
            self.paid += [(kind_of(body), word_of(body))] * (word_of(body) != "")
        return 200, content


def kind_of(body: dict) -> str:
    return "choose" if "choose" in body["messages"][0]["content"] else "judge" if "judge" in body["messages"][0]["content"] else "answer"


def word_of(body: dict) -> str:
    """The number of the question, or "" for a request that the engine makes on its own."""
    asked = [message["content"] for message in body["messages"] if message["role"] == "user"]
    return "".join(re.findall(r"Question: .*number (\d+)\?", asked[-1])[:1])


def completion_for(body: dict, content=..., finish="stop", n=None, usage=None, **message) -> dict:
    if content is ...:
        content = {"choose": "[1]", "judge": "Yes"}.get(kind_of(body), f"answer {word_of(body)}")
    usage = usage or {"prompt_tokens": 10, "completion_tokens": 5}
    return chat_completion(*[content] * (n or body.get("n") or 1), model=body["model"], finish=finish, message=message, usage=usage)


def refusal(status: int, message: str, param=None, code=None) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("dynamicrag.llm.endpoint.ATTEMPTS", 4)
    monkeypatch.setattr("dynamicrag.llm.endpoint.MAX_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("dynamicrag.llm.server_calls.RETRY_SECONDS", 0)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Fake()
    yield server
    server.close()


class Stage:
    """A stage with a server and twelve questions. Calling it returns the exit status and the messages."""

    def __init__(self, tmp_path, encoder_dir, monkeypatch, url, caplog):
        (tmp_path / "good").mkdir()
        self.good, self.out, self.url, self.monkeypatch, self.caplog = make_good(tmp_path / "good", encoder_dir), tmp_path / "out", url, monkeypatch, caplog
        self.rows, self.failed = write_jsonl(tmp_path / "rows_0.jsonl", [row(n) for n in range(12)]), False

    def __call__(self, more: str = "", stage: str = "inference", constrain: str = "on") -> tuple[int, str]:
        self.caplog.clear()
        if self.failed:
            gc.collect()  # until then the failed run holds its lock
        engine = ApiEngine(self.url, "m", "on" if "--enable-thinking" in more else None)
        flags = flags_of(stage, self.good, self.out, self.rows, f"--api-base {self.url} --llm-model m --constrain-ids {constrain} {more}")
        status, said = run(stage, flags, self.monkeypatch, engine)
        self.failed = status != 0
        return status, self.caplog.text + "\n".join(said)

    def read(self, name: str = "answered.json") -> dict[str, dict]:
        path = self.out / name
        return {made["id"]: made for _, made in read_json(path)} if path.exists() else {}


@pytest.fixture
def asked(tmp_path, encoder_dir, monkeypatch, fake, caplog):
    return Stage(tmp_path, encoder_dir, monkeypatch, fake.url, caplog)


def all_right(stage: Stage, without: tuple[int, ...] = ()) -> None:
    rows = stage.read()
    assert {row_id: made["response"] for row_id, made in rows.items()} == {f"q{n}": f"answer {n}" for n in range(12) if n not in without}
    assert all(made["id_list"] == [1] for made in rows.values())


OWN_FAULTS = {
    "a content filter": refusal(400, "The response was filtered due to the prompt triggering the content management policy.", "prompt", "content_filter"),
    "a long prompt (OpenAI)": refusal(400, "This model's maximum context length is 700 tokens. However, your messages resulted in 900 tokens.", "messages", "context_length_exceeded"),
    "a long prompt (vLLM)": refusal(400, "'max_tokens' or 'max_completion_tokens' is too large: 32. This model's maximum context length is 700 tokens "
                                    "and your request has 690 input tokens (32 > 700 - 690). (parameter=max_tokens, value=32)", "max_tokens"),
    "a body that is too large": (413, b"<html>Request Entity Too Large</html>"),
    "something in 422": (422, {"detail": [{"type": "value_error", "loc": ["body", "messages"], "msg": "not a message"}]}),
}


@pytest.mark.parametrize(("case", "kind"), zip(OWN_FAULTS, ("choose", "answer", "choose", "answer", "choose"), strict=True))
def test_a_refused_request_costs_its_own_question(fake, asked, case, kind):
    fake.behave = lambda body: OWN_FAULTS[case] if word_of(body) == "7" and kind_of(body) == kind else None
    status, _ = asked()
    assert status == 0
    all_right(asked, without=(7,))
    remain = asked.read("answered_remain.json")
    assert list(remain) == ["q7"] and f"HTTP {OWN_FAULTS[case][0]}" in remain["q7"]["error"] and unanswered_reason(remain["q7"]) == "refused"
    assert remain["q7"]["usage"]["calls"] == (kind == "answer")
    assert len(fake.bodies) == 24 - (kind == "choose"), "nothing is asked twice"
    assert len({tuple(sorted(body)) for body in fake.bodies if kind_of(body) == "answer"}) == 1, "nothing was learnt from it"
    assert not list(asked.out.glob("*.partial*"))


@pytest.mark.parametrize("stage", ["top_inference", "sampling_dpo_trajectories"])
def test_a_refused_request_costs_its_own_question_in_every_stage(fake, asked, stage):
    fake.behave = lambda body: OWN_FAULTS["a content filter"] if word_of(body) == "7" else None
    assert asked(stage=stage)[0] == 0
    if stage == "top_inference":
        assert len(asked.read("windows.jsonl")) == 11 and "HTTP 400" in asked.read("windows_remain.jsonl")["q7"]["error"]
    else:
        sampled = asked.read("sampled.json")
        assert [len(made["id_lists"]) for made in sampled.values()] == [2] * 7 + [0] + [2] * 4 and logged(asked.caplog, "row q7", "HTTP 400") == logged(asked.caplog, "HTTP 400") == 1


def test_a_refused_verdict_costs_its_own_question(fake, asked):
    fake.behave = lambda body: OWN_FAULTS["a content filter"] if word_of(body) == "7" and "river number 3" in body["messages"][-1]["content"] else None
    assert asked("--selector pointwise")[0] == 0
    assert len(asked.read()) == 11 and "HTTP 400" in (error := asked.read("answered_remain.json")["q7"]["error"]) and "p3" in error


@pytest.mark.parametrize("text", ["Perhaps.", "", "The document says Yes."])
def test_a_verdict_that_is_neither_yes_nor_no_is_not_no(fake, asked, text):
    fake.behave = lambda body: {"content": text} if word_of(body) == "7" and kind_of(body) == "judge" else None
    asked("--selector pointwise")
    assert list(asked.read("answered_remain.json")) == ["q7"]


def test_a_refused_answer_costs_its_trajectories_alone(fake, asked):
    def behave(body):
        if kind_of(body) == "choose":
            return {"content": "[2]" if word_of(body) == "7" and body["seed"] % 2 else "[1]"}
        return OWN_FAULTS["a content filter"] if "number 2" in body["messages"][-1]["content"] and word_of(body) != "2" else None

    fake.behave = behave
    assert asked("--num-samples 6 --permute", stage="sampling_dpo_trajectories")[0] == 0
    sampled = asked.read("sampled.json")
    lost = {row_id: 6 - len(made["id_lists"]) for row_id, made in sampled.items() if len(made["id_lists"]) < 6}
    assert 0 < lost["q7"] < 6 and [logged(asked.caplog, f"row {row_id}", number, "HTTP 400") for row_id, number in lost.items()] == [1] * logged(asked.caplog, "HTTP 400")
    for made in sampled.values():
        assert {len(made[key]) for key in ("id_lists", "responses", "response_tokens", "from_expert", "selections")} == {len(made["id_lists"])}


OPTIONS = {  # the refused option, and the options that are sent instead
    "max_tokens": (refusal(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "max_tokens", "unsupported_parameter"),
                   {"max_completion_tokens"}),
    "temperature": (refusal(400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.", "temperature", "unsupported_value"), set()),
    "seed": (refusal(422, "Extra inputs are not permitted: body.seed"), set()),
    "stop": (refusal(400, "Unsupported parameter: 'stop' is not supported with this model.", "stop", "unsupported_parameter"), set()),
    "structured_outputs": (refusal(400, "Unrecognized request argument supplied: structured_outputs"), {"guided_regex"}),
    "chat_template_kwargs": (refusal(400, "Unknown parameter: 'chat_template_kwargs'.", "chat_template_kwargs", "unknown_parameter"), set()),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_a_server_does_not_take_is_learnt_once_and_said_once(fake, asked, tmp_path, option):
    refused, instead = OPTIONS[option]
    fake.behave = lambda body: refused if option in body else {"content": "[1]!!" if kind_of(body) == "choose" else f"answer {word_of(body)}\n"} if option == "stop" else None
    (tmp_path / "p.yaml").write_text(r'{reranker: {stop: ["?", "!"]}, generator: {stop: "\n"}}')
    assert asked(f"--enable-thinking --prompts {tmp_path}/p.yaml")[0] == 0
    all_right(asked)
    with_it = [number for number, body in enumerate(fake.bodies) if option in body]
    assert len(with_it) == 1, "the first request goes ahead alone"
    assert all(instead <= body.keys() for body in fake.bodies[with_it[0] + 1 :] if option != "structured_outputs" or kind_of(body) == "choose")
    assert logged(asked.caplog, f"{fake.url}: m", option) == logged(asked.caplog, fake.url) == 1


def test_all_of_them_together(fake, asked, tmp_path):
    (tmp_path / "p.yaml").write_text("generator: {stop: '!'}")
    fake.behave = lambda body: next((refused for option, (refused, _) in OPTIONS.items() if option in body), None)
    assert asked(f"--enable-thinking --prompts {tmp_path}/p.yaml")[0] == 0
    all_right(asked)
    assert len(fake.bodies) == 24 + len(OPTIONS)


def test_a_server_that_cannot_continue_an_answer_is_named_and_one_that_can_is_asked_to(fake, asked, tmp_path):
    (tmp_path / "p.yaml").write_text("generator: {prefix: 'It is'}")
    assert asked(f"--prompts {tmp_path}/p.yaml")[0] == 0
    all_right(asked)
    for body in fake.bodies:
        begun = kind_of(body) == "answer"
        assert (body["messages"][-1] == {"role": "assistant", "content": "It is"}, body.get("continue_final_message"), body.get("add_generation_prompt")) == (
            (True, True, False) if begun else (False, None, None))
    fake.behave = lambda body: refusal(400, "Unrecognized request argument supplied: continue_final_message") if "continue_final_message" in body else None
    status, said = asked(f"--prompts {tmp_path}/p.yaml --overwrite")
    assert status == 2 and fake.url in said and "--prompts" in said


def test_a_server_that_cannot_constrain_is_an_error_that_names_the_flag(fake, asked):
    fake.behave = lambda body: next((refusal(400, f"Unknown parameter: '{name}'.", name) for name in ("structured_outputs", "guided_regex") if name in body), None)
    status, said = asked()
    assert status == 2 and "--constrain-ids off" in said and not fake.paid
    assert asked(constrain="off", more="--overwrite")[0] == 0
    all_right(asked)


def test_a_server_that_ignores_the_constraint_is_tried_with_the_older_field_and_named(fake, asked):
    fake.behave = lambda body: {"content": "They are [2]."} if kind_of(body) == "choose" and "guided_regex" not in body else None
    status, _ = asked()
    assert status == 0
    all_right(asked, without=(0,))
    assert [kind for kind, _ in fake.paid].count("choose") == 12, "what was paid for is not asked again"
    fake.behave = lambda body: {"content": "They are [2]."} if kind_of(body) == "choose" else None
    assert asked("--overwrite")[0] == 0 and not asked.read()
    assert logged(asked.caplog, f"{fake.url}: m", "--constrain-ids") == 2, "when the older field is tried, and when that fails too"


@pytest.mark.parametrize(("how", "seeds"), [("ignored", True), ("refused", True), ("must be 1", False)])
def test_samples_are_asked_for_one_by_one_if_the_server_has_no_n(fake, asked, how, seeds):
    def behave(body):
        if not seeds and "seed" in body:
            return refusal(400, "Unknown parameter: 'seed'.", "seed")
        if how != "ignored" and body.get("n", 1) > 1:
            return refusal(400, "Unsupported parameter: 'n'." if how == "refused" else "n must be 1 for this model")
        return {"n": 1, **({"content": "[1], [2]" if body.get("seed", 0) % 2 else "[1]"} if kind_of(body) == "choose" else {})}

    fake.behave = behave
    assert asked("--num-samples 4", stage="sampling_dpo_trajectories")[0] == 0
    sampled = asked.read("sampled.json")
    assert all(len(made["id_lists"]) == 4 for made in sampled.values())
    assert not seeds or all(len({tuple(ids) for ids in made["id_lists"]}) == 2 for made in sampled.values()), "each sample has a seed of its own"
    assert [kind for kind, _ in fake.paid].count("choose") == 12 * 4, "the sample that came without n is not asked for again"
    assert all(made["usage"]["prompt_tokens"] >= 40 for made in sampled.values())


@pytest.mark.parametrize("status", [401, 403, 404, 402])
def test_what_is_wrong_with_every_request_ends_the_run_at_once_in_one_line(fake, asked, status):
    fake.behave = lambda body: refusal(status, f"no: {SECRET}")
    exit_status, said = asked()
    assert exit_status == 2 and len(fake.bodies) == 1
    assert re.search(at(f"{fake.url}: m", f"HTTP {status}"), said.splitlines()[-1]) and SECRET not in said
    assert not any(SECRET.encode() in path.read_bytes() for path in asked.out.rglob("*") if path.is_file())


def test_a_server_that_refuses_everything_ends_the_run(fake, asked):
    write_jsonl(asked.rows, [row(n) for n in range(300)])
    fake.behave = lambda body: refusal(400, "bad request")
    status, said = asked()
    assert status == 2 and re.search(at(f"{fake.url}: m", "HTTP 400"), said.splitlines()[-1]) and len(fake.bodies) < 100


TROUBLES = {
    "429": refusal(429, "slow down"), "500": (500, b"<html>"), "503": (503, b""), "cut": "cut", "not JSON": (200, b"<html>"), "no choices": (200, {"choices": []}),
    "an error with 200": (200, {"error": {"message": "overloaded"}}),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_costs_nothing(fake, asked, trouble):
    seen = Counter()

    def behave(body):
        key = kind_of(body), word_of(body)
        with fake.lock:
            seen[key] += 1
        return TROUBLES[trouble] if seen[key] <= 2 and int(word_of(body)) % 3 == first else None

    first = 1 if trouble == "not JSON" else 0  # such a first reply would mean that the address is wrong
    fake.behave = behave
    assert asked()[0] == 0
    all_right(asked)
    assert len(fake.paid) == len(set(fake.paid)) == 24


@pytest.mark.parametrize("stage", LLM_STAGES)
def test_the_cost_of_a_row_is_not_known_if_that_of_one_of_its_calls_is_not(fake, asked, stage):
    fake.behave = lambda body: {"usage": {"prompt_tokens": None}} if kind_of(body) == "answer" and word_of(body) == "7" else None
    assert asked(stage=stage)[0] == 0
    rows = asked.read({"inference": "answered.json", "top_inference": "windows.jsonl", "sampling_dpo_trajectories": "sampled.json"}[stage])
    usage = {row_id: made["usage"] for row_id, made in rows.items()}
    assert usage["q7"]["calls"] == usage["q6"]["calls"] and usage["q6"]["prompt_tokens"] >= 20 and usage["q6"]["generated_tokens"] >= 10
    assert usage["q7"]["prompt_tokens"] is usage["q7"]["generated_tokens"] is None
    if stage.startswith("sampling"):
        assert [row_id for row_id, made in rows.items() if "response_tokens" not in made] == ["q7"]


PAGES = {
    "a page": (b"<html><body>Welcome</body></html>", "text/html"), "a page that is called JSON": (b"<html>", "application/json"),
    "nothing": (b"", "application/json"), "other JSON": (b'{"status": "ok"}', "application/json"), "a list": (b"[]", "application/json"),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_first_reply_of_something_else_means_another_address_and_is_said_at_once(fake, asked, page):
    fake.behave = lambda body: (200, *PAGES[page])
    status, said = asked()
    assert status == 2 and len(fake.bodies) == 1
    assert said.splitlines()[-1].startswith(f"error: --api-base {fake.url}: ") and SECRET not in said


def test_a_page_in_place_of_a_later_reply_is_asked_again(fake, asked):
    shown = []
    fake.behave = lambda body: (shown.append(body), (200, *PAGES["a page"]))[1] if len(fake.paid) >= 15 and len(shown) < 2 else None
    assert asked()[0] == 0 and len(shown) == 2
    all_right(asked)


@pytest.mark.parametrize(("trouble", "chunk"), [("429", ""), ("500", "--chunk-size 5"), ("cut", ""), ("not JSON", "")])
def test_no_answer_that_was_paid_for_is_asked_for_again_after_a_crash(fake, asked, trouble, chunk):
    """The server fails in the middle of a run and is repaired later. Then the same command continues."""
    fake.behave = lambda body: TROUBLES[trouble] if len(fake.paid) >= 17 else None
    status, said = asked(chunk)
    assert status == 2 and re.search(at(f"{fake.url}: m"), said.splitlines()[-1])
    paid = list(fake.paid)
    assert 17 <= len(paid) < 24
    fake.behave = lambda body: None
    status, said = asked(chunk)
    assert status == 0, said
    all_right(asked)
    assert len(fake.paid) == len(set(fake.paid)) == 24, "every call was paid for once"
    assert not list(asked.out.glob("*.partial*"))


def test_no_answer_that_was_paid_for_is_asked_for_again_after_a_kill(fake, tmp_path, asked):
    """The stage runs in its own process, which is killed while it waits for the server."""
    hold = threading.Event()
    fake.behave = lambda body: (hold.wait(30), (503, b""))[1] if len(fake.paid) >= 17 and not hold.is_set() else None
    flags = ["--template", f"{asked.good}/chat.jinja", "--llm-model", "m", "--api-base", fake.url, "--input-json", str(asked.rows), "--output-json", f"{asked.out}/answered.json"]
    command = [sys.executable, str(REPO / "inference.py"), *flags]
    # The first calls come one by one and the others all at once. The replies that were sent must be on disk before the kill.
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log)
        kept = asked.out / "answered.json.partial.completions.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (kept.exists() and sum(map(bool, kept.read_bytes().splitlines())) == len(fake.paid) >= 17):
            time.sleep(0.05)
        process.kill()
        process.wait()
    hold.set()
    paid = list(fake.paid)
    assert 17 <= len(paid) < 24, (tmp_path / "log").read_text()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    all_right(asked)
    assert len(fake.paid) == len(set(fake.paid)) == 24 and not kept.exists()


def test_remaining_questions_are_asked_again_and_evaluated_with_the_others(fake, asked):
    """The commands are those of the README."""
    fake.behave = lambda body: refusal(400, "too long, reduce the length") if word_of(body) in ("3", "7") else None
    assert asked("--output-json {out}/first.json")[0] == 0 and list(asked.read("first_remain.json")) == ["q3", "q7"]
    fake.behave = lambda body: refusal(400, "too long, reduce the length") if word_of(body) == "7" else None
    assert asked("--input-json {out}/first_remain.json --output-json {out}/again.json")[0] == 0
    assert list(asked.read("again.json")) == ["q3"] and asked.read("again.json")["q3"]["response"] == "answer 3"
    flags = f"--results_file {asked.out}/first.json --remain_file {asked.out}/again.json --eval_file {asked.rows} --output_file {asked.out}/m.json"
    assert run("evaluate", flags.split(), asked.monkeypatch)[0] == 0
    [found] = json.loads((asked.out / "m.json").read_text())["results"].values()
    assert (found["n"], found["unanswered"]) == (12, 1)


@pytest.mark.parametrize("questions", [12, 1])
def test_a_request_that_always_fails_while_others_are_answered_costs_its_own_question(fake, asked, questions):
    """This holds for the last open request too. Otherwise the same command would fail each time."""
    fake.behave = lambda body: (500, b"broken") if word_of(body) == "7" and kind_of(body) == "answer" else None
    if questions == 1:
        write_jsonl(asked.rows, [row(7)])
        assert asked()[0] == 0 and list(asked.read("answered_remain.json")) == ["q7"]
        return
    assert asked()[0] == 0
    all_right(asked, without=(7,))
    assert "HTTP 500" in asked.read("answered_remain.json")["q7"]["error"]


def test_overwrite_asks_again(fake, asked):
    fake.behave = lambda body: (503, b"") if len(fake.paid) >= 17 else None
    assert asked()[0] == 2
    fake.behave = lambda body: {"content": "other"} if kind_of(body) == "answer" else None
    assert asked("--overwrite")[0] == 0
    assert {made["response"] for made in asked.read().values()} == {"other"}


REASONING = {
    "tags": lambda text: {"content": f"<think>[2]? No.</think>\n\n{text}"}, "no opening tag": lambda text: {"content": f"[2]? No.</think>\n\n{text}"},
    "other tags": lambda text: {"content": f"<reasoning>[2]?</reasoning>{text}"}, "a field": lambda text: {"content": text, "reasoning_content": "[2]? No."},
    "vLLM's field": lambda text: {"content": text, "reasoning": "[2]? No."},
    "parts": lambda text: {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "[2]?"}]}, {"type": "text", "text": text}]},
}


@pytest.mark.parametrize(("form", "stage"), [
    *((form, "inference") for form in REASONING), ("tags", "top_inference"), ("a field", "top_inference"), ("tags", "sampling_dpo_trajectories"),
    ("no opening tag", "sampling_dpo_trajectories"),
])
def test_reasoning_is_in_no_selection_and_in_no_answer(fake, asked, form, stage):
    fake.behave = lambda body: REASONING[form]("[1]" if kind_of(body) == "choose" else f"answer {word_of(body)}")
    assert asked(stage=stage)[0] == 0
    if stage == "inference":
        all_right(asked)
    elif stage == "top_inference":
        assert [(made["id_list"], made["response"]) for made in asked.read("windows.jsonl").values()] == [([1], f"answer {n}") for n in range(12)]
    else:
        assert [(made["id_lists"], made["responses"]) for made in asked.read("sampled.json").values()] == [([[1], [1]], [f"answer {n}"] * 2) for n in range(12)]


def test_a_verdict_is_read_after_the_reasoning(fake, asked):
    fake.behave = lambda body: REASONING["tags"]("No") if kind_of(body) == "judge" and "river number 2" in body["messages"][-1]["content"] else None
    assert asked("--selector pointwise")[0] == 0
    assert asked.read()["q5"]["id_list"] == [1, 3, 4]


CUT_OFF = {
    "an open block": {"content": "<think>The Nile is"}, "a field": {"content": None, "reasoning_content": "The Nile is"}, "nothing": {"content": ""},
    "vLLM's field": {"content": None, "reasoning": "The Nile is"},
}


@pytest.mark.parametrize("case", CUT_OFF)
def test_an_answer_that_is_all_reasoning_goes_to_the_remaining_rows_with_the_reason(fake, asked, case):
    fake.behave = lambda body: {**CUT_OFF[case], "finish": "length"} if word_of(body) in "37" and kind_of(body) == "answer" else None
    assert asked("--answer-max-tokens 32")[0] == 0
    all_right(asked, without=(3, 7))
    assert all(names(made["error"], 32) and unanswered_reason(made) == "no_answer" for made in asked.read("answered_remain.json").values())
    assert logged(asked.caplog, 2, 12, 32, "--answer-max-tokens") == 1


def test_reasoning_whose_tag_the_servers_template_opens_is_no_answer_when_it_is_cut_off(fake, asked):
    """The other replies show that the template opens the reasoning."""
    fake.behave = lambda body: None if kind_of(body) == "choose" else (
        {"content": "The Nile is", "finish": "length"} if word_of(body) in "07" else REASONING["no opening tag"](f"answer {word_of(body)}")
    )
    assert asked()[0] == 0
    all_right(asked, without=(0, 7))


@pytest.mark.parametrize(("prefix", "answered"), [("<think>\\n", False), ("<think>\\n</think>\\n", True), ("It is", True)])
def test_reasoning_that_a_prefix_opens_is_no_answer_when_it_is_cut_off(fake, asked, tmp_path, prefix, answered):
    (tmp_path / "p.yaml").write_text(f'generator: {{prefix: "{prefix}"}}')
    fake.behave = lambda body: {"finish": "length"} if kind_of(body) == "answer" else None
    status, _ = asked(f"--prompts {tmp_path}/p.yaml")
    assert status == 0 and len(asked.read()) == 12 * answered and len(asked.read("answered_remain.json")) == 12 * (not answered)


@pytest.mark.parametrize("limits", [{"answer"}, {"choose"}, {"answer", "choose"}, set()])
def test_what_was_cut_off_is_said_once_a_run(fake, asked, limits):
    fake.behave = lambda body: {"finish": "length"} if kind_of(body) in limits and int(word_of(body)) % 2 else None
    assert asked("--chunk-size 3")[0] == 0
    assert logged(asked.caplog, 12) == len(limits)
    assert all(logged(asked.caplog, 6, 12, {"answer": "--answer-max-tokens", "choose": "--selection-max-tokens"}[kind]) == 1 for kind in limits)
    all_right(asked)  # a text that is cut off is still an answer, and is scored as one


@pytest.mark.parametrize("content", [{"content": "Geor", "finish": "content_filter"}, {"content": None}, {"content": None, "refusal": "I cannot"}])
def test_a_withheld_answer_is_not_an_answer(fake, asked, content):
    fake.behave = lambda body: content if word_of(body) == "7" and kind_of(body) == "answer" else None
    assert asked()[0] == 0
    all_right(asked, without=(7,))
    assert list(asked.read("answered_remain.json")) == ["q7"]


def test_azures_address_and_key(fake, asked):
    asked.url = fake.url.replace("/v1", "/openai/deployments/d?api-version=2024-10-21")
    assert asked()[0] == 0
    all_right(asked)
    assert set(fake.paths) == {"/openai/deployments/d/chat/completions?api-version=2024-10-21"}
    assert {headers["api-key"] for headers in fake.headers_seen} == {SECRET}


@pytest.mark.parametrize(("flags", "sent"), [("", None), ("--enable-thinking", {"enable_thinking": True})])
def test_a_servers_reasoning_is_left_as_it_is_unless_asked_for(fake, asked, flags, sent):
    asked(flags)
    assert {json.dumps(body.get("chat_template_kwargs")) for body in fake.bodies} == {json.dumps(sent)}
