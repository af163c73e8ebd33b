"""Measurements of a server, in the form of Prometheus."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dynamicrag.llm.completion import Usage

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Requests, durations, tokens and documents of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("dynamicrag_requests", "Requests by path and HTTP status", ["path", "status"], registry=self._registry)
        self.seconds = Histogram("dynamicrag_seconds", "Duration of requests, to the last byte", ["path"], buckets=SECONDS, registry=self._registry)
        self.tokens = Counter("dynamicrag_tokens", "Tokens of the model", ["kind"], registry=self._registry)
        self.documents = Counter("dynamicrag_documents", "Documents given and chosen", ["kind"], registry=self._registry)
        self.at_work = Gauge("dynamicrag_requests_at_work", "Requests that have a slot", registry=self._registry)
        self.gone = Counter("dynamicrag_clients_gone", "Clients that went away before the end of their reply", registry=self._registry)

    def count(self, usage: Usage, given: int, chosen: int) -> None:
        """Count the cost and the documents of one question."""
        self.tokens.labels("prompt").inc(usage.prompt_tokens or 0)
        self.tokens.labels("generated").inc(usage.generated_tokens or 0)
        self.documents.labels("given").inc(given)
        self.documents.labels("chosen").inc(chosen)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Measured:
    """An ASGI application whose requests are measured, by the paths it knows."""

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str]):
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        status, began = "500", time.monotonic()

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - began)
