"""Calls to an OpenAI-compatible server, with retries, and without the options that the server refuses."""

import asyncio

from dynamicrag.llm import endpoint
from dynamicrag.llm.completion import Request
from dynamicrag.llm.completion_cache import Reply
from dynamicrag.llm.endpoint import UnreadableReply, passes, reason_of, refuse_foreign, wait
from dynamicrag.llm.replies import constrained, cut, read_reply
from dynamicrag.llm.server_options import CONSTRAINTS, ServerOptions, refused_option
from dynamicrag.stage import UserError

CONCURRENCY = 64
CALL_SECONDS = 600
RETRY_SECONDS = 180  # minimum time to wait for a server that has answered before
MAX_TIMEOUTS = 3
MAX_REFUSED = 20  # if the first 20 requests are refused, their content is not the reason
# Statuses that concern one request. Every other status below 500 concerns all requests.
OWN_FAULT = (400, 413, 422, 451)


class ServerCalls:
    """The calls of one run. After `failed` is set, no call is tried again."""

    def __init__(self, url: str, key: str, model: str, options: ServerOptions):
        self._url, self._key, self._model, self._options = url, key, model, options
        self._answered = self._refused = 0
        self.begin()

    def begin(self) -> None:
        """Begin a batch of requests, in the event loop that runs it."""
        self.failed = False
        self._slots = asyncio.Semaphore(CONCURRENCY)

    async def ask(self, client, request: Request) -> Reply | str:
        """Return the reply to one call, with retries. Raises UserError."""
        from tenacity import AsyncRetrying, retry_if_exception

        def gives_up(state) -> bool:
            if state.attempt_number > 1:
                self._options.say("busy", f"does not answer ({self._reason(state.outcome.exception())}); trying again")
            if _timed_out(state.outcome.exception()):  # each attempt took CALL_SECONDS
                return self.failed or state.attempt_number >= min(MAX_TIMEOUTS, endpoint.ATTEMPTS)
            patient = self._answered and state.seconds_since_start < RETRY_SECONDS
            return self.failed or (state.attempt_number >= endpoint.ATTEMPTS and not patient)

        attempts = AsyncRetrying(retry=retry_if_exception(passes), stop=gives_up, wait=wait, reraise=True)
        try:
            reply = await attempts(self._call, client, request)
        except Exception as error:
            if not passes(error) and not isinstance(error, _status_error()):
                raise
            status = getattr(error, "status_code", 500)
            reason = self._reason(error)
            # If the server answers another request, the error concerns this request only.
            if status >= 500 and not self.failed and not _unreachable(error) and await self._is_up(client):
                return f"the server failed at it, and not at others: {reason}"
            raise UserError(f"{self._url}: {self._model}: {reason}; {self._advice(status)}") from error
        if isinstance(reply, str):
            self._refused += 1
            if not self._answered and self._refused >= MAX_REFUSED:
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
        """Return the reply to one call, without unsupported options, or the reason why the server refuses the request."""
        import openai

        while True:
            options, extra = self._options.of(request)
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
                self._options.learn(option, self._reason(error))
                continue
            except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIResponseValidationError) as error:
                raise self._unreadable(error) from error
            try:
                read = read_reply(reply, request)
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                raise self._unreadable(error, reply) from error
            if not self._options.takes("stop"):
                read = [cut(sample, request.stop) for sample in read[0]], *read[1:]
            if None in read[1:]:
                self._options.say("usage", "does not report the tokens of a reply: tables omit them")
            if request.pattern and not constrained(read, request.pattern):
                [form] = extra.keys() & CONSTRAINTS.keys()
                self._options.learn_constraint(form)
            return read

    def _reason(self, error: BaseException) -> str:
        return reason_of(error, self._key, CALL_SECONDS)

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "check the key in OPENAI_API_KEY"
        if status == 404:
            return "check --api-base and --llm-model"
        return "replies are stored: run the same command again to continue"


def _status_error() -> type[Exception]:
    import openai

    return openai.APIStatusError


def _timed_out(error: BaseException) -> bool:
    import openai

    return isinstance(error, TimeoutError | openai.APITimeoutError)


def _unreachable(error: BaseException) -> bool:
    import openai

    return isinstance(error, openai.APIConnectionError) and not _timed_out(error)
