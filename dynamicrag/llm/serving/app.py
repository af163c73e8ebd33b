"""The server: what its routes share, its pages, and its application. The routes are in routes.py."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from dynamicrag.llm.requests import Builders
from dynamicrag.llm.serving.corpus import Corpus
from dynamicrag.llm.serving.metrics import Measured, Metrics
from dynamicrag.llm.serving.questions import refusal_of
from dynamicrag.llm.serving.refusals import Body, Refusal, check_key, read_body
from dynamicrag.llm.serving.work import Slots, Work

PAGE = Path(__file__).with_name("page.html")
WATCH_SECONDS = 1.0
UPLOADS_PER_SLOT = 2  # bodies that are read while all slots are taken


@dataclass(frozen=True)
class ServeOptions:
    """The bounds of a server: flags of serve.py, which describes them. `max_body` is in MB."""

    max_documents: int = 500
    max_body: float = 4
    concurrency: int = 64
    window: int = 40
    n_docs: int = 40


class Server:
    """The models of a server, its corpus, its bounds and its measurements."""

    def __init__(self, builders: Builders, name: str, options: ServeOptions, keys: Sequence[bytes] = (), corpus: Corpus | None = None):
        self.builders, self.name, self.options, self.corpus = builders, name, options, corpus
        self.metrics, self.slots = Metrics(), Slots(options.concurrency)
        self.failed, self.when_failed = False, lambda: None  # called when the models have ended by themselves
        self.dataset = builders[0].dataset  # of a question that names none
        self._keys, self._reading = keys, 0
        self._watching: set[asyncio.Task] = set()

    @property
    def alive(self) -> bool:
        """Whether the models can answer."""
        return all(getattr(builder.engine, "alive", True) for builder in self.builders)

    def admit(self, request: Request) -> None:
        """Raise Refusal if the client has no key."""
        check_key(request, self._keys)

    async def body(self, request: Request, kind: type[Body]) -> Body:
        """Return the body of a request that has a key. Raises Refusal, before the body is read if no slot is free."""
        self.admit(request)
        if not self.alive:
            raise Refusal(503, "model_unavailable", "the model has ended", {"Retry-After": "60"})
        self.slots.check()
        if self._reading >= UPLOADS_PER_SLOT * self.options.concurrency:
            raise Refusal(429, "busy", "too many bodies arrive at once; try again later", {"Retry-After": "1"})
        self._reading += 1
        try:
            return await read_body(request, kind, round(self.options.max_body * 1e6))
        finally:
            self._reading -= 1

    def start(self, request: Request, task: Callable[[Work], object]) -> Work:
        """Run task(work) in a slot, and return its work. It is ended when the client goes away. Raises Refusal."""
        work = self.slots.start(task)
        watch = asyncio.create_task(self._end_if_gone(request, work))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)
        return work

    async def _end_if_gone(self, request: Request, work: Work) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if not work.finished:
            self.metrics.gone.inc()
            work.end()

    async def result(self, request: Request, task: Callable[[Work], Any]) -> Any:
        """Return task(work), run in a slot. Raises Refusal."""
        work = self.start(request, task)
        while True:
            kind, value = await work.events.get()
            if kind == "done":
                return value
            if kind == "failed":
                raise refusal_of(value)

    async def watch(self) -> None:
        """Wait until the models end by themselves, and say so."""
        while self.alive:
            await asyncio.sleep(WATCH_SECONDS)
        self.failed = True
        self.when_failed()

    def close(self) -> None:
        """End the threads and the models."""
        self.slots.close()
        for builder in dict.fromkeys(self.builders):
            getattr(builder.engine, "close", lambda: None)()


def make_app(server: Server) -> Any:
    """Return the ASGI application of a server."""
    from dynamicrag.llm.serving.routes import make_router

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(server.watch())
        yield
        watch.cancel()
        server.close()

    app = FastAPI(title="DynamicRAG", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.include_router(make_router(server))
    page = PAGE.read_text(encoding="utf-8")
    policy = content_policy(page)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> Response:
        corpus = None if server.corpus is None else len(server.corpus)
        return JSONResponse({"status": "ok" if server.alive else "failed", "model": server.name, "passages": corpus}, 200 if server.alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        server.admit(request)
        server.metrics.at_work.set(server.slots.running)
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.content(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> Response:
        return JSONResponse(Refusal(error.status_code, "not_found", str(error.detail)).content(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return JSONResponse(Refusal(500, "internal_error", "internal error; the server's log has the reason").content(), 500)

    return Measured(app, server.metrics, frozenset(path for route in app.routes if (path := getattr(route, "path", None))))


def content_policy(page: str) -> str:
    """Return the policy that allows a page its own script and style, and requests to its own server."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
