"""dynamicrag/reward/judge.py and dynamicrag/llm/server.py against a real vLLM server, with a tiny model of random weights: grades of noise, but grades."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import at, make_tiny_llama, names

from dynamicrag.llm.completion_cache import CompletionCache
from dynamicrag.llm.engine import ApiEngine, Request
from dynamicrag.llm.prompts import Prompts
from dynamicrag.llm.templates import PromptTokenizer
from dynamicrag.models.chat_templates import read_template
from dynamicrag.reward.judge import CRITERIA, REPLY_FORMATS, Judge, JudgeUsage
from dynamicrag.rows.identifiers import ids_pattern
from dynamicrag.stage import UserError

REPO = Path(__file__).parents[2]
START_SECONDS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge_vllm") / "model"
    make_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def url(model) -> str:
    """The base URL of a server that lives as long as the module's tests."""
    folder = model.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": "sk-local"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager",
        "--chat-template", str(REPO / "template/llama3.jinja"), "--trust-request-chat-template",
        # JSON may have any number of spaces between its tokens, and a model that has lost its way writes nothing else.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_healthy(process, port, folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-6000:]
        try:
            direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"not healthy after {START_SECONDS} s\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_API_KEY", "sk-local")


@pytest.mark.slow
def test_a_real_server_grades_every_answer_at_the_first_call_and_once(url, tmp_path):
    answers = [(f"q{number}", Prompts().judge("which river is the longest ?", ["the Nile"], f"answer {number}")) for number in range(6)]
    judge = Judge(url, "tiny", tmp_path / "cache.sqlite", limit=len(answers))
    graded = judge.grade(answers)
    assert len(graded) == len(answers)
    assert all(0 <= grade <= 1 for grade in graded)
    assert judge.usage.calls == len(answers), "the schema leaves nothing that cannot be read"
    assert judge.usage.prompt_tokens > 50 * len(answers)
    assert judge.usage.generated_tokens >= len(CRITERIA) * len(answers)
    again = Judge(url, "tiny", tmp_path / "cache.sqlite")
    assert again.grade(answers) == graded
    assert again.usage == JudgeUsage(cached=len(answers))


@pytest.mark.slow
def test_what_a_real_server_refuses_is_named(url, tmp_path, monkeypatch):
    answers = [("q1", Prompts().judge("which ?", ["a"], "word " * 3000))]
    with pytest.raises(UserError, match=at("row q1", "tiny", "HTTP 400", 2048)):
        Judge(url, "tiny", tmp_path / "cache.sqlite").grade(answers)
    with pytest.raises(UserError, match=at("row q1", "other", "HTTP 404")):
        Judge(url, "other", tmp_path / "cache.sqlite").grade(answers)
    with pytest.raises(UserError, match=at("row q1", "tiny", "HTTP 400", "--judge-format json_object")):
        broken = {"type": "json_schema", "json_schema": {"name": "grades", "schema": {"type": "no such type"}}}
        monkeypatch.setitem(REPLY_FORMATS, "json_schema", broken)
        Judge(url, "tiny", tmp_path / "cache.sqlite").grade([("q1", Prompts().judge("which ?", ["a"], "word"))])
    monkeypatch.setenv("JUDGE_API_KEY", "sk-wrong")
    with pytest.raises(UserError, match=at("row q1", "tiny", "HTTP 401")) as error:
        Judge(url, "tiny", tmp_path / "cache.sqlite").grade(answers)
    assert "sk-wrong" not in str(error.value)


@pytest.mark.slow
def test_a_real_server_as_the_engine(url, monkeypatch, caplog):
    """It takes every option, holds selections to their identifiers, and refuses a long prompt alone."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-local")
    docs = [{"id": str(n), "title": f"Title {n}", "text": "river"} for n in range(1, 6)]
    prompt = Prompts().reranker("which river is the longest ?", docs)
    asked = [Request(prompt, seed, 60, n=3, temperature=1.0, top_p=0.9, pattern=ids_pattern(5)) for seed in range(4)]
    long = Request(Prompts().generator("word " * 3000, [], "Be brief."), 1, 32)
    engine = ApiEngine(url, "tiny", "on")
    first, second = (engine.complete([*asked, long, Request(prompt, 7, 3)]) for _ in range(2))
    for completion in first[:4]:
        assert len(completion.texts) == 3 and completion.prompt_tokens > 50 and completion.generated_tokens >= 3
        assert all(re.fullmatch(ids_pattern(5), text) for number, text in enumerate(completion.texts) if number not in completion.cut_off)
    assert not first[4].answered and names(first[4].reason("answer"), "HTTP 400", 2048)
    assert first[5].cut_off == {0} and first[5].generated_tokens == 3
    assert [completion.texts for completion in first] == [completion.texts for completion in second], "seeds reach the server"
    assert not caplog.messages, "nothing had to be learnt"
    for model, key, status in (("other", "sk-local", 404), ("tiny", "sk-wrong", 401)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=f"HTTP {status}"):
            ApiEngine(url, model).complete(asked[:1])


@pytest.mark.slow
def test_a_real_server_continues_an_answer_and_ends_it_as_the_prompts_file_says(url, model, monkeypatch, tmp_path):
    """The server reads the tokens that the engine in this process would, and leaves a stop string out."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-local")
    (tmp_path / "p.yaml").write_text("generator: {prefix: 'river the gas'}")
    from transformers import AutoTokenizer

    asked = Prompts(str(tmp_path / "p.yaml")).generator("which river is the longest ?", [], "Be brief.")
    rendered = PromptTokenizer(AutoTokenizer.from_pretrained(model), read_template(str(REPO / "template/llama3.jinja"))).ids(asked)
    body = {"model": "tiny", "prompt": rendered, "max_tokens": 12, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-local"}
    with DIRECT.open(urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers), timeout=120) as reply:
        right = json.loads(reply.read())
    [whole] = ApiEngine(url, "tiny").complete([Request(asked, 1, 12)])
    assert (whole.texts[0], whole.prompt_tokens) == (right["choices"][0]["text"].strip(), len(rendered))
    *_, last = whole.texts[0].split()
    [ended] = ApiEngine(url, "tiny").complete([Request(asked, 1, 12, stop=(last,))])
    assert ended.texts[0] == whole.texts[0][: whole.texts[0].index(last)].strip()


# ---------------------------------------------------------------- a proxy before it that fails

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Answer = tuple[int, dict | None]  # status and body; None: the connection is closed without a reply


@contextmanager
def proxy(url: str, fail: Callable[[dict, int], Answer | None], after: Callable[[dict], None] = lambda reply: None) -> Iterator[tuple[str, Counter]]:
    """The address of a proxy, and how often each prompt was answered with status 200 through it.

    `fail` gets a request and how often its prompt came before; what it returns is answered in the server's place. `after` may
    change the server's reply.
    """
    came, paid, lock = Counter(), Counter(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = json.dumps(body["messages"])
            with lock:
                before, came[prompt] = came[prompt], came[prompt] + 1
            status, reply = fail(body, before) or self.forwarded(body)
            if reply is None:
                self.close_connection = True
                return
            if status == 200:
                after(reply)
                with lock:
                    paid[prompt] += 1
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def forwarded(self, body: dict) -> Answer:
            headers = {"Content-Type": "application/json", "Authorization": self.headers["Authorization"]}
            try:
                with DIRECT.open(urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers), timeout=120) as reply:
                    return reply.status, json.loads(reply.read())
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", paid
    finally:
        server.shutdown()
        server.server_close()


def refusing(status: int, said: str, **more) -> Answer:
    return status, {"error": {"message": said, "type": "BadRequestError", "code": status, **more}}


def not_taking(option: str, said: str) -> Callable[[dict, int], Answer | None]:
    return lambda body, before: refusing(400, said, param=option) if body.get(option) not in (None, 1) else None


def without(*keys: str) -> Callable[[dict], None]:
    return lambda reply: [reply.pop(key, None) for key in keys] and None


FAILURES = {
    "too many requests": (lambda body, before: refusing(429, "slow down") if before == 0 else None, without()),
    "a failing server": (lambda body, before: refusing(503, "overloaded") if before == 0 else None, without()),
    "a lost connection": (lambda body, before: (0, None) if before == 0 else None, without()),
    "no usage": (lambda body, before: None, without("usage")),
    "usage that is null": (lambda body, before: None, lambda reply: reply.update(usage=None)),
    "no seed": (not_taking("seed", "Unsupported parameter: 'seed' is not supported with this model."), without()),
    "no n": (not_taking("n", "n must be 1"), without()),
    "no max_tokens": (not_taking("max_tokens", "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."), without()),
    "no structured_outputs": (not_taking("structured_outputs", "Unrecognized request argument supplied: structured_outputs"), without()),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_no_answer_is_lost_wrong_or_paid_for_twice_behind_a_proxy_that_fails(url, monkeypatch, tmp_path, failure):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-local")
    docs = [{"id": str(n), "title": f"Title {n}", "text": "river"} for n in range(1, 6)]
    answers = [Request(Prompts().generator(f"which river is number {n} ?", docs[:2], "Be brief."), n, 5) for n in range(5)]
    selections = [Request(Prompts().reranker(f"which river is number {n} ?", docs), n, 60, n=2, temperature=1.0, pattern=ids_pattern(5)) for n in range(5)]
    right = ApiEngine(url, "tiny").complete([*answers, *selections])
    fail, after = FAILURES[failure]
    with proxy(url, fail, after) as (address, paid):
        engine = ApiEngine(address, "tiny")
        engine.keep_in(CompletionCache(tmp_path / "out.json"))  # as every stage does
        replies = engine.complete([*answers, *selections])
    for request, reply, expected in zip([*answers, *selections], replies, right, strict=True):
        assert len(reply.texts) == request.n
        if request.pattern and failure in ("no structured_outputs", "no seed"):  # without them the server writes something else
            continue
        assert reply.texts == expected.texts, "the answer is the one that the server gives directly"
    times = 2 if failure == "no n" else 1
    assert [paid[json.dumps(request.messages)] for request in answers] == [1] * 5
    assert [paid[json.dumps(request.messages)] for request in selections] == [times] * 5


@pytest.mark.slow
def test_a_refused_question_costs_itself_behind_a_proxy(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-local")
    asked = [Request(Prompts().generator(f"which river is number {n} ?", [], "Be brief."), n, 5) for n in range(6)]
    right = ApiEngine(url, "tiny").complete(asked)
    with proxy(url, lambda body, before: refusing(400, "filtered", code="content_filter") if "number 3" in body["messages"][-1]["content"] else None) as (address, paid):
        replies = ApiEngine(address, "tiny").complete(asked)
    assert [reply.answered for reply in replies] == [True, True, True, False, True, True] and "filtered" in replies[3].reason("answer")
    assert [reply.texts for number, reply in enumerate(replies) if number != 3] == [reply.texts for number, reply in enumerate(right) if number != 3]
    assert sum(paid.values()) == 5


# A template that opens the reasoning itself, as Qwen's do; the server has no parser for it.
OPENING = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: <think>\n"


@pytest.mark.slow
def test_only_what_follows_the_reasoning_is_an_answer_if_the_template_opens_it(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-local")

    def reason_first(body: dict, before: int) -> None:
        body["chat_template"] = OPENING
        body["structured_outputs"] = {"regex": r"gas is [a-z]{2}\n</think>\n\n(oil|farming)"}

    asked = [Request(Prompts().generator(f"which export is number {n} ?", [], "Be brief."), n, 60) for n in range(6)]
    with proxy(url, reason_first) as (address, paid):
        replies = ApiEngine(address, "tiny").complete(asked)
    assert {text for reply in replies for text in reply.texts} <= {"oil", "farming"} and sum(paid.values()) == 6
    assert all(reply.answered and not reply.unreadable for reply in replies)
    with proxy(url, reason_first) as (address, _):
        cut = ApiEngine(address, "tiny").complete([asked[0], Request(asked[1].messages, 1, 3)])
    assert cut[0].texts[0] in ("oil", "farming") and cut[1].cut_off == {0} and cut[1].reason("answer"), "cut off within the reasoning"
