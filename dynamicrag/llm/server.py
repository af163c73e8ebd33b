"""Any OpenAI-compatible server as an engine: what it refuses is left out, and what was answered is kept.

Servers differ in what they take. Each first request of a kind goes ahead alone, and what it teaches about the server is
said once and holds for the run: another name of max_tokens, another field of a constraint, no seed, no n, no temperature.
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
RETRY_SECONDS = 180  # a server that has answered before is waited for as long as this at least
MOST_TIMEOUTS = 3
MOST_REFUSED = 20  # requests refused before one is answered: it is not their content then
# What is wrong with one request; every other status below 500 is wrong with all.
OWN_FAULT = (400, 413, 422, 451)
TOO_LONG = re.compile(r"context.?(length|window|size)|too (long|large|many tokens)|maximum.{0,40}tokens|reduce the length", re.IGNORECASE | re.DOTALL)
NOT_TAKEN = re.compile(
    r"unsupported|not support|n't support|only support|unrecogni[sz]ed|unknown|unexpected|extra|not (permitted|allowed|available|implemented|enabled|valid|accepted)"
    r"|forbidden|strictly positive|invalid (parameter|argument|field)|only the default|deprecated|use '?max_completion_tokens|must be 1|removed|disabled",
    re.IGNORECASE,
)
# The fields in which servers take a regular expression, newest first.
CONSTRAINTS = {"structured_outputs": lambda pattern: {"regex": pattern}, "guided_regex": lambda pattern: pattern}
# An answer that the request begins, as vLLM's server has it.
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
LEARNT = {
    "seed": "takes no seed: another run may write something else",
    "n": "gives one sample a request: the samples of a question are asked for one by one, and its prompt is paid for each time",
    "temperature": "takes no temperature: its own is used, and neither selections nor answers are greedy",
    "top_p": "takes no top_p: its own is used",
    "max_tokens": "takes max_completion_tokens, not max_tokens",
    "stop": "takes no stop strings: its texts are cut at them, and what follows them is paid for",
    "structured_outputs": "does not take structured_outputs: guided_regex is tried; if its selections cannot be read, give --constrain-ids off",
    "chat_template_kwargs": "takes no chat_template_kwargs: --enable-thinking has no effect",
}


def refused_option(error, sent: dict[str, object]) -> str | None:
    """The option among those sent that a server says it does not take; None if it refuses the request for another reason."""
    said = str(error.body if error.body is not None else error)
    if error.param in ("messages", "prompt") or TOO_LONG.search(said) or "content_filter" in str(error.code) or not (NOT_TAKEN.search(said) or "unsupported" in str(error.code)):
        return None
    if error.param in sent:
        return error.param
    named = {}
    for name in sent:
        # n is a letter as well as an option.
        form = r"(?:['\"`]n['\"`]|\bn\s*(?:=|>|must|is not)|(?:parameter|argument|field)s?(?: supplied)?:? n\b)" if name == "n" else rf"\b{name}\b"
        if found := re.search(form, said):
            named[name] = found.start()
    return min(named, key=named.get, default=None)


class ApiEngine:
    """Any OpenAI-compatible server, called concurrently. The key comes from OPENAI_API_KEY alone."""

    def __init__(self, base_url: str, model: str, thinking: str | None = None):
        """Raises UserError for a base URL with more than host, path and api-version, and for a key no header can hold."""
        self._url = check_url("--api-base", base_url, "OPENAI_API_KEY")
        self._key = read_key("OPENAI_API_KEY")
        self._model, self._thinking = model, thinking
        self._cache: CompletionCache | None = None
        self._tried: set[tuple[bool, bool]] = set()
        self._said: set[str] = set()
        # What this run has learnt about the server.
        self._limit_name = "max_tokens"
        self._constraints = list(CONSTRAINTS)
        self._not_taken: set[str] = set()
        self._opens_reasoning = False
        self._answered = self._refused = 0
        self._failed = False

    def keep_in(self, cache: CompletionCache | None) -> None:
        """Keep every reply in `cache`, and take from there what it has."""
        self._cache = cache

    def fits(self, messages: Messages, max_tokens: int) -> bool:
        """The server's window is not known here: a request that it refuses as too long is a completion without a text."""
        return True

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Run all requests, at most CONCURRENCY at a time, in order.

        A request that the server refuses (its content, its length) is a completion without a text, and the reason. Raises
        UserError for what is wrong with every request (a key, a model, a server that does not answer), after those begun.
        """
        replies: list[Reply | str | None] = [self._kept(request) for request in requests]
        if None in replies:
            if any(prefix_of(request.messages) for request in requests):
                self._say("prefix", "is asked to continue the beginning that --prompts gives its answers (continue_final_message): a server that "
                                    "does not know this, as OpenAI's own, answers after it, and scores may suffer")
            asyncio.run(self._ask_all(requests, replies))
        completions = []
        for request, reply in zip(requests, replies, strict=True):
            if not isinstance(reply, str) and not leaves_open(prefix_of(request.messages)):
                self._opens_reasoning |= any(opens_itself(sample.text or "") for sample in reply[0])
        for request, reply in zip(requests, replies, strict=True):
            completions.append(refused(request, reply) if isinstance(reply, str) else self._read(request, *reply))
        return completions

    def _read(self, request: Request, samples: list[Sample], prompt_tokens: int | None, generated_tokens: int | None) -> Completion:
        # Where the template opens the reasoning, what is cut off before its end shows no tag at all.
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
        """Put a reply, or the reason why there is none, in place of each None. Raises the UserError of the first that failed."""
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
        """The reply to a request, kept on disk; a reason if the server refuses it."""
        kept = self._kept(request)
        if kept:
            return kept
        if request.n > 1 and "n" in self._not_taken:
            return await self._one_by_one(client, request)
        reply = await self._ask(client, request)
        if isinstance(reply, str):
            return reply
        if len(reply[0]) < request.n:  # it has ignored n
            self._learn("n")
            self._keep(_single(request, 0), (reply[0][:1], *reply[1:]))
            return await self._one_by_one(client, request)
        self._keep(request, reply)
        return reply

    async def _one_by_one(self, client, request: Request) -> Reply | str:
        """The n samples of a request by a request each, with the seeds that follow one another."""
        singles = [self._reply(client, _single(request, sample)) for sample in range(request.n)]
        parts = await asyncio.gather(*singles, return_exceptions=True)
        if failure := next((part for part in parts if isinstance(part, BaseException)), None):
            raise failure
        if all(isinstance(part, str) for part in parts):
            return parts[0]
        samples = [Sample(None, "error", refusal=part) if isinstance(part, str) else part[0][0] for part in parts]
        counted = [part[1:] for part in parts if not isinstance(part, str)]
        return samples, known_sum(prompt for prompt, _ in counted), known_sum(generated for _, generated in counted)

    async def _ask(self, client, request: Request) -> Reply | str:
        """The reply to one call, after as many tries as it takes. Raises UserError."""
        from tenacity import AsyncRetrying, retry_if_exception

        def gives_up(state) -> bool:
            if state.attempt_number > 1:
                self._say("busy", f"does not answer ({self._reason(state.outcome.exception())}); trying again")
            if _timed_out(state.outcome.exception()):  # each of them has taken CALL_SECONDS
                return self._failed or state.attempt_number >= min(MOST_TIMEOUTS, endpoint.ATTEMPTS)
            patient = self._answered and state.seconds_since_start < RETRY_SECONDS
            return self._failed or (state.attempt_number >= endpoint.ATTEMPTS and not patient)

        try:
            async for attempt in AsyncRetrying(retry=retry_if_exception(passes), stop=gives_up, wait=wait, reraise=True):
                with attempt:
                    reply = await self._call(client, request)
        except Exception as error:
            if not passes(error) and not isinstance(error, _status_error()):
                raise
            status = getattr(error, "status_code", 500)
            reason = self._reason(error)
            # What fails while another is answered is this request's own.
            if status >= 500 and not self._failed and not _unreachable(error) and await self._is_up(client):
                return f"the server failed at it, and not at others: {reason}"
            raise UserError(f"{self._url}: {self._model}: {reason}; {self._advice(status)}") from error
        if isinstance(reply, str):
            self._refused += 1
            if not self._answered and self._refused >= MOST_REFUSED:
                raise UserError(f"{self._url}: {self._model}: the first {self._refused} requests were all refused; the last: {reply}")
        else:
            self._answered += 1
        return reply

    async def _is_up(self, client) -> bool:
        """Whether the server answers the shortest of questions."""
        import openai

        try:
            await self._call(client, Request([{"role": "user", "content": "Write yes."}], seed=0, max_tokens=16))
        except (openai.OpenAIError, UnreadableReply, OSError, UserError):
            return False
        return True

    def _unreadable(self, error: BaseException, reply: object = None) -> UnreadableReply:
        """The error of a reply with status 200 that cannot be read. Raises UserError if the first one is no answer of a server at all."""
        if not self._answered:
            refuse_foreign("--api-base", self._url, error, reply, self._key)
        said = getattr(reply, "error", None)  # some servers send their errors with status 200
        return UnreadableReply(f"its reply is no chat completion ({error}){f': {said}' if said else ''}")

    async def _call(self, client, request: Request) -> Reply | str:
        """The reply to one call, without the options that the server does not take; a reason if it refuses the request."""
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
                self._say("usage", "does not say how many tokens a reply costs: tables leave them out")
            if request.pattern and not _constrained(read, request.pattern):
                [form] = extra.keys() & CONSTRAINTS.keys()
                if form != self._constraints[-1]:
                    self._learn(form)  # what it has written is paid for, and kept
                else:
                    self._say("pattern", "does not hold its selections to the identifiers of the documents shown (--constrain-ids); "
                                         "one that cannot be read goes to the remaining rows")
            return read

    def _options(self, request: Request) -> tuple[dict[str, object], dict[str, object]]:
        """The options of a call that are OpenAI's, and the others. Raises UserError if the server can hold no output to a pattern."""
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
        return tuple({name: value for name, value in some.items() if name not in self._not_taken} for some in (options, extra))

    # ---------------------------------------------------------------- what is learnt, and said

    def _learn(self, option: str, reason: str = "") -> None:
        """Leave an option out from now on. Raises UserError if there is nothing in its place."""
        if option in CONTINUE:
            raise UserError(f"{self._url}: {self._model}: cannot continue an answer that has begun ({reason}); leave prefix out of --prompts")
        if option == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif option in CONSTRAINTS:
            if self._constraints == [option]:
                raise UserError(f"{self._url}: {self._model}: cannot hold its output to a pattern ({reason}); give --constrain-ids off")
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
        return "what it has answered is kept: run the same command again to continue"


def _single(request: Request, sample: int) -> Request:
    """One of the samples of a request, as a request of its own."""
    return replace(request, n=1, seed=(request.seed + sample) & 0x7FFFFFFF)


def _read_reply(reply, request: Request) -> Reply:
    """What a chat completion says. Raises almost anything for something else."""
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
    """Whether every text that has ended is as the pattern asks."""
    texts = [after_reasoning(sample.text or "") for sample in reply[0] if sample.finish_reason == "stop"]
    return all(not text or re.fullmatch(pattern, text) for text in texts)


def _cut(sample: Sample, stop: tuple[str, ...]) -> Sample:
    """A sample up to the first of the texts that end it."""
    ends = [at for text in stop if (at := (sample.text or "").find(text)) >= 0]
    return replace(sample, text=sample.text[: min(ends)], finish_reason="stop") if ends else sample


def _status_error() -> type[Exception]:
    import openai

    return openai.APIStatusError


def _timed_out(error: BaseException) -> bool:
    import openai

    return isinstance(error, TimeoutError | openai.APITimeoutError)


def _unreachable(error: BaseException) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError) and not _timed_out(error)
