"""The LLM of a server: vLLM's asynchronous engine, or an OpenAI-compatible server, for requests of many threads at once.

Both are the engines of the stages with another way to wait: every request goes to the model at once, which batches
the requests that run (continuous batching). A request ends when its work is ended.
"""

import asyncio
import itertools
import re
import signal
from collections.abc import Coroutine, Iterable
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from dynamicrag.llm.completion import CLOSES, Completion, Request, leaves_open
from dynamicrag.llm.completion_cache import Reply
from dynamicrag.llm.endpoint import open_client
from dynamicrag.llm.engine import VllmEngine
from dynamicrag.llm.options import CallOptions, EngineOptions
from dynamicrag.llm.prompts import prefix_of
from dynamicrag.llm.requests import Builders, load_builders
from dynamicrag.llm.server import ApiEngine
from dynamicrag.llm.server_calls import CALL_SECONDS
from dynamicrag.llm.serving.streams import StreamedClient
from dynamicrag.llm.serving.work import Work, current_work
from dynamicrag.stage import UserError

DRAIN_SECONDS = 60  # for requests that run when the server is told to end
Result = TypeVar("Result")
UNFINISHED_TAG = re.compile(r"[<\[][\s/\w]{0,14}$")


class ServedVllm(VllmEngine):
    """vLLM in a child process. Requests of all threads run together."""

    def _start(self, **arguments: Any) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._numbers = itertools.count()
        # Ctrl-C reaches the child process too, which would refuse the answer of a question that is being chosen for. The
        # tracker of multiprocessing unblocks the signal when it starts, so it starts first.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, disable_log_stats=True, shutdown_timeout=DRAIN_SECONDS))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def alive(self) -> bool:
        """Whether the child process runs."""
        return not self._llm.errored

    def close(self) -> None:
        self._llm.shutdown()

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run the requests of one work, in order; a prompt that exceeds the window gives a completion without text."""
        if not requests:
            return []
        prompts = [self._prompts.ids(request.messages) for request in requests]
        return current_work().run(gather(self._complete_one(current_work(), *pair) for pair in zip(requests, prompts, strict=True)))

    async def _complete_one(self, work: Work, request: Request, ids: list[int]) -> Completion:
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        if refusal := self._too_long(request, ids):
            return refusal
        kind = RequestOutputKind.CUMULATIVE if work.streams else RequestOutputKind.FINAL_ONLY
        opened, output = self._opened(request), None
        try:
            async for output in self._llm.generate({"prompt_token_ids": ids}, self._sampling(request, output_kind=kind), str(next(self._numbers))):
                if work.streams and not output.finished:
                    work.text(stable_text(self._readable(output.outputs[0].text), opened))
        except EngineDeadError as error:
            raise UserError("vLLM: its process has ended; start the server again") from error
        return self._completion(request, output)


class ServedApi(ApiEngine):
    """An OpenAI-compatible server. The text of an answer is streamed if the server can."""

    alive = True
    _client = _streamed = None

    def close(self) -> None:
        pass  # the connections end with the process

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run the requests of one work, in order. Raises UserError if the server cannot be used."""
        work = current_work()
        return self._completions(requests, work.run(gather(self._ask(work, request) for request in requests)) if requests else [])

    async def _ask(self, work: Work, request: Request) -> Reply | str:
        if self._client is None or self._streamed is None:
            self._calls.begin()
            self._client = open_client(self._url, self._key, CALL_SECONDS)
            self._streamed = StreamedClient(self._client)
        opened = leaves_open(prefix_of(request.messages), self._opens_reasoning)
        client = self._streamed.saying(lambda text: work.text(stable_text(text, opened))) if work.streams else self._client
        return await self._reply(client, request)


def stable_text(text: str, opened: bool) -> str:
    """Return the part of an unfinished answer that its rest does not change: no reasoning, no space and no begun tag at the end."""
    if leaves_open(text, opened):
        return ""
    return UNFINISHED_TAG.sub("", CLOSES.split(text)[-1]).strip()


async def gather(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Return the results, in order. If one fails, the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def load_served(engine: EngineOptions, calls: CallOptions) -> Builders:
    """Load the selector and the generator for serving. Raises UserError."""
    return load_builders(engine, calls, load=lambda options: served_engine(options))


def served_engine(options: EngineOptions) -> ServedVllm | ServedApi:
    """Return the engine that the options describe."""
    return ServedApi(options.api_base, options.llm_model, options.enable_thinking) if options.api_base else ServedVllm(options)
