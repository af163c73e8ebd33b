"""Servers that answer with anything, addresses with a password in them, and keys: an error in one line, and the key nowhere."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import write_jsonl
from running import flags_of, make_good, row, run

from dynamicrag.endpoint import check_url, read_key
from dynamicrag.engine import ApiEngine, Request
from dynamicrag.stage import UserError

SECRET = "sk-canary-0123456789"
GOOD = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}]}
REPLIES: dict[str, tuple[int, bytes, str]] = {
    "not JSON": (200, b"<html>", "no chat completion"),
    "empty": (200, b"", "no chat completion"),
    "null": (200, b"null", "no chat completion"),
    "a list": (200, b"[]", "no chat completion"),
    "a number": (200, b"7", "no chat completion"),
    "no choices": (200, b'{"id": "x"}', "no chat completion"),
    "choices that are null": (200, json.dumps({**GOOD, "choices": None}).encode(), "no chat completion"),
    "choices that are texts": (200, json.dumps({**GOOD, "choices": ["a"]}).encode(), "no chat completion"),
    "a choice without a message": (200, json.dumps({**GOOD, "choices": [{"index": 0}]}).encode(), "no chat completion"),
    "content that is a list": (200, json.dumps({**GOOD, "choices": [{"index": 0, "message": {"content": ["a"]}}]}).encode(), "no chat completion"),
    "usage that is a text": (200, json.dumps({**GOOD, "usage": {"prompt_tokens": "many", "completion_tokens": 1}}).encode(), "no chat completion"),
    "usage that is null": (200, json.dumps({**GOOD, "usage": {"prompt_tokens": None, "completion_tokens": None}}).encode(), "no chat completion"),
    "100,000 brackets": (200, b"[" * 100_000, "no chat completion"),
    "invalid UTF-8": (200, b'{"id": "\xff"}', "no chat completion"),
    "an error that repeats the key": (401, json.dumps({"error": {"message": f"bad key {SECRET}"}}).encode(), r"bad key \[key\]"),
    "an error in HTML": (500, b"<html>\n<body>\x1b[2Jbroken</body></html>", "Error code: 500"),
}


@pytest.fixture(scope="module")
def listening():
    """A server that gives each request the status and the bytes of `reply`."""
    reply = [200, b""]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(reply[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply[1])))
            self.end_headers()
            self.wfile.write(reply[1])

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", reply
    listening.shutdown()


@pytest.fixture
def server(listening, monkeypatch):
    monkeypatch.setattr("dynamicrag.engine.API_RETRIES", 0)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    return listening


@pytest.mark.parametrize("case", REPLIES)
def test_a_server_that_answers_with_something_else(server, case):
    url, reply = server
    reply[:2] = REPLIES[case][:2]
    with pytest.raises(UserError, match=REPLIES[case][2]) as error:
        ApiEngine(url, "m").complete([Request([{"role": "user", "content": "q"}], seed=1, max_tokens=5)])
    assert str(error.value).startswith(url) and SECRET not in str(error.value)


def test_half_a_surrogate_pair_is_no_reason_to_end_a_run(server):
    url, reply = server
    reply[:] = 200, json.dumps({**GOOD, "choices": [{"index": 0, "message": {"role": "assistant", "content": "a\ud800b"}}]}).encode()
    [completion] = ApiEngine(url, "m").complete([Request([{"role": "user", "content": "q"}], seed=1, max_tokens=5)])
    assert completion.texts == ["a?b"]


@pytest.mark.parametrize("url", [
    "http://user:password@host/v1", "http://host/v1?api_key=secret", "http://host/v1#secret", "ftp://host/v1", "host/v1", "", "http://", "http://ho st/v1", "http://host:port/v1",
])
def test_an_address_that_may_hold_a_key_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"--api-base: expected http.*OPENAI_API_KEY") as error:
        ApiEngine(url, "m")
    assert not url or url not in str(error.value)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1/", "https://api.openai.com/v1", "http://[::1]:8000/v1", "http://10.0.0.1"])
def test_an_address_is_taken_as_it_is(url):
    assert check_url("--api-base", url, "KEY") == url.rstrip("/")


@pytest.mark.parametrize("key", ["sk-line\nend", "sk-\u2026", "sk with space", "sk-\x00"])
def test_a_key_no_header_can_hold_is_refused_and_not_repeated(monkeypatch, key):
    with monkeypatch.context() as patch:
        if "\0" in key:
            patch.setattr("os.environ", {"OPENAI_API_KEY": key})
        else:
            patch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY: expected printable ASCII") as error:
            read_key("OPENAI_API_KEY")
    assert key not in str(error.value)


def test_the_key_is_in_no_file_and_no_message(server, tmp_path, monkeypatch, encoder_dir, caplog):
    """The engine is the real one; the judge's key: test_judge.py."""
    url, reply = server
    (tmp_path / "good").mkdir()
    good, out = make_good(tmp_path / "good", encoder_dir), tmp_path / "out"
    rows = write_jsonl(tmp_path / "rows_0.jsonl", [row(1)])
    completion = {**GOOD, "choices": [{"index": n, "finish_reason": "stop", "message": {"role": "assistant", "content": "[1]"}} for n in range(2)]}
    for status, content, expected in ((200, json.dumps(completion).encode(), 0), (401, REPLIES["an error that repeats the key"][1], 2)):
        reply[:2] = status, content
        flags = flags_of("inference", good, out / str(expected), rows, f"--api-base {url} --llm-model m")
        assert run("inference", flags, monkeypatch, ApiEngine(url, "m"))[0] == expected
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "good" not in str(path)]
    assert len(written) > 3 and not any(SECRET.encode() in path.read_bytes() for path in written)
    assert SECRET not in caplog.text and Path(f"{out}/0/answered.json.manifest.json") in written
