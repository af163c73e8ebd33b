"""dynamicrag/reward/judge.py against a real server that misbehaves on demand."""

import hashlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import orjson
import pytest
from conftest import at, names
from stubs import StubServer, chat_completion

from dynamicrag.llm import endpoint
from dynamicrag.llm.prompts import Prompts
from dynamicrag.reward import judge as judge_module
from dynamicrag.reward.judge import (
    CRITERIA,
    MAX_REPLIES,
    MAX_TOKENS,
    POINTS,
    REPLY_FORMATS,
    RETRY_TEMPERATURE,
    Judge,
    JudgeUsage,
    UnreadableGrade,
    parse_grade,
)
from dynamicrag.reward.judge_cache import GradeCache
from dynamicrag.stage import UserError

SECRET = "sk-very-secret-0123456789"


def grades(points: float = 20, **other) -> str:
    return json.dumps({**dict.fromkeys(CRITERIA, points), **other})


# ---------------------------------------------------------------- reading a grade


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


def completion(text, **other) -> bytes:
    return json.dumps(chat_completion(text, **other)).encode()


class Server(StubServer):
    """Answers each prompt with the next reply of its script, and then always with the last one.

    `scripts` has the script of an answer to grade; `script` is for all other answers. A reply is a status or a fault, and its details.
    """

    def __init__(self):
        self.script: list = [(200, grades(10))]
        self.scripts: dict[str, list] = {}
        self.seen: dict[str, int] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.azure_keys: set[str] = set()
        self.paths: list[str] = []
        self.now = self.most = self.sent_200 = 0
        self.outlasted = False
        super().__init__(handler=Handler)

    @property
    def requests(self) -> int:
        return sum(self.seen.values())


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        response = re.search("Answer to grade: (.*)", body["messages"][1]["content"])[1]
        with server.lock:
            turn = server.seen[response]
            server.seen[response] += 1
            server.times[response].append(time.monotonic())
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.azure_keys.add(self.headers["api-key"])
            server.paths.append(self.path)
            server.now += 1
            server.most = max(server.most, server.now)
        script = server.scripts.get(response, server.script)
        try:
            self.reply(*script[min(turn, len(script) - 1)])
        finally:
            with server.lock:
                server.now -= 1

    def reply(self, status, content=None, headers=()):
        if status == "slow":
            time.sleep(content)
            status, content = 200, grades(10)
        if status == "late":
            time.sleep(content[0])
            status, content = content[1]
        if status == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if status in ("half", "trickle"):  # half: `content` and nothing more, although more was promised
            self.head(200, 100_000)
            self.wfile.write(content)
            self.wfile.flush()
            if status == "half":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            for _ in range(100):  # each pause is shorter than the timeout, all together are far longer
                time.sleep(0.1)
                self.wfile.write(b" ")
                self.wfile.flush()
            self.server.outlasted = True
            return
        if status == 200 and (isinstance(content, str) or content is None):
            content = completion(content)
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.head(status, len(data), headers)
        self.wfile.write(data)

    def head(self, status, length, headers=()):
        with self.server.lock:
            self.server.sent_200 += status == 200
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(length)), *headers):
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("OPENAI_API_KEY", "JUDGE_API_KEY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    monkeypatch.setattr(endpoint, "ATTEMPTS", 3)
    monkeypatch.setattr(endpoint, "MAX_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(judge_module, "TIMEOUT_SECONDS", 1)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "deep/cache.sqlite"


@pytest.fixture
def make(server, cache):
    return lambda model="m", url=None, **options: Judge(url or server.url, model, cache, **options)


def prompts(*responses: str) -> list:
    """A row per answer, with the answer as its name."""
    return [(f"row-{response}", Prompts().judge("what?", ["gold"], response)) for response in responses]


HANG = ("slow", 1.6)


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": "slow down"}), (500, None), (503, b"<html>"), (200, "no grade"), (200, grades(21)), (200, None), ("cut",), ("half", b'{"choices": ['),
        HANG, ("half", completion(grades(0))), (200, {"choices": []}), (200, b"not json"), (200, b"[]"), (200, b"null"), (200, b""), (408, None), (409, None),
        (200, completion([grades(0)])), (200, b"[" * 100_000), (200, grades(0)[:-1]), (200, {"error": {"message": "overloaded"}}),
        (200, completion(grades(0)), [("Content-Encoding", "gzip")]),
    ],
    ids=lambda trouble: str(trouble)[:60],
)
def test_trouble_that_passes_is_tried_again(server, make, trouble):
    server.scripts = {"a": [trouble, (200, grades(10))]}
    judge = make()
    judge.grade(prompts("before"))
    assert judge.grade(prompts("a")) == [0.5]
    assert server.requests == 3


@pytest.mark.parametrize("page", [b"<html>", b"", b"[]", b'{"status": "ok"}'])
def test_a_first_reply_of_something_else_means_another_address_and_is_said_at_once(server, make, page):
    server.script = [(200, page)]
    with pytest.raises(UserError) as error:
        make().grade(prompts("a"))
    assert str(error.value).startswith(f"--judge-base-url {server.url}: ") and server.requests == 1


@pytest.mark.parametrize("trouble", [(429, None), (500, None), (200, "garbage"), (200, grades(-1)), ("cut",), HANG, (200, {"error": {"message": "overloaded"}})], ids=str)
def test_trouble_that_stays_is_an_error_and_never_a_grade(server, make, trouble):
    server.script = [trouble]
    with pytest.raises(UserError, match=at("row row-a", "m", 3)):
        make().grade(prompts("a"))
    assert server.requests == 3
    server.script = [(200, grades(0))]
    assert make().grade(prompts("a")) == [0.0], "nothing was cached for it"


@pytest.mark.parametrize(("script", "calls"), [
    ([(200, "garbage")], 3), ([(200, grades(-1))], 3), ([(500, None), (429, None), (200, "garbage")], 5), ([(200, completion(None, choices=[{"index": 0}]))], 3),
    ([(200, {"error": {"message": "overloaded"}})], 6), ([(500, None)], 6),
], ids=str)
def test_replies_that_cannot_be_read_are_paid_for_three_times_at_most(server, make, monkeypatch, script, calls):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 6)
    server.script = script
    with pytest.raises(UserError, match=at("row row-a", "m", calls)):
        make().grade(prompts("a"))
    assert server.requests == calls


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_tried_again(server, make, status):
    server.script = [(status, {"error": {"message": "no such model"}})]
    with pytest.raises(UserError, match=at("row row-a", "m", f"HTTP {status}", "no such model")):
        make().grade(prompts("a"))
    assert server.requests == 1


def test_nobody_there_is_an_error(make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=at("row row-a", "m", 3)):
        make(url=url).grade(prompts("a"))


def test_bytes_that_trickle_forever_are_a_timeout(server, make):
    server.script = [("trickle", b" "), (200, grades(10))]
    start = time.monotonic()
    assert make().grade(prompts("a")) == [0.5]
    assert time.monotonic() - start < 8
    assert not server.outlasted


def test_calls_are_concurrent_up_to_the_limit(server, make):
    server.script = [("slow", 0.05)]
    make(concurrency=4).grade(prompts(*map(str, range(16))))
    assert 2 <= server.most <= 4


# ---------------------------------------------------------------- a storm

TROUBLES = [
    (429, {"error": {"message": "rate limit"}}, [("Retry-After", "0.05")]),
    (429, completion(grades(3))),
    (500, None),
    (503, b"<html><body>503 Service Unavailable</body></html>", [("Content-Type", "text/html"), ("Retry-After", "soon")]),
    ("slow", 2.5),
    ("cut",),
    ("half", b'{"id": "1", "choices": [{"index": 0, "mess'),
    ("half", completion(grades(3))),  # a whole reply, although more was promised
    ("trickle", completion(grades(3))),
    (200, "I would give this answer 80 out of 100."),
    (200, grades(3)[:-4]),
    (200, grades(3, clarity=21)),
    (200, grades(3, support=-1)),
    (200, b"\x00\xff\xfe garbage"),
    (200, {"choices": []}),
]


def storm(response: str) -> tuple[list, float]:
    """The replies to an answer before it is graded, and its grade. Both depend only on its text."""
    rng = random.Random(response)
    points = [rng.randint(0, POINTS) for _ in CRITERIA]
    troubles = rng.choices(TROUBLES, k=rng.randint(0, 5))
    replies = [trouble for trouble in troubles if trouble[0] == 200 and isinstance(trouble[1], str)]
    for trouble in replies[MAX_REPLIES - 1 :]:  # a third one would end the run
        troubles.remove(trouble)
    return [*troubles, (200, json.dumps(dict(zip(CRITERIA, points, strict=True))))], sum(points) / 100


@pytest.mark.slow
def test_no_row_is_lost_or_scored_wrongly_in_a_storm(server, make, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 12)
    monkeypatch.setattr(judge_module, "TIMEOUT_SECONDS", 1.5)
    responses = [f"answer {number}" for number in range(120)]
    expected = [storm(response)[1] for response in responses]
    server.scripts = {response: storm(response)[0] for response in responses}
    befell = Counter(str(trouble) for script in server.scripts.values() for trouble in script[:-1])
    assert len(befell) == len(TROUBLES), "every trouble happens"
    judge = make(concurrency=64)
    judge.grade(prompts("before the storm"))
    assert judge.grade(prompts(*responses)) == pytest.approx(expected)
    assert all(server.seen[response] >= len(server.scripts[response]) for response in responses)
    assert not server.outlasted
    asked = server.requests
    again = make(concurrency=64)
    assert again.grade(prompts(*reversed(responses))) == pytest.approx(expected[::-1])
    assert (server.requests, again.usage) == (asked, JudgeUsage(cached=120))


# ---------------------------------------------------------------- when it tries again


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("0.2", 0.2, 2), ("0", 0, 0.5), ("20", 0.3, 2), ("in 20 seconds", 0.3, 2), ("-5", 0, 0.5), ("nan", 0, 0.5), ("inf", 0, 0.5), ("soon", 0, 0.5), ("1.2.3", 0, 0.5)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_when_to_try_again_within_bounds(server, make, monkeypatch, status, header, least, most):
    monkeypatch.setattr(endpoint, "MAX_RETRY_AFTER_SECONDS", 0.3)
    if header == "in 20 seconds":
        header = formatdate(time.time() + 20, usegmt=True)
    server.script = [(status, None, [("Retry-After", header)]), (200, grades(10))]
    assert make().grade(prompts("a")) == [0.5]
    [first, second] = server.times["a"]
    assert least - 0.05 <= second - first < most


def test_the_wait_doubles_and_differs_from_row_to_row(server, make, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_WAIT_SECONDS", 1)
    server.script = [(500, None), (500, None), (200, grades(10))]
    make().grade(prompts(*map(str, range(16))))
    waits = [[times[turn + 1] - times[turn] for times in server.times.values()] for turn in (0, 1)]
    assert max(waits[0]) - min(waits[0]) > 0.15, "spread over half a second"
    assert sum(waits[1]) > sum(waits[0])
    assert max(waits[1]) > 0.5


def test_an_unreadable_reply_is_not_asked_for_in_the_same_way(server, make):
    server.script = [(429, None), (200, "garbage"), (200, grades(10))]
    make().grade(prompts("a"))
    assert [body["temperature"] for body in server.bodies] == [0, 0, RETRY_TEMPERATURE]


# ---------------------------------------------------------------- what is asked for


def test_the_judge_is_asked_without_chance_for_five_integers_in_range(server, make):
    make().grade(prompts("a"))
    [body] = server.bodies
    assert (body["temperature"], body["model"], body["max_tokens"]) == (0, "m", MAX_TOKENS)
    assert body["messages"] == prompts("a")[0][1]
    asked = body["response_format"]["json_schema"]
    assert (body["response_format"]["type"], asked["strict"]) == ("json_schema", True)
    assert asked["schema"]["required"] == list(asked["schema"]["properties"]) == list(CRITERIA)
    assert asked["schema"]["additionalProperties"] is False
    for points in asked["schema"]["properties"].values():
        assert points == {"type": "integer", "enum": list(range(21))}


@pytest.mark.parametrize(("reply_format", "sent"), [("json_object", {"type": "json_object"}), ("text", "absent")])
def test_an_endpoint_that_can_do_less_is_asked_for_less(server, make, reply_format, sent):
    assert make(reply_format=reply_format).grade(prompts("a")) == [0.5]
    assert [body.get("response_format", "absent") for body in server.bodies] == [sent]


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(("reply_format", "others"), [("json_schema", ["json_object", "text"]), ("json_object", ["json_schema", "text"]), ("text", None)])
def test_an_endpoint_that_refuses_the_format_names_the_flag(server, make, status, reply_format, others):
    server.script = [(status, {"detail": "This response_format is unavailable now"})]
    with pytest.raises(UserError, match=at("row row-a", "m", f"HTTP {status}", *(others or []))) as error:
        make(reply_format=reply_format).grade(prompts("a"))
    advice = str(error.value).partition("--judge-format")[2]
    assert bool(advice) == bool(others) and names(advice, *(others or [])) and not names(advice, reply_format)
    assert server.requests == 1


def truncated(text, **message) -> bytes:
    return completion(text, finish="length", message=message)


@pytest.mark.parametrize("reply", [
    f"<think>{grades(0)} or rather</think>{grades(10)}", f"not {grades(0)} but</think>\n{grades(10)}", f"<reasoning>{{}}</reasoning>```{grades(10)}```",
    completion([{"type": "thinking", "thinking": [{"type": "text", "text": grades(0)}]}, {"type": "text", "text": grades(10)}]),
], ids=str)
def test_a_grade_is_read_after_the_reasoning(server, make, reply):
    server.script = [(200, reply)]
    assert make().grade(prompts("a")) == [0.5]
    assert server.requests == 1


@pytest.mark.parametrize("reply", [truncated(f"<think>{grades(0)} or"), truncated(None, reasoning_content=grades(0)), truncated("", reasoning=grades(0))])
def test_a_judge_that_reasons_past_its_limit_may_write_more(server, make, reply):
    server.script = [(200, reply), (200, reply), (200, grades(10))]
    assert make().grade(prompts("a")) == [0.5]
    assert [(body["max_tokens"], body["temperature"]) for body in server.bodies] == [(MAX_TOKENS, 0), (4 * MAX_TOKENS, 0), (16 * MAX_TOKENS, 0)]


def test_a_judge_that_never_ends_its_reasoning_is_an_error_that_says_so(server, make):
    server.script = [(200, truncated(f"<think>{grades(0)}"))]
    with pytest.raises(UserError, match=at("row row-a", "m", 3, 16 * MAX_TOKENS)):
        make().grade(prompts("a"))


def test_the_version_that_azure_wants_is_a_query_and_the_key_a_header(server, make):
    assert make(url=f"{server.url}?api-version=2024-10-21").grade(prompts("a")) == [0.5]
    assert server.paths == ["/v1/chat/completions?api-version=2024-10-21"] and server.azure_keys == {SECRET}


def test_an_option_the_endpoint_does_not_have_is_left_out(server, make):
    def refusal(option, code):
        return 400, {"error": {"message": f"{option} is not supported", "param": option, "code": code, "type": "invalid_request_error"}}

    server.scripts = {"a": [refusal("max_tokens", "unsupported_parameter"), refusal("temperature", "unsupported_value"), (200, grades(10))]}
    assert make(concurrency=1).grade(prompts("a", "b")) == [0.5, 0.5]
    options = [{name: body[name] for name in ("temperature", "max_tokens", "max_completion_tokens") if name in body} for body in server.bodies]
    renamed = {"max_completion_tokens": MAX_TOKENS}
    assert options == [{"temperature": 0, "max_tokens": MAX_TOKENS}, {"temperature": 0, **renamed}, renamed, renamed]
    server.script = [refusal("temperature", "unsupported_value")]
    with pytest.raises(UserError, match=at("row row-c", "m", "HTTP 400")):
        make().grade(prompts("c"))
    assert server.seen["c"] == 2


# ---------------------------------------------------------------- the cache


def test_what_was_graded_is_not_asked_again(server, make):
    judge = make()
    assert judge.grade(prompts("a", "b", "a")) == [0.5, 0.5, 0.5]
    assert (judge.usage.calls, judge.usage.cached, server.requests) == (2, 0, 2)
    server.script = [(500, None)]
    again = make()
    assert again.grade(prompts("b", "a", "b")) == [0.5, 0.5, 0.5]
    assert (again.usage.calls, again.usage.cached, server.requests) == (0, 2, 2)


@pytest.mark.parametrize("other", ["model", "prompt", "system", "format"])
def test_another_model_prompt_or_format_is_asked_again(server, make, other):
    make().grade(prompts("a"))
    server.script = [(200, grades(20))]
    judge = make(model="n" if other == "model" else "m", reply_format="text" if other == "format" else "json_schema")
    [(row, messages)] = prompts("b" if other == "prompt" else "a")
    if other == "system":
        messages[0]["content"] += "!"
    assert judge.grade([(row, messages)]) == [1.0]


def test_the_same_model_at_another_address_is_the_same_judge_and_another_row_the_same_prompt(server, make):
    make().grade(prompts("a"))
    for url in (f"{server.url}/", server.url.replace("127.0.0.1", "localhost"), "http://127.0.0.1:9/v1"):
        assert make(url=url).grade([("another", prompts("a")[0][1])]) == [0.5]
    assert server.requests == 1


def test_grades_kept_by_an_earlier_version_are_not_paid_for_again(server, make, cache):
    """The keys of the earlier version had the address of the judge."""
    [(_, messages)] = prompts("a")
    key = hashlib.sha256(orjson.dumps([server.url, "m", messages, REPLY_FORMATS["json_schema"], CRITERIA, POINTS])).hexdigest()
    GradeCache(cache).put(key, 0.25)
    judge = make()
    assert judge.grade(prompts("a")) == [0.25] and (judge.usage.cached, server.requests) == (1, 0)
    assert make(url="http://127.0.0.1:9/v1").grade(prompts("a")) == [0.25]


def test_grades_come_back_in_the_order_of_the_prompts(server, make):
    judge = make(concurrency=3)
    server.script = [(200, grades(5))]
    judge.grade(prompts("five"))
    server.script = [(200, grades(10))]
    server.scripts = {"x": [("late", (0.2, (200, grades(1))))]}
    assert judge.grade(prompts("x", "five", "y")) == [0.05, 0.25, 0.5]
    assert judge.grade([]) == []


def together(*functions) -> list:
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def test_judges_that_share_a_cache_agree_and_ask_little_twice(server, make):
    """The server's grades change. If two judges ask for one grade at once, the first grade counts for both."""
    responses = [f"answer {number}" for number in range(60)]
    rng = random.Random(3)
    server.scripts = {response: [("late", (0.02, (200, grades(rng.randint(0, 20))))) for _ in range(4)] for response in responses}
    runs = together(*(lambda: make(concurrency=4).grade(prompts(*responses)) for _ in range(4)))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert make().grade(prompts(*responses)) == runs[0]
    server.scripts = {}
    asked = server.requests
    backwards = together(lambda: make(concurrency=1).grade(prompts(*"abcdefghij")), lambda: make(concurrency=1).grade(prompts(*"jihgfedcba")))
    assert backwards == [[0.5] * 10] * 2
    assert server.requests - asked <= 13, "each finds what the other has graded since it began"


def test_many_may_open_a_new_cache_at_once(server, tmp_path):
    for turn in range(25):
        together(*(lambda path=tmp_path / f"{turn}.sqlite": Judge(server.url, "m", path) for _ in range(8)))


@pytest.mark.parametrize("content", [b"not a database at all", b"SQLite format 3\0" + bytes(4000), b"\xff" * 8192])
def test_a_file_that_is_no_cache_is_named(make, cache, content):
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.raises(UserError, match=at(cache, "--judge-cache")):
        make()
    assert cache.read_bytes() == content


@pytest.mark.parametrize("table", ["people (name TEXT)", "grades (key TEXT PRIMARY KEY, grade REAL NOT NULL, reply TEXT NOT NULL)"])
def test_a_database_of_something_else_is_left_alone(make, cache, table):
    cache.parent.mkdir()
    with sqlite3.connect(cache) as database:
        database.execute(f"CREATE TABLE {table}")
    database.close()
    before = cache.read_bytes()
    with pytest.raises(UserError, match=at(cache, "--judge-cache")):
        make()
    assert cache.read_bytes() == before


def test_a_folder_or_a_place_that_cannot_be_written_is_named(make, cache):
    cache.mkdir(parents=True)
    with pytest.raises(UserError, match=at(cache, "--judge-cache")):
        make()
    (cache.parent / "file").write_bytes(b"")
    with pytest.raises(UserError, match=at("file/cache", "--judge-cache")):
        Judge("http://localhost/v1", "m", cache.parent / "file/cache")


def test_a_cache_damaged_in_use_is_named_and_no_call_is_sent(server, make, cache):
    judge = make()
    judge.grade(prompts(*(f"answer {number}" for number in range(100))))
    judge._cache._db.close()
    pages = bytearray(cache.read_bytes())
    pages[4096:] = b"\x55" * (len(pages) - 4096)
    cache.write_bytes(pages)
    asked = server.requests
    with pytest.raises(UserError, match=at(cache, "--judge-cache")):
        make().grade(prompts("answer 1"))
    assert server.requests == asked


def test_a_cache_that_cannot_be_written_any_more_is_named(server, make, cache, monkeypatch):
    judge = make()
    judge._cache._db.execute("PRAGMA query_only = 1")
    with pytest.raises(UserError, match=at(cache, "--judge-cache")):
        judge.grade(prompts("a"))


# ---------------------------------------------------------------- when it fails


def test_grades_given_before_a_failure_are_kept(server, make):
    make().grade(prompts("a", "b"))
    server.script = [(500, None)]
    with pytest.raises(UserError, match=at("row row-c")):
        make().grade(prompts("a", "b", "c"))
    assert server.seen == {"a": 1, "b": 1, "c": 3}


def test_what_is_in_flight_at_a_failure_is_finished_and_nothing_else_begun(server, make):
    server.scripts = {
        "a": [("late", (0.1, (401, None)))], "b": [("slow", 0.4)], "c": [(429, None, [("Retry-After", "0.4")]), (200, grades(20))],
    }
    with pytest.raises(UserError, match=at("row row-a", "m", "HTTP 401")):
        make(concurrency=3).grade(prompts(*"abcdefg"))
    assert server.seen == {"a": 1, "b": 1, "c": 2}
    judge = make()
    assert judge.grade(prompts("b", "c")) == [0.5, 1.0]
    assert judge.usage == JudgeUsage(cached=2)


def test_the_first_of_the_rows_that_failed_is_named(server, make):
    server.scripts = {"b": [("late", (0.3, (401, None)))], "c": [(403, None)]}
    with pytest.raises(UserError, match=at("row row-b", "m", "HTTP 401")):
        make(concurrency=3).grade(prompts("a", "b", "c"))
    with pytest.raises(UserError, match=at("row q17")):
        make().grade([("q17", prompts("c")[0][1]), ("q18", prompts("c")[0][1])])


SCRIPT = """
import signal, sys
from dynamicrag.reward.judge import Judge
from dynamicrag.llm.prompts import Prompts
prompts = [(response, Prompts().judge("what?", ["gold"], response)) for response in "abcdef"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
try:
    Judge(sys.argv[1], "m", sys.argv[2], concurrency=1).grade(prompts)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupt_ends_it_at_once_and_keeps_what_was_graded(server, make, cache, number, status):
    server.scripts = {"d": [("slow", 30)]}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, server.url, str(cache)], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while "d" not in server.seen and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(10) == status
    judge = make()
    assert judge.grade(prompts("a", "b", "c")) == [0.5] * 3
    assert (judge.usage.cached, server.requests) == (3, 4)


# ---------------------------------------------------------------- cost


def test_what_was_paid_is_counted(server, make):
    usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}}
    server.scripts = {
        "a": [(429, None), (200, completion("garbage", **usage)), (200, completion(grades(10), **usage))],
        "b": [(200, completion(grades(10), usage={"prompt_tokens": "many"}))],
        "c": [("half", b"{"), ("cut",), (200, completion(grades(10), usage=None))],
    }
    judge = make()
    judge.grade(prompts("a", "b", "c"))
    assert judge.usage == JudgeUsage(calls=server.sent_200, prompt_tokens=200, generated_tokens=14) == JudgeUsage(5, 0, 200, 14)
    judge.grade(prompts("a", "b", "d"))
    assert judge.usage == JudgeUsage(6, 2, 200, 14)
    assert judge.usage.counts() == {"calls": 6, "cached": 2, "prompt_tokens": 200, "generated_tokens": 14}
    assert JudgeUsage(3).counts() == {"calls": 3, "cached": 0, "prompt_tokens": None, "generated_tokens": None}, "no reply said"
    assert JudgeUsage(cached=3).counts()["prompt_tokens"] == 0


def test_no_more_calls_are_sent_than_the_limit_allows(server, make):
    judge = make(limit=5, concurrency=2)
    judge.grade(prompts("a", "b"))
    with pytest.raises(UserError, match=at("--judge-limit", 5, 4, 3)):
        judge.grade(prompts("b", "c", "d", "e", "f", "g", "h", "c"))
    assert server.requests == 5
    with pytest.raises(UserError, match=at("--judge-limit")):
        judge.grade(prompts("z"))
    again = make(limit=3)
    assert again.grade(prompts(*"abcdefgh")) == [0.5] * 8
    assert (again.usage.calls, again.usage.cached, server.requests) == (3, 5, 8)
    assert make(limit=0).grade(prompts(*"abcdefgh")) == [0.5] * 8


def test_tries_count_against_the_limit(server, make):
    server.script = [(500, None)]
    with pytest.raises(UserError, match=at("--judge-limit", 0, 2)):
        make(limit=2, concurrency=1).grade(prompts("a", "b"))
    assert server.requests == 2
    with pytest.raises(UserError, match=at("row row-a", "m", 3)):
        make(limit=3, concurrency=1).grade(prompts("a", "b"))


# ---------------------------------------------------------------- the key


def test_the_key_comes_from_the_environment_and_is_written_nowhere(server, make, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    server.scripts = {"a": [(200, grades(10, comment=f"your key is {SECRET}"))]}
    make().grade(prompts("a"))
    assert server.keys == {f"Bearer {SECRET}"}
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another\n")
    make().grade(prompts("b"))
    assert "Bearer sk-another" in server.keys
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert written
    for key in (SECRET, "sk-another"):
        assert key.encode() not in written
        assert key not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("padding", [0, 300, 440, 460, 480])
@pytest.mark.parametrize(
    "echo",
    [
        lambda text: (401, {"error": {"message": text}}), lambda text: (500, text.encode()), lambda text: (200, text), lambda text: (200, grades(5, clarity=text)),
        lambda text: (400, {"detail": [{"loc": ["header"], "input": text}]}),
    ],
)
def test_a_key_the_server_repeats_is_not_repeated(server, make, echo, padding):
    server.script = [echo("x" * padding + f" Authorization: Bearer {SECRET} is unknown")]
    with pytest.raises(UserError, match=at("row row-a", "m")) as raised:
        make().grade(prompts("a"))
    error, shown = raised.value, str(raised.value)
    assert not any(SECRET[:length] in shown for length in range(5, len(SECRET) + 1)), "not even half of it"
    assert "[key]" in shown or padding
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(
    "url",
    [
        f"http://{SECRET}@127.0.0.1/v1", f"http://user:{SECRET}@127.0.0.1/v1", f"http://127.0.0.1/v1?api_key={SECRET}", f"http://127.0.0.1/v1#{SECRET}",
        "127.0.0.1/v1", "ftp://127.0.0.1/v1", "http://", "http:///v1", "http://127.0.0.1:port/v1", "http://127.0.0.1 /v1", "http://127.0.0.1/v1\n", "",
    ],
)
def test_an_url_with_credentials_or_without_a_host_is_refused(make, url, cache):
    with pytest.raises(UserError, match=at("--judge-base-url", "JUDGE_API_KEY")) as error:
        Judge(url, "m", cache)
    assert SECRET not in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1/v1", "https://api.example.com:8443/openai/v1/", "http://[::1]:8000/v1", "http://localhost", "http://h/a@b/v1"])
def test_any_other_url_is_taken(url, cache, server):
    Judge(url, "m", cache)


@pytest.mark.parametrize("key", ["sk with space", "schlüssel", "sk-1\nsk-2"])
def test_a_key_no_header_can_hold_is_refused_and_not_shown(make, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(UserError, match="JUDGE_API_KEY") as error:
        make()
    assert key not in str(error.value)


def test_a_judge_that_may_not_call_is_refused(make):
    with pytest.raises(UserError, match=at("--judge-concurrency", 0)):
        make(concurrency=0)
