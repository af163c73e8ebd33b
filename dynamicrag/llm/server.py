"""Any OpenAI-compatible server as an engine. Requests that it refuses are left unanswered, and every reply is stored.

Servers differ in the options that they support. The first request of each kind is sent alone. If the server does not
support an option (another name of max_tokens, another field for constraints, no seed, no n, no temperature), this is
logged once and applies to the rest of the run.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

from dynamicrag.llm.completion import (
    CLOSES,
    Completion,
    Request,
    Sample,
    completion_of,
    known_sum,
    leaves_open,
    opens_itself,
    refused,
)
from dynamicrag.llm.completion_cache import CompletionCache, Reply, key_of
from dynamicrag.llm.endpoint import (
    check_url,
    open_client,
    read_key,
)
from dynamicrag.llm.prompts import prefix_of
from dynamicrag.llm.replies import single
from dynamicrag.llm.server_calls import CALL_SECONDS, CONCURRENCY, ServerCalls
from dynamicrag.llm.server_options import ServerOptions
from dynamicrag.models.chat_templates import Messages
from dynamicrag.stage import UserError


class ApiEngine:
    """Any OpenAI-compatible server, called concurrently. The key comes from OPENAI_API_KEY only."""

    def __init__(self, base_url: str, model: str, thinking: str | None = None):
        """Raises UserError if the URL has parts other than host, path and api-version, or the key is not printable ASCII."""
        self._url = check_url("--api-base", base_url, "OPENAI_API_KEY")
        self._key = read_key("OPENAI_API_KEY")
        self._model, self._thinking = model, thinking
        self._cache: CompletionCache | None = None
        self._tried: set[tuple[bool, bool]] = set()
        # Properties of the server that this run has found out.
        self._options = ServerOptions(self._url, model, thinking)
        self._opens_reasoning = False
        self._calls = ServerCalls(self._url, self._key, model, self._options)

    def keep_in(self, cache: CompletionCache | None) -> None:
        """Store every reply in `cache`, and use the replies that are already in it."""
        self._cache = cache

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """Return True: the server's window is not known.

        A request that it refuses as too long gives a completion without text.
        """
        return True

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run all requests, at most CONCURRENCY at a time. The results are in order.

        A request that the server refuses for its content or length gives a completion without text, with the reason.
        Raises UserError for an error that affects every request (key, model, unreachable server), after the calls in
        progress have ended.
        """
        replies: list[Reply | str | None] = [self._kept(request) for request in requests]
        if None in replies:
            if any(prefix_of(request.messages) for request in requests):
                self._options.say("prefix", "is asked to continue the beginning of the answer that --prompts gives "
                                    "(continue_final_message): a server without this option, such as OpenAI's, starts "
                                    "a new answer after it, which may lower the scores")
            asyncio.run(self._ask_all(requests, replies))
        return self._completions(requests, [reply for reply in replies if reply is not None])

    def _completions(self, requests: list[Request], replies: list[Reply | str]) -> list[Completion]:
        """Return the completions of requests from their replies, or from the reasons why there is none."""
        answered = list(zip(requests, replies, strict=True))
        for request, reply in answered:
            if not isinstance(reply, str) and not leaves_open(prefix_of(request.messages)):
                self._opens_reasoning |= any(opens_itself(sample.text or "") for sample in reply[0])
        return [refused(request, reply) if isinstance(reply, str) else self._read(request, *reply) for request, reply in answered]

    def _read(self, request: Request, samples: list[Sample], prompt_tokens: int | None, generated_tokens: int | None) -> Completion:
        # If the template opens the reasoning, a text that is cut off before the reasoning ends contains no tag.
        opened = leaves_open(prefix_of(request.messages), self._opens_reasoning)
        if opened and not request.pattern:
            samples = [
                replace(sample, text=None, reasoned=True) if sample.finish_reason == "length" and not CLOSES.search(sample.text or "") else sample
                for sample in samples
            ]
        return completion_of(samples, request, prompt_tokens, generated_tokens)

    # ---------------------------------------------------------------- replies on disk

    def _kept(self, request: Request) -> Reply | None:
        return self._cache.get(self._key_of(request)) if self._cache else None

    def _keep(self, request: Request, reply: Reply) -> None:
        if self._cache:
            self._cache.put(self._key_of(request), reply)

    def _key_of(self, request: Request) -> str:
        return key_of(self._model, request, self._thinking)

    # ---------------------------------------------------------------- calls

    async def _ask_all(self, requests: list[Request], replies: list[Reply | str | None]) -> None:
        """Replace each None by a reply, or by the reason why there is none.

        Raises the UserError of the first failed request.
        """
        from tqdm import tqdm

        failures: dict[int, UserError] = {}
        self._calls.begin()
        missing = [number for number, reply in enumerate(replies) if reply is None]
        kinds = {(bool(requests[number].pattern), requests[number].n > 1): number for number in reversed(missing)}
        ahead = [number for kind, number in kinds.items() if kind not in self._tried]

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                if failures:
                    return
                try:
                    replies[number] = await self._reply(client, requests[number])
                except UserError as error:
                    failures[number] = error
                    self._calls.failed = True
                progress.update()

        async with open_client(self._url, self._key, CALL_SECONDS) as client:
            with tqdm(total=len(missing), unit="request") as progress:
                for number in ahead:
                    await work(iter([number]))
                self._tried |= kinds.keys()
                waiting = (number for number in missing if number not in ahead)
                await asyncio.gather(*(work(waiting) for _ in range(min(CONCURRENCY, len(missing)))))
        if failures:
            raise failures[min(failures)]

    async def _reply(self, client, request: Request) -> Reply | str:
        """Return the reply to a request, which is then stored on disk, or the reason why the server refuses it."""
        cached = self._kept(request)
        if cached:
            return cached
        if request.n > 1 and not self._options.takes("n"):
            return await self._one_by_one(client, request)
        reply = await self._calls.ask(client, request)
        if isinstance(reply, str):
            return reply
        if len(reply[0]) < request.n:  # the server ignores n
            self._options.learn("n")
            self._keep(single(request, 0), (reply[0][:1], *reply[1:]))
            return await self._one_by_one(client, request)
        self._keep(request, reply)
        return reply

    async def _one_by_one(self, client, request: Request) -> Reply | str:
        """Return the n samples of a request from n requests with consecutive seeds."""
        singles = [self._reply(client, single(request, sample)) for sample in range(request.n)]
        parts: list[Reply | str] = []
        for part in await asyncio.gather(*singles, return_exceptions=True):
            if isinstance(part, BaseException):
                raise part
            parts.append(part)
        if all(isinstance(part, str) for part in parts):
            return parts[0]
        samples = [Sample(None, "error", refusal=part) if isinstance(part, str) else part[0][0] for part in parts]
        counted = [part[1:] for part in parts if not isinstance(part, str)]
        return samples, known_sum(prompt for prompt, _ in counted), known_sum(generated for _, generated in counted)
