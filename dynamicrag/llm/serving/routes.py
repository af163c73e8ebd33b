"""The routes that ask the model: rerank, answer and chat."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dynamicrag.llm.completion import Usage, known_sum
from dynamicrag.llm.serving import bodies
from dynamicrag.llm.serving.app import Server
from dynamicrag.llm.serving.questions import Choice, answer, choose, refusal_of, row_of
from dynamicrag.llm.serving.refusals import Refusal
from dynamicrag.llm.serving.work import Work
from dynamicrag.rows.row import Row

QUIET_SECONDS = 15  # after which a stream has a comment, so that no proxy closes it
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class Answered:
    """A question on its way: its row, its choice and its answer, and the seconds that each took."""

    row: Row
    choice: Choice
    text: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def usage_of(usage: Usage) -> dict[str, int | None]:
    """Return the cost of a question, with the names of OpenAI. A count is None if a server did not report it."""
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.generated_tokens}
    return {**counts, "total_tokens": known_sum(counts.values())}


def scores(count: int) -> list[float]:
    """Return the scores of `count` chosen documents: from 1 evenly down to a little more than 0.5. They express the order only."""
    return [1 - rank / (2 * count) for rank in range(count)]


def documents_of(answered: Answered) -> list[dict[str, Any]]:
    """Return the chosen documents, most important first. `index` is from 0, among the documents sent or retrieved."""
    pairs = zip(answered.choice.docs, answered.choice.positions, strict=True)
    return [{"index": position - 1, "id": doc["id"], "title": doc["title"], "text": doc["text"]} for doc, position in pairs]


def event(kind: str, value: object) -> bytes:
    """Return a server-sent event; without a kind it is one of OpenAI's stream."""
    return (f"event: {kind}\n".encode() if kind else b"") + b"data: " + orjson.dumps(value) + b"\n\n"


async def stream(work: Work, form: Callable[[str, Any], Iterable[bytes]]) -> Response:
    """Return a stream of the events of a work, each as `form` writes it. An error before the first event is raised."""
    first = await work.events.get()
    if first[0] == "failed":
        raise refusal_of(first[1])

    async def content() -> AsyncIterator[bytes]:
        kind, value = first
        while True:
            for part in form(kind, refusal_of(value) if kind == "failed" else value):
                yield part
            if kind in ("done", "failed"):
                return
            while True:
                try:
                    kind, value = await asyncio.wait_for(work.events.get(), QUIET_SECONDS)
                    break
                except TimeoutError:
                    yield b": the model is at work\n\n"

    return StreamingResponse(content(), media_type="text/event-stream", headers=STREAM_HEADERS)


def make_router(server: Server) -> APIRouter:
    """Return the routes of a server."""
    router, options = APIRouter(), server.options

    def count(row: Row, choice: Choice) -> None:
        server.metrics.count(choice.usage, len(row["docs"]), len(choice.docs))

    def asking(question: str, given: list[bodies.Given] | None, streams: bool, dataset: str | None = None, row_id: str | None = None) -> Callable[[Work], Answered]:
        """Return the task that retrieves documents if none are given, chooses and answers. Raises Refusal."""
        if given is None and server.corpus is None:
            raise Refusal(422, "invalid_request", "documents: this server has no corpus; send the documents")
        sent = bodies.docs_of(given, options.max_documents) if given is not None else None

        def task(work: Work) -> Answered:
            began = time.monotonic()
            docs = server.corpus.docs(question, options.n_docs) if sent is None and server.corpus else sent or []
            retrieved = time.monotonic()
            row = row_of(question, docs, dataset or server.dataset, row_id)
            answered = Answered(row, choose(row, server.builders, options.window))
            chosen = time.monotonic()
            answered.seconds |= {"retrieval": retrieved - began, "choice": chosen - retrieved}
            work.say("choice", answered)
            try:
                answered.text = answer(row, answered.choice, server.builders, streams)
            finally:  # the choice has its cost, even if there is no answer
                count(row, answered.choice)
            answered.seconds["answer"] = time.monotonic() - chosen
            return answered

        return task

    @router.post("/v1/rerank")
    @router.post("/v2/rerank")
    @router.post("/rerank")
    async def rerank(request: Request) -> Response:
        body = await server.body(request, bodies.Rerank)
        row = row_of(body.query, bodies.docs_of(body.documents, options.max_documents, body.rank_fields))
        choice: Choice = await server.result(request, lambda _: choose(row, server.builders, options.window))
        count(row, choice)
        results = []
        for position, score in list(zip(choice.positions, scores(len(choice.docs)), strict=True))[: body.top_n]:
            document = body.documents[position - 1]
            shown = {"document": {"text": document} if isinstance(document, str) else document} if body.return_documents else {}
            results.append({"index": position - 1, "relevance_score": score, **shown})
        usage = usage_of(choice.usage)
        version = "2" if request.url.path == "/v2/rerank" else "1"
        tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        meta = {"api_version": {"version": version}, "billed_units": {"search_units": 1}, "tokens": tokens}
        return JSONResponse({"id": str(uuid.uuid4()), "model": server.name, "results": results, "usage": usage, "meta": meta})

    @router.post("/v1/answer")
    async def answer_question(request: Request) -> Response:
        body = await server.body(request, bodies.Answer)
        task, reply_id = asking(body.question, body.documents, body.stream, body.dataset, body.id), str(uuid.uuid4())

        def chosen(answered: Answered) -> dict[str, Any]:
            retrieved = {"retrieved": answered.row["docs"]} if body.documents is None else {}
            return {"id": reply_id, "model": server.name, **retrieved, "documents_shown": answered.choice.shown, "chosen": documents_of(answered)}

        def done(answered: Answered) -> dict[str, Any]:
            return {"answer": answered.text, "usage": usage_of(answered.choice.usage), "seconds": answered.seconds}

        def form(kind: str, value: Any) -> Iterable[bytes]:
            if kind == "choice":
                yield event("choice", chosen(value))
            elif kind == "text":
                yield event("text", {"text": value})
            else:
                yield event("done", done(value)) if kind == "done" else event("error", value.content())

        if body.stream:
            return await stream(server.start(request, task), form)
        answered: Answered = await server.result(request, task)
        return JSONResponse({**chosen(answered), **done(answered)})

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        server.admit(request)
        return JSONResponse({"object": "list", "data": [{"id": server.name, "object": "model", "created": 0, "owned_by": "dynamicrag"}]})

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await server.body(request, bodies.Chat)
        task = asking(body.question(), body.documents, bool(body.stream))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": server.name}
        if not body.stream:
            answered: Answered = await server.result(request, task)
            message = {"role": "assistant", "content": answered.text, "refusal": None}
            choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
            usage = usage_of(answered.choice.usage)
            return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage, "citations": documents_of(answered)})

        def chunk(delta: dict[str, str] | None, finish: str | None = None, **more: object) -> bytes:
            choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
            return event("", {**head, "object": "chat.completion.chunk", "choices": choices, **more})

        def form(kind: str, value: Any) -> Iterable[bytes]:
            if kind == "choice":
                yield chunk({"role": "assistant", "content": ""}, citations=documents_of(value))
            elif kind == "text":
                yield chunk({"content": value})
            elif kind == "failed":
                yield event("", value.content())
            else:
                yield chunk({}, "stop")
                usage = usage_of(value.choice.usage)
                if body.stream_options and body.stream_options.include_usage:
                    yield chunk(None, usage=usage)
                yield b"data: [DONE]\n\n"

        return await stream(server.start(request, task), form)

    return router
