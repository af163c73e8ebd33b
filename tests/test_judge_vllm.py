"""dynamicrag/judge.py against a real vLLM server, with a tiny model of random weights: the grades are noise, but grades."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_chain import make_tiny_llama

from dynamicrag.judge import CRITERIA, REPLY_FORMATS, Judge, JudgeUsage
from dynamicrag.prompts import Prompts
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
