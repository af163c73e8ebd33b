"""The server of serve.py on a port of this machine, with a stub for the LLM; and an engine whose replies take time."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from stubs import StubEngine, select_and_answer

from dynamicrag.llm.options import CallOptions
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.llm.serving.app import ServeOptions, Server, make_app
from dynamicrag.llm.serving.work import current_work


class SlowEngine(StubEngine):
    """A StubEngine whose replies wait until `go` is set. A work that ends no longer waits; `ended` counts these."""

    def __init__(self, reply=select_and_answer, **more):
        super().__init__(reply, **more)
        self.go, self.started, self.ended = threading.Event(), 0, 0

    async def _wait(self) -> None:
        self.started += 1
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.ended += 1
            raise

    def complete(self, requests):
        current_work().run(self._wait())
        return super().complete(requests)


class Client:
    """A client of a server, and the server behind it."""

    def __init__(self, url: str, server: Server, running: uvicorn.Server):
        self.url, self.server, self.running = url, server, running

    def send(self, path: str, body: object = None, **headers: str) -> tuple[int, object, dict[str, str]]:
        """Status, content (read from JSON if it is) and headers of a reply. Bytes are sent as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            reply = urllib.request.urlopen(request, timeout=20)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            content = reply.read()
            named = {name.lower(): value for name, value in reply.headers.items()}
        return reply.status, json.loads(content) if named["content-type"].startswith("application/json") else content.decode(), named

    def events(self, path: str, body: object) -> list[tuple[str, object]]:
        """The events of a stream: kind ("" if it has none) and data."""
        found = []
        for part in self.send(path, body)[1].split("\n\n"):
            fields = dict(line.split(": ", 1) for line in part.splitlines())
            if "data" in fields:
                found.append((fields.get("event", ""), json.loads(fields["data"]) if fields["data"] != "[DONE]" else None))
        return found

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=20)


@contextmanager
def served(engine: StubEngine | None = None, corpus=None, keys: Sequence[bytes] = (), calls: CallOptions | None = None, **options) -> Iterator[Client]:
    """A running server. `options` are ServeOptions."""
    builder = RequestBuilder(engine or StubEngine(select_and_answer), calls or CallOptions())
    server = Server((builder, builder), "a-model", ServeOptions(**options), keys, corpus)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        running = uvicorn.Server(uvicorn.Config(make_app(server), log_level="critical", access_log=False, timeout_graceful_shutdown=10))
        thread = threading.Thread(target=running.run, args=([bound],), daemon=True)
        thread.start()
        until(lambda: running.started)
        try:
            yield Client(f"http://127.0.0.1:{bound.getsockname()[1]}", server, running)
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(holds, seconds: float = 10) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)
