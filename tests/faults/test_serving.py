"""Clients that misbehave: each gets its status code, costs only itself, and the server goes on. Keys and paths are nowhere."""

import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import SlowEngine, served, until
from stubs import StubEngine, select_and_answer

from dynamicrag.llm.serving import refusals
from dynamicrag.llm.serving.work import Slots
from dynamicrag.stage import UserError

SECRET = b"sk-canary-0123456789"
GOOD = {"query": "which?", "documents": ["a", "b"]}
BAD = {  # path, body, status and code
    "not JSON": ("/v1/rerank", b"{", 400, "invalid_json"),
    "no body": ("/v1/rerank", b"", 400, "invalid_json"),
    "invalid UTF-8": ("/v1/rerank", b'{"query": "\xff"}', 400, "invalid_json"),
    "half a surrogate": ("/v1/rerank", b'{"query": "\\ud800", "documents": ["a"]}', 400, "invalid_json"),
    "100,000 brackets": ("/v1/rerank", b"[" * 100_000, 400, "invalid_json"),
    "deep documents": ("/v1/rerank", b'{"query": "q", "documents": [' + b'{"text": ' * 5000 + b"1" + b"}" * 5000 + b"]}", 400, "invalid_json"),
    "a list": ("/v1/rerank", [], 422, "invalid_request"),
    "null": ("/v1/answer", b"null", 422, "invalid_request"),
    "no query": ("/v1/rerank", {"documents": ["a"]}, 422, "invalid_request"),
    "a blank query": ("/v1/rerank", {"query": " \n", "documents": ["a"]}, 422, "invalid_request"),
    "no documents": ("/v1/rerank", {"query": "q", "documents": []}, 422, "invalid_request"),
    "documents that are numbers": ("/v1/rerank", {"query": "q", "documents": [1, 2]}, 422, "invalid_request"),
    "a document without text": ("/v1/rerank", {"query": "q", "documents": [{"image": "x"}]}, 422, "invalid_request"),
    "a blank document": ("/v1/rerank", {"query": "q", "documents": ["a", " "]}, 422, "invalid_request"),
    "top_n of 0": ("/v1/rerank", {**GOOD, "top_n": 0}, 422, "invalid_request"),
    "an unknown data set": ("/v1/answer", {"question": "q", "documents": ["a"], "dataset": "../../etc"}, 422, "invalid_request"),
    "10,000 documents": ("/v1/rerank", {"query": "q", "documents": ["a"] * 10_000}, 413, "too_many_documents"),
    "no user": ("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}], "documents": ["a"]}, 422, "invalid_request"),
    "two answers": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "documents": ["a"], "n": 2}, 422, "invalid_request"),
    "another path": ("/v1/embeddings", {}, 404, "not_found"),
    "a path of files": ("/../../etc/passwd", {}, 404, "not_found"),
}


@pytest.fixture(scope="module")
def client():
    with served(keys=[b"another-key", SECRET], max_documents=500) as running:
        yield running


def good(client) -> bool:
    """Whether the server answers a good request, and no slot is taken afterwards."""
    status, reply, _ = client.send("/v1/rerank", GOOD, Authorization=f"Bearer {SECRET.decode()}")
    return status == 200 and len(reply["results"]) == 2 and client.server.slots.running == 0


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_has_its_status_and_the_server_goes_on(client, name):
    path, body, status, code = BAD[name]
    got, reply, _ = client.send(path, body, Authorization=f"Bearer {SECRET.decode()}")
    assert (got, reply["error"]["code"]) == (status, code) and reply["message"] == reply["error"]["message"]
    said = json.dumps(reply)
    assert len(said) < 2500 and "Traceback" not in said and "/work" not in said and ".py" not in said
    assert good(client)


@pytest.mark.parametrize("name", ["", "Bearer ", "Bearer wrong", f"Bearer {SECRET.decode()}x", f"Basic {SECRET.decode()}", "Bearer \xff"])
def test_a_wrong_key_is_refused_before_the_body_is_read(client, name, caplog):
    for path, body in (("/v1/rerank", b"{"), ("/v1/answer", {}), ("/v1/chat/completions", {}), ("/metrics", None), ("/v1/models", None)):
        status, reply, headers = client.send(path, body, Authorization=name)
        assert (status, reply["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert SECRET.decode() not in json.dumps(reply)
    assert client.send("/health")[0] == 200 and client.send("/")[0] == 200
    assert SECRET.decode() not in caplog.text and good(client)


def test_every_key_is_compared_in_constant_time(monkeypatch, client):
    compared = []
    monkeypatch.setattr(refusals.hmac, "compare_digest", lambda key, given: compared.append((key, given)) or key == given)
    assert client.send("/v1/models", Authorization="Bearer another-key")[0] == 200
    assert compared == [(b"another-key", b"another-key"), (SECRET, b"another-key")]


def test_a_body_of_another_type_is_refused(client):
    """A page of another site can send text without being asked, but not JSON."""
    headers = {"Content-Type": "text/plain", "Authorization": f"Bearer {SECRET.decode()}", "Origin": "https://example.org"}
    status, reply, got = client.send("/v1/rerank", GOOD, **headers)
    assert (status, reply["error"]["code"]) == (415, "unsupported_media_type") and "access-control-allow-origin" not in got


def sent_raw(client, *parts: bytes, close: bool = False) -> str:
    """The reply to bytes on a connection, as far as it arrives before it ends."""
    with client.connect() as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:
                break
        if close:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            return ""
        return connection.recv(1 << 16).decode()


HEAD = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer " + SECRET + b"\r\n"


def test_a_body_of_100_mb_is_refused_before_it_is_read(client):
    assert " 413 " in sent_raw(client, HEAD + b"Content-Length: 100000000\r\n\r\n")
    assert " 413 " in sent_raw(client, HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n") or good(client)
    million = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n"
    assert " 413 " in sent_raw(client, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[million] * 5), "a length that is not announced"
    assert good(client)


def test_a_slow_client_has_no_slot_and_an_end(client, monkeypatch):
    monkeypatch.setattr(refusals, "BODY_SECONDS", 0.3)
    with client.connect() as connection:
        connection.sendall(HEAD + b'Content-Length: 50\r\n\r\n{"query"')
        until(lambda: client.server._reading == 1)
        assert client.server.slots.running == 0 and good(client)
        assert " 408 " in connection.recv(1 << 16).decode()
    until(lambda: client.server._reading == 0)


def test_a_client_that_is_killed_while_it_sends_costs_nothing(client):
    for _ in range(20):
        sent_raw(client, HEAD + b'Content-Length: 50\r\n\r\n{"query"', close=True)
    until(lambda: client.server._reading == 0)
    assert good(client)


def test_paths_that_clients_invent_are_one_line_of_the_metrics(client):
    for number in range(3):
        assert client.send(f"/invented/{number}", {})[0] == 404
    text = client.send("/metrics", Authorization=f"Bearer {SECRET.decode()}")[1]
    assert "invented" not in text and 'dynamicrag_requests_total{path="other",status="404"}' in text


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"POST /v1/rerank HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_costs_nothing(client, raw):
    sent_raw(client, raw)
    assert good(client)


# ---------------------------------------------------------------- slots


def test_one_more_than_the_bound_gets_429_and_clients_that_go_away_free_their_slots():
    engine = SlowEngine()
    with served(engine, concurrency=3) as client:
        body = json.dumps(GOOD).encode()
        raw = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        waiting = [client.connect() for _ in range(3)]
        for connection in waiting:
            connection.sendall(raw)
        until(lambda: engine.started == 3)
        status, reply, headers = client.send("/v1/rerank", b"{")
        assert (status, reply["error"]["code"]) == (429, "busy") and int(headers["retry-after"]) >= 1, "before the body is read"
        assert client.send("/health")[0] == 200
        for connection in waiting[:2]:
            connection.close()
        until(lambda: client.server.slots.running == 1)
        assert engine.ended == 2
        engine.go.set()
        assert client.send("/v1/rerank", GOOD)[0] == 200
        assert b" 200 " in waiting[2].recv(1 << 16)
        waiting[2].close()
        text = client.send("/metrics")[1]
        assert "dynamicrag_clients_gone_total 2.0" in text and 'dynamicrag_requests_total{path="/v1/rerank",status="429"} 1.0' in text


def test_a_client_that_leaves_a_stream_frees_its_slot():
    """The choice has been sent; the answer is being written."""
    engine = SlowEngine()
    engine.complete = lambda requests: (SlowEngine if StubEngine.kind(requests[0]) == "answer" else StubEngine).complete(engine, requests)
    with served(engine, concurrency=1) as client:
        body = json.dumps({"question": "q", "documents": ["a"], "stream": True}).encode()
        with client.connect() as connection:
            connection.sendall(b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: engine.started == 1)
            received = b""
            while b"event: choice" not in received:
                received += connection.recv(1 << 16)
            assert client.send("/v1/rerank", GOOD)[0] == 429
        until(lambda: client.server.slots.running == 0)
        assert engine.ended == 1
        engine.go.set()
        assert client.send("/v1/rerank", GOOD)[0] == 200


def test_the_server_finishes_its_work_and_refuses_new_work_when_it_ends():
    engine = SlowEngine()
    with served(engine) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.send, "/v1/rerank", GOOD)
        until(lambda: engine.started == 1)
        client.running.should_exit = True

        def refused() -> bool:
            try:
                client.connect().close()
            except OSError:
                return True
            return False

        until(refused)
        engine.go.set()
        status, reply, _ = running.result()
        assert status == 200 and len(reply["results"]) == 2


def test_many_clients_get_each_its_own_reply():
    """No reply is lost or exchanged, while others go away."""
    engine = StubEngine(lambda request, kind, titles: f"[{len(titles)}]" if kind == "select" else titles[0])
    engine.complete = lambda requests: (setattr(engine, "batches", []), StubEngine.complete(engine, requests))[1]
    with served(engine, concurrency=16) as client, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> bool:
            if number % 10 == 0:
                sent_raw(client, HEAD + b"Content-Length: 500\r\n\r\n{", close=True)
                return True
            docs = [{"title": f"{number}-{n}", "text": "a"} for n in range(1 + number % 4)]
            status, reply, _ = client.send("/v1/answer", {"question": f"q{number}", "documents": docs})
            return status == 200 and reply["answer"] == docs[-1]["title"]

        assert all(pool.map(ask, range(300)))
        until(lambda: client.server.slots.running == client.server._reading == 0)


# ---------------------------------------------------------------- errors of the model


@pytest.mark.parametrize(("error", "status", "code"), [(UserError("http://inner:8000/v1: down"), 502, "model_unavailable"), (RuntimeError("/secret/path"), 500, "internal_error")])
def test_an_error_of_the_model_is_told_without_its_details(error, status, code):
    def fails(*_):
        raise error

    with served(StubEngine(fails)) as client:
        got, reply, _ = client.send("/v1/rerank", GOOD)
        assert (got, reply["error"]["code"]) == (status, code) and "secret" not in json.dumps(reply) and "inner" not in json.dumps(reply)
        client.server.builders[0].engine.reply = select_and_answer
        assert client.send("/v1/rerank", GOOD)[0] == 200


def test_a_model_that_has_ended_is_told_to_the_balancer():
    engine = StubEngine(select_and_answer)
    with served(engine) as client:
        ended = []
        client.server.when_failed = lambda: ended.append(True)
        engine.alive = False
        assert client.send("/health")[0] == 503
        status, reply, headers = client.send("/v1/rerank", GOOD)
        assert (status, reply["error"]["code"]) == (503, "model_unavailable") and headers["retry-after"]
        until(lambda: ended == [client.server.failed])


def test_ended_work_waits_for_nothing_more():
    """The work is ended between two waits: the second one does not begin."""

    async def run():
        slots, began = Slots(1), threading.Event()
        ended = threading.Event()

        def task(work):
            began.set()
            ended.wait(5)
            return work.run(asyncio.sleep(60))

        work = slots.start(task)
        await asyncio.to_thread(began.wait)
        work.end()
        ended.set()
        kind, _ = await asyncio.wait_for(work.events.get(), 5)
        slots.close()
        return kind, slots.running

    assert asyncio.run(run()) == ("failed", 0)
