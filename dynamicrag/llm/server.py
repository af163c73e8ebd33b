"""Any OpenAI-compatible server as an engine. Requests that it refuses are left unanswered, and every reply is stored.

Servers differ in the options they support. The first request of each kind is sent alone. What it shows about the server
(another name of max_tokens, another field for constraints, no seed, no n, no temperature) is logged once and used for
the rest of the run.
"""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace

from dynamicrag.llm import endpoint
from dynamicrag.llm.completion import (
    CLOSES,
    Completion,
    Request,
    Sample,
    after_reasoning,
    completion_of,
    known_sum,
    leaves_open,
    opens_itself,
    refused,
)
from dynamicrag.llm.completion_cache import CompletionCache, Reply, key_of
from dynamicrag.llm.endpoint import (
    UnreadableReply,
    check_url,
    gave_reasoning,
    open_client,
    passes,
    read_key,
    reason_of,
    refuse_foreign,
    tokens_of,
    usable,
    wait,
)
from dynamicrag.llm.prompts import prefix_of
from dynamicrag.models.chat_templates import Messages
from dynamicrag.stage import UserError, log

CONCURRENCY = 64
CALL_SECONDS = 600
RETRY_SECONDS = 180  # minimum time to wait for a server that has answered before
MOST_TIMEOUTS = 3
MOST_REFUSED = 20  # if the first 20 requests are refused, their content is not the reason
# Statuses that concern one request. Every other status below 500 concerns all requests.
OWN_FAULT = (400, 413, 422, 451)
TOO_LONG = re.compile(r"context.?(length|window|size)|too (long|large|many tokens)|maximum.{0,40}tokens|reduce the length", re.IGNORECASE | re.DOTALL)
NOT_TAKEN = re.compile(
    r"unsupported|not support|n't support|only support|unrecogni[sz]ed|unknown|unexpected|extra|not (permitted|allowed|available|implemented|enabled|valid|accepted)"
    r"|forbidden|strictly positive|invalid (parameter|argument|field)|only the default|deprecated|use '?max_completion_tokens|must be 1|removed|disabled",
    re.IGNORECASE,
)
# Fields for a regular expression, newest first.
CONSTRAINTS = {"structured_outputs": lambda pattern: {"regex": pattern}, "guided_regex": lambda pattern: pattern}
# Options of vLLM's server to continue an answer that the request begins.
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
LEARNT = {
    "seed": "does not support seed: another run may give other results",
    "n": "returns one sample per request: the samples of a question are requested one by one, and each is charged for "
         "the prompt",
    "temperature": "does not support temperature: its default is used, and neither selections nor answers are greedy",
    "top_p": "does not support top_p: its default is used",
    "max_tokens": "requires max_completion_tokens instead of max_tokens",
    "stop": "does not support stop: texts are cut at the stop strings afterwards, and the rest is charged",
    "structured_outputs": "does not support structured_outputs: guided_regex is tried; if selections cannot be read, "
                          "give --constrain-ids off",
    "chat_template_kwargs": "does not support chat_template_kwargs: --enable-thinking has no effect",
}


def refused_option(error, sent: dict[str, object]) -> str | None:
    """Return which of the options in `sent` the server refuses to accept; None if it refuses the request for another
    reason.
    """
    said = str(error.body if error.body is not None else error)
    if error.param in ("messages", "prompt") or TOO_LONG.search(said) or "content_filter" in str(error.code) or not (NOT_TAKEN.search(said) or "unsupported" in str(error.code)):
        return None
    if error.param in sent:
        return error.param
    named: dict[str, int] = {}
    for name in sent:
        # n is an option, but also an ordinary letter.
        form = r"(?:['\"`]n['\"`]|\bn\s*(?:=|>|must|is not)|(?:parameter|argument|field)s?(?: supplied)?:? n\b)" if name == "n" else rf"\b{name}\b"
        if match := re.search(form, said):
            named[name] = match.start()
    return min(named, key=lambda name: named[name], default=None)


class ApiEngine:
    """Any OpenAI-compatible server, called concurrently. The key comes from OPENAI_API_KEY only."""

    def __init__(self, base_url: str, model: str, thinking: str | None = None):
        """Raises UserError if the URL has parts other than host, path and api-version, or the key is not printable
        ASCII.
        """
        self._url = check_url("--api-base", base_url, "OPENAI_API_KEY")
        self._key = read_key("OPENAI_API_KEY")
        self._model, self._thinking = model, thinking
        self._cache: CompletionCache | None = None
        self._tried: set[tuple[bool, bool]] = set()
        self._said: set[str] = set()
        # Properties of the server that this run has found out.
        self._limit_name = "max_tokens"
        self._constraints = list(CONSTRAINTS)
        self._not_taken: set[str] = set()
        self._opens_reasoning = False
        self._answered = self._refused = 0
        self._failed = False

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
                self._say("prefix", "is asked to continue the beginning of the answer that --prompts gives "
                                    "(continue_final_message): a server without this option, such as OpenAI's, starts "
                                    "a new answer after it, which may lower the scores")
            asyncio.run(self._ask_all(requests, replies))
        answered = list(zip(requests, (reply for reply in replies if reply is not None), strict=True))
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
        self._failed = False
        self._slots = asyncio.Semaphore(CONCURRENCY)
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
                    self._failed = True
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
        if request.n > 1 and "n" in self._not_taken:
            return await self._one_by_one(client, request)
        reply = await self._ask(client, request)
        if isinstance(reply, str):
            return reply
        if len(reply[0]) < request.n:  # the server ignores n
            self._learn("n")
            self._keep(_single(request, 0), (reply[0][:1], *reply[1:]))
            return await self._one_by_one(client, request)
        self._keep(request, reply)
        return reply

    async def _one_by_one(self, client, request: Request) -> Reply | str:
        """Return the n samples of a request from n requests with consecutive seeds."""
        singles = [self._reply(client, _single(request, sample)) for sample in range(request.n)]
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

    async def _ask(self, client, request: Request) -> Reply | str:
        """Return the reply to one call, with retries. Raises UserError."""
        from tenacity import AsyncRetrying, retry_if_exception

        def gives_up(state) -> bool:
            if state.attempt_number > 1:
                self._say("busy", f"does not answer ({self._reason(state.outcome.exception())}); trying again")
            if _timed_out(state.outcome.exception()):  # each attempt took CALL_SECONDS
                return self._failed or state.attempt_number >= min(MOST_TIMEOUTS, endpoint.ATTEMPTS)
            patient = self._answered and state.seconds_since_start < RETRY_SECONDS
            return self._failed or (state.attempt_number >= endpoint.ATTEMPTS and not patient)

        attempts = AsyncRetrying(retry=retry_if_exception(passes), stop=gives_up, wait=wait, reraise=True)
        try:
            reply = await attempts(self._call, client, request)
        except Exception as error:
            if not passes(error) and not isinstance(error, _status_error()):
                raise
            status = getattr(error, "status_code", 500)
            reason = self._reason(error)
            # If the server answers another request, the error concerns this request only.
            if status >= 500 and not self._failed and not _unreachable(error) and await self._is_up(client):
                return f"the server failed at it, and not at others: {reason}"
            raise UserError(f"{self._url}: {self._model}: {reason}; {self._advice(status)}") from error
        if isinstance(reply, str):
            self._refused += 1
            if not self._answered and self._refused >= MOST_REFUSED:
                raise UserError(f"{self._url}: {self._model}: all of the first {self._refused} requests were refused, "
                                f"the last with: {reply}; check the server and --llm-model")
        else:
            self._answered += 1
        return reply

    async def _is_up(self, client) -> bool:
        """Return whether the server answers a very short request."""
        import openai

        try:
            await self._call(client, Request([{"role": "user", "content": "Write yes."}], seed=0, max_tokens=16))
        except (openai.OpenAIError, UnreadableReply, OSError, UserError):
            return False
        return True

    def _unreadable(self, error: BaseException, reply: object = None) -> UnreadableReply:
        """Return the error for an unreadable reply with status 200.

        Raises UserError if the first reply is not from a chat server.
        """
        if not self._answered:
            refuse_foreign("--api-base", self._url, error, reply, self._key)
        said = getattr(reply, "error", None)  # some servers send errors with status 200
        return UnreadableReply(f"the reply is not a chat completion ({error}){f': {said}' if said else ''}")

    async def _call(self, client, request: Request) -> Reply | str:
        """Return the reply to one call, without unsupported options, or the reason why the server refuses the request.
        """
        import openai

        while True:
            options, extra = self._options(request)
            try:
                async with self._slots, asyncio.timeout(CALL_SECONDS):
                    reply = await client.chat.completions.create(
                        model=self._model, messages=request.messages, extra_body=extra or None, **options
                    )
            except openai.APIStatusError as error:
                if error.status_code not in OWN_FAULT or error.code in ("model_not_found", "invalid_api_key"):
                    raise
                option = refused_option(error, options | extra)
                if option is None or option == "max_completion_tokens":
                    return f"refused by the server: {self._reason(error)}"
                self._learn(option, self._reason(error))
                continue
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIResponseValidationError) as error:
                raise self._unreadable(error) from error
            try:
                read = _read_reply(reply, request)
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise self._unreadable(error, reply) from error
            if "stop" in self._not_taken:
                read = [_cut(sample, request.stop) for sample in read[0]], *read[1:]
            if None in read[1:]:
                self._say("usage", "does not report the tokens of a reply: tables omit them")
            if request.pattern and not _constrained(read, request.pattern):
                [form] = extra.keys() & CONSTRAINTS.keys()
                if form != self._constraints[-1]:
                    self._learn(form)  # the reply was paid for and is kept
                else:
                    self._say("pattern", "does not restrict selections to the identifiers of the documents shown "
                                         "(--constrain-ids): rows whose selection cannot be read go to the remaining "
                                         "rows")
            return read

    def _options(self, request: Request) -> tuple[dict[str, object], dict[str, object]]:
        """Return the OpenAI options of a call and the extra options."""
        options: dict[str, object] = {self._limit_name: request.max_tokens, "temperature": request.temperature, "seed": request.seed}
        if request.top_p != 1:
            options["top_p"] = request.top_p
        if request.n > 1:
            options["n"] = request.n
        extra: dict[str, object] = {}
        if request.pattern:
            extra[self._constraints[0]] = CONSTRAINTS[self._constraints[0]](request.pattern)
        if request.stop:
            options["stop"] = list(request.stop)
        if prefix_of(request.messages):
            extra |= CONTINUE
        if self._thinking:
            extra["chat_template_kwargs"] = {"enable_thinking": self._thinking == "on"}
        return self._taken(options), self._taken(extra)

    def _taken(self, options: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in options.items() if name not in self._not_taken}

    # ---------------------------------------------------------------- unsupported options

    def _learn(self, option: str, reason: str = "") -> None:
        """Omit or replace an option from now on. Raises UserError if it cannot be omitted or replaced."""
        if option in CONTINUE:
            raise UserError(f"{self._url}: {self._model}: cannot continue a given beginning of the answer ({reason}); "
                            "remove prefix from --prompts")
        if option == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif option in CONSTRAINTS:
            if self._constraints == [option]:
                raise UserError(f"{self._url}: {self._model}: cannot restrict its output to a pattern ({reason}); "
                                "give --constrain-ids off")
            self._constraints = [form for form in self._constraints if form != option]
        else:
            self._not_taken.add(option)
        self._say(option, LEARNT[option])

    def _say(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("%s: %s %s", self._url, self._model, message)

    def _reason(self, error: BaseException) -> str:
        return reason_of(error, self._key, CALL_SECONDS)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "check the key in OPENAI_API_KEY"
        if status == 404:
            return "check --api-base and --llm-model"
        return "replies are stored: run the same command again to continue"


def _single(request: Request, sample: int) -> Request:
    """Return one sample of a request as its own request."""
    return replace(request, n=1, seed=(request.seed + sample) & 0x7FFFFFFF)


def _read_reply(reply, request: Request) -> Reply:
    """Convert a chat completion to a Reply. Malformed completions raise almost any exception."""
    samples = []
    for choice in reply.choices[: request.n]:
        message = choice.message
        refusal = getattr(message, "refusal", None)
        finish = choice.finish_reason if isinstance(choice.finish_reason, str) else None
        samples.append(Sample(usable(message.content), finish, gave_reasoning(message), f"the model declined: {refusal}" if refusal else None))
    if not samples:
        raise UnreadableReply("it has no choices")
    return samples, *tokens_of(reply)


def _constrained(reply: Reply, pattern: str) -> bool:
    """Return whether every text that ended by itself matches the pattern."""
    texts = [after_reasoning(sample.text or "") for sample in reply[0] if sample.finish_reason == "stop"]
    return all(not text or re.fullmatch(pattern, text) for text in texts)


def _cut(sample: Sample, stop: tuple[str, ...]) -> Sample:
    """Cut a sample at the first of the `stop` texts."""
    whole = sample.text or ""
    ends = [at for text in stop if (at := whole.find(text)) >= 0]
    return replace(sample, text=whole[: min(ends)], finish_reason="stop") if ends else sample


def _status_error() -> type[Exception]:
    import openai

    return openai.APIStatusError


def _timed_out(error: BaseException) -> bool:
    import openai

    return isinstance(error, TimeoutError | openai.APITimeoutError)


def _unreachable(error: BaseException) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError) and not _timed_out(error)
