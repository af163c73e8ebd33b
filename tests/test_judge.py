"""dynamicrag/judge.py against a real server that misbehaves on demand."""

import json
import os
import socket
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dynamicrag import judge as judge_module
from dynamicrag.judge import CRITERIA, Judge, UnreadableGrade, parse_grade
from dynamicrag.prompts import Prompts
from dynamicrag.stage import UserError

SECRET = "sk-very-secret"


def grades(points: float = 20, **other) -> str:
    return json.dumps({**dict.fromkeys(CRITERIA, points), **other})


# ---------------------------------------------------------------- reading a grade (behaviour 16)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        (grades(20), 1.0), (grades(0), 0.0), (grades(10), 0.5), (grades(10, clarity=20), 0.6), (grades(7.5), 0.375),
        (f"Here you are:\n```json\n{grades(10)}\n```", 0.5), (grades(10, comment="good"), 0.5), (grades(10, note={"a": 1}), 0.5),
    ],
)
def test_a_grade_is_the_sum_over_a_hundred(reply, grade):
    assert parse_grade(reply) == pytest.approx(grade)


@pytest.mark.parametrize(
    "reply",
    [
        "", "80", "good", "{}", "[]", "null", "{", "}{", '{"correctness": 20}', grades(20, clarity=21), grades(20, clarity=-1), grades(20, clarity="20"),
        grades(20, clarity=True), grades(20, clarity=None), grades(20, clarity=[20]), grades(20).replace("20", "NaN", 1), grades(20).replace("20", "1e999", 1),
        grades(100), '{"correctness": 20,}', "[20, 20, 20, 20, 20]", grades(20) + grades(20),
    ],
)
def test_anything_else_is_unreadable_and_never_a_number(reply):
    with pytest.raises(UnreadableGrade):
        parse_grade(reply)


# ---------------------------------------------------------------- a server


class Server(ThreadingHTTPServer):
    """Answers each prompt with the next of its scripted replies, and the last of them ever after."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list = [(200, grades(10))]
        self.seen: dict[str, int] = defaultdict(int)
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][1]["content"]
        with server.lock:
            turn = server.seen[prompt]
            server.seen[prompt] += 1
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            self.reply(*server.script[min(turn, len(server.script) - 1)])
        finally:
            with server.lock:
                server.now -= 1

    def reply(self, status, content):
        if status == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if status == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if status == "slow":
            time.sleep(content)
            status, content = 200, grades(10)
        if status == 200 and isinstance(content, str):
            message = {"role": "assistant", "content": content}
            content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("OPENAI_API_KEY", "JUDGE_API_KEY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    monkeypatch.setattr(judge_module, "ATTEMPTS", 3)
    monkeypatch.setattr(judge_module, "MAX_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(judge_module, "TIMEOUT_SECONDS", 0.3)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(server, tmp_path):
    return lambda model="m", concurrency=16, url=None: Judge(url or server.url, model, str(tmp_path / "deep/cache.sqlite"), concurrency)


def prompts(*responses: str) -> list:
    return [Prompts().judge("what?", ["gold"], response) for response in responses]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": "slow down"}), (500, None), (503, b"<html>"), (200, "no grade"), (200, grades(21)), (200, None), ("cut", None), ("half", None),
        ("slow", 0.6), (200, {"choices": []}), (200, b"not json"), (200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]}),
        (200, b"[]"), (200, b"null"), (408, None), (409, None),
    ],
    ids=str,
)
def test_trouble_that_passes_is_tried_again(server, make, trouble):
    server.script = [trouble, (200, grades(10))]
    assert make().grade(prompts("a")) == [0.5]
    assert sum(server.seen.values()) == 2


@pytest.mark.parametrize("trouble", [(429, None), (500, None), (200, "garbage"), (200, grades(-1)), ("cut", None), ("slow", 0.6), (200, b"not json")], ids=str)
def test_trouble_that_stays_is_an_error_and_never_a_grade(server, make, trouble):  # behaviour 18
    server.script = [trouble]
    with pytest.raises(UserError, match=r"the judge m failed 3 times or refused: .*run again to continue"):
        make().grade(prompts("a"))
    assert sum(server.seen.values()) == 3
    server.script = [(200, grades(0))]
    assert make().grade(prompts("a")) == [0.0], "nothing was cached for it"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again(server, make, status):
    server.script = [(status, {"error": {"message": "no such model"}})]
    with pytest.raises(UserError, match="the judge m failed"):
        make().grade(prompts("a"))
    assert sum(server.seen.values()) == 1


def test_nobody_there_is_an_error(make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="the judge m failed 3 times"):
        make(url=url).grade(prompts("a"))


def test_what_was_graded_is_not_asked_again(server, make):
    judge = make()
    assert judge.grade(prompts("a", "b", "a")) == [0.5, 0.5, 0.5]
    assert (judge.calls, len(server.bodies)) == (2, 2)
    server.script = [(500, None)]
    again = make()
    assert again.grade(prompts("b", "a")) == [0.5, 0.5]
    assert (again.calls, len(server.bodies)) == (0, 2)


@pytest.mark.parametrize("other", ["model", "prompt", "url"])
def test_another_model_prompt_or_endpoint_is_asked_anew(server, make, other):
    make().grade(prompts("a"))
    server.script = [(200, grades(20))]
    judge = make(model="n" if other == "model" else "m", url=f"{server.url}/" if other == "url" else None)
    assert judge.grade(prompts("b" if other == "prompt" else "a")) == [1.0]


def test_grades_given_before_a_failure_are_kept(server, make):
    server.script = [(200, grades(10))]
    make().grade(prompts("a", "b"))
    server.script = [(500, None)]
    with pytest.raises(UserError):
        make().grade(prompts("a", "b", "c"))
    assert set(server.seen.values()) == {1, 3}


def test_grades_come_back_in_the_order_of_the_prompts(server, make):
    judge = make(concurrency=3)
    server.script = [(200, grades(5))]
    judge.grade(prompts("five"))
    server.script = [(200, grades(10))]
    assert judge.grade(prompts("x", "five", "y")) == [0.5, 0.25, 0.5]
    assert judge.grade([]) == []


def test_calls_are_concurrent_up_to_the_limit(server, make):
    server.script = [("slow", 0.05)]
    make(concurrency=4).grade(prompts(*map(str, range(16))))
    assert 2 <= server.most <= 4


def test_the_key_comes_from_the_environment_and_is_written_nowhere(server, make, tmp_path, monkeypatch, caplog):
    server.script = [(200, grades(10)), (401, {"error": {"message": "bad key"}})]
    make().grade(prompts("a"))
    assert server.keys == {f"Bearer {SECRET}"}
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    make().grade(prompts("b"))
    assert "Bearer sk-another" in server.keys
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written
    assert SECRET.encode() not in written
    assert b"sk-another" not in written
    assert SECRET not in caplog.text


def test_the_judge_is_asked_for_json_without_chance(server, make):
    make().grade(prompts("a"))
    [body] = server.bodies
    assert (body["temperature"], body["model"], body["response_format"]) == (0, "m", {"type": "json_object"})
    assert body["messages"] == prompts("a")[0]
