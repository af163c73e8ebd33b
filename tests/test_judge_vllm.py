"""dynamicrag/judge.py and dynamicrag/server.py against a real vLLM server, with a tiny model of random weights: grades of noise, but grades."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_chain import make_tiny_llama

from dynamicrag.engine import ApiEngine, Request
from dynamicrag.judge import CRITERIA, REPLY_FORMATS, Judge, JudgeUsage
from dynamicrag.prompts import Prompts
from dynamicrag.selection import ids_pattern
from dynamicrag.stage import UserError

REPO = Path(__file__).parents[1]
START_SECONDS = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    """The base URL of a server that lives as long as the module's tests."""
    folder = tmp_path_factory.mktemp("judge_vllm")
    make_tiny_llama(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": "sk-local"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager",
        "--chat-template", str(REPO / "template/llama3.jinja"),
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
    with pytest.raises(UserError, match=r"row q1: the judge tiny refused: HTTP 400: .*maximum context length"):
        Judge(url, "tiny", tmp_path / "cache.sqlite").grade(answers)
    with pytest.raises(UserError, match="row q1: the judge other refused: HTTP 404"):
        Judge(url, "other", tmp_path / "cache.sqlite").grade(answers)
    with pytest.raises(UserError, match=r"row q1: the judge tiny refused: HTTP 400: .*--judge-format json_object or text"):
        broken = {"type": "json_schema", "json_schema": {"name": "grades", "schema": {"type": "no such type"}}}
        monkeypatch.setitem(REPLY_FORMATS, "json_schema", broken)
        Judge(url, "tiny", tmp_path / "cache.sqlite").grade([("q1", Prompts().judge("which ?", ["a"], "word"))])
    monkeypatch.setenv("JUDGE_API_KEY", "sk-wrong")
    with pytest.raises(UserError, match="row q1: the judge tiny refused: HTTP 401") as error:
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
    assert not first[4].answered and "maximum context length" in first[4].reason("answer")
    assert first[5].cut_off == {0} and first[5].generated_tokens == 3
    assert [completion.texts for completion in first] == [completion.texts for completion in second], "seeds reach the server"
    assert not caplog.messages, "nothing had to be learnt"
    for model, key, status in (("other", "sk-local", 404), ("tiny", "sk-wrong", 401)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=f"HTTP {status}"):
            ApiEngine(url, model).complete(asked[:1])
