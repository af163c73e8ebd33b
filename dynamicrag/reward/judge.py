"""The LLM judge: five grades of 0 to 20 points from an OpenAI-compatible endpoint, summed to one number in [0, 1].

Calls are concurrent, retried with exponential backoff, and cached on disk by everything that determines the grade.
After three replies without readable grades, an answer is not sent again, because each reply costs money. A judge that
keeps failing causes an error that names the row, never a grade of 0. The key comes only from the environment
(JUDGE_API_KEY, or else OPENAI_API_KEY) and is never written; if a server repeats it in an error, it is removed.
"""

import asyncio
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from dynamicrag.llm import endpoint
from dynamicrag.llm.completion import Sample, read_sample
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
from dynamicrag.models.chat_templates import Messages
from dynamicrag.reward.grades import CRITERIA, POINTS, REPLY_FORMATS, JudgeUsage, UnreadableGrade, parse_grade
from dynamicrag.reward.judge_cache import GradeCache
from dynamicrag.stage import UserError, log

TIMEOUT_SECONDS = 60  # for a whole call, however slowly its bytes arrive
MAX_REPLIES = 3  # maximum paid replies per answer: unreadable replies are retried less often than a busy server
MAX_TOKENS = 1024  # the grades take about 50 tokens; a model that reasons first needs more
MAX_REASONING_TOKENS = 16384  # maximum after the limit was raised
_LIMITS = {"max_tokens", "max_completion_tokens"}  # the servers' names of this option
# At temperature 0 an unreadable reply would repeat (such as spaces up to MAX_TOKENS, which any JSON schema allows).
RETRY_TEMPERATURE = 0.7


class _CutOffReasoning(UnreadableGrade):
    """The judge's reply was cut off at `limit` tokens, during its reasoning."""

    def __init__(self, reason: str, limit: int):
        super().__init__(reason)
        self.limit = limit


class _LimitReached(Exception):
    """The limit of calls is reached."""


class Judge:
    """Grades answers. `usage` is the cost so far. At most `limit` calls are sent, including retries."""

    def __init__(
        self, base_url: str, model: str, cache: str | Path, concurrency: int = 16, limit: int | None = None, reply_format: str = "json_schema",
    ):
        """Raises UserError for a base URL with more than host and path, a key that is not printable ASCII, or an unusable cache."""
        self._secret = read_key("JUDGE_API_KEY", "OPENAI_API_KEY")
        self._base_url = check_url("--judge-base-url", base_url, "JUDGE_API_KEY")
        if concurrency < 1:
            raise UserError(f"--judge-concurrency: expected at least 1, found {concurrency}")
        self._model, self._concurrency = model, concurrency
        self._format_name, self._format = reply_format, REPLY_FORMATS[reply_format]
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
        self._limit, self._sent, self.usage = limit, 0, JudgeUsage()
        self._answered = False
        self._cache = GradeCache(cache)

    def grade(self, answers: Sequence[tuple[str, Messages]]) -> list[float]:
        """Return a grade in [0, 1] for each (row, prompt), in order. Equal prompts are graded once.

        Raises UserError for the first row that the judge refuses or keeps failing on, and if the limit is reached
        before all grades are known. Calls in progress are finished first, and all grades are cached.
        """
        keys = [self._key(messages) for _, messages in answers]
        prompts: dict[str, tuple[str, Messages]] = {}
        for key, answer in zip(keys, answers, strict=True):
            if key not in prompts and self._cache.get(key) is None:
                self._keep_earlier(key, answer[1])
            prompts.setdefault(key, answer)
        grades = {key: grade for key in prompts if (grade := self._cached(key)) is not None}
        missing = {key: answer for key, answer in prompts.items() if key not in grades}
        if missing:
            asyncio.run(self._grade_all(missing, grades))
        if len(grades) < len(prompts):
            raise UserError(
                f"--judge-limit: all {self._limit} calls are used; {len(grades)} distinct answers of this batch have cached grades, "
                f"{len(prompts) - len(grades)} have none; run again with a higher --judge-limit (cached grades cost nothing)"
            )
        return [grades[key] for key in keys]

    def _key(self, messages: Messages) -> str:
        """Return the cache key of everything that determines a grade.

        The judge is identified by model name, not by address.
        """
        return hashlib.sha256(orjson.dumps([self._model, messages, self._format, CRITERIA, POINTS])).hexdigest()

    def _keep_earlier(self, key: str, messages: Messages) -> None:
        """Copy a grade that an earlier version stored under a key with the address."""
        earlier = hashlib.sha256(orjson.dumps([self._base_url, self._model, messages, self._format, CRITERIA, POINTS])).hexdigest()
        if (grade := self._cache.get(earlier)) is not None:
            self._cache.put(key, grade)

    def _cached(self, key: str) -> float | None:
        grade = self._cache.get(key)
        self.usage.cached += grade is not None
        return grade

    async def _grade_all(self, missing: dict[str, tuple[str, Messages]], grades: dict[str, float]) -> None:
        """Add the missing grades. Raises the UserError of the first row that failed."""
        import openai
        from tqdm import tqdm

        # Counted before the body is read, because incomplete replies may cost too
        async def count_call(response) -> None:
            self.usage.calls += response.status_code == 200

        client = open_client(
            self._base_url, self._secret, TIMEOUT_SECONDS,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [count_call]}),
        )
        waiting = enumerate(missing.items())
        failures: dict[int, UserError] = {}

        async def work() -> None:
            for position, (key, (row, messages)) in waiting:
                if failures:
                    return
                try:
                    grade = self._cached(key)  # another process may have added it in the meantime
                    grades[key] = self._cache.put(key, await self._ask(client, row, messages)) if grade is None else grade
                except _LimitReached:
                    return
                except UserError as error:
                    failures[position] = error
                progress.update()

        async with client:
            with tqdm(total=len(missing), unit="answer", desc="judging") as progress:
                await asyncio.gather(*(work() for _ in range(min(self._concurrency, len(missing)))))
        if failures:
            raise failures[min(failures)]

    async def _ask(self, client, row: str, messages: Messages) -> float:
        """Return the grade, after at most ATTEMPTS calls and MAX_REPLIES replies. Raises UserError or _LimitReached."""
        import openai
        from tenacity import AsyncRetrying, retry_if_exception

        changed: dict[str, float] = {}
        unreadable = 0

        def gives_up(state) -> bool:
            return state.attempt_number >= endpoint.ATTEMPTS or unreadable >= MAX_REPLIES

        async def call() -> float:
            nonlocal changed, unreadable
            try:
                return await self._call(client, messages, changed)
            except UnreadableGrade as error:
                unreadable += 1
                if isinstance(error, _CutOffReasoning):
                    self._allow_more_tokens(error.limit)
                else:
                    changed = {"temperature": RETRY_TEMPERATURE}
                raise

        attempts = AsyncRetrying(retry=retry_if_exception(passes), stop=gives_up, wait=wait, reraise=True)
        try:
            return await attempts(call)
        except (openai.OpenAIError, UnreadableReply, OSError) as error:
            failure = self._explained(row, error, attempts.statistics["attempt_number"])
        raise failure  # raised here, so that the original error, which may contain the key, is not attached

    def _allow_more_tokens(self, limit: int) -> None:
        """Raise the token limit for the rest of the run, because the judge's reasoning does not fit, unless it was raised already."""
        [name] = _LIMITS & self._options.keys()
        if self._options[name] == limit < MAX_REASONING_TOKENS:
            self._options[name] = min(limit * 4, MAX_REASONING_TOKENS)
            log.warning("--judge-model %s: its reasoning is longer than %d tokens; the limit is now %d",
                        self._model, limit, self._options[name])

    async def _call(self, client, messages: Messages, changed: dict[str, float]) -> float:
        import openai

        if self._limit is not None and self._sent >= self._limit:
            raise _LimitReached
        self._sent += 1
        options: dict[str, Any] = {name: changed.get(name, value) for name, value in self._options.items()}
        if self._format:
            options["response_format"] = self._format
        reply = None
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                reply = await client.chat.completions.create(model=self._model, messages=messages, **options)
            prompt_tokens, generated_tokens = tokens_of(reply)
            self.usage.prompt_tokens += prompt_tokens or 0
            self.usage.generated_tokens += generated_tokens or 0
            [choice, *_] = reply.choices
            sample = Sample(usable(choice.message.content), choice.finish_reason, gave_reasoning(choice.message))
            self._answered = True
        except openai.BadRequestError as error:
            # OpenAI's newer models refuse temperature and rename max_tokens. The refused option is not sent again.
            if error.param not in ("temperature", "max_tokens") or error.param not in options or "unsupported" not in str(error.code):
                raise
            self._options.pop(error.param, None)
            if error.param == "max_tokens":
                self._options["max_completion_tokens"] = MAX_TOKENS
            return await self._call(client, messages, changed)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIResponseValidationError) as error:
            if not self._answered:
                refuse_foreign("--judge-base-url", self._base_url, error, reply, self._secret)
            # A reply with choices costs money. An error with status 200, or a gateway's page, is temporary.
            failure = UnreadableGrade if getattr(reply, "choices", None) else UnreadableReply
            raise failure(f"not a chat completion: {error!r}") from error
        [limit] = _LIMITS & options.keys()
        text, reason = read_sample(sample, options[limit])
        if reason and sample.finish_reason == "length" and (sample.reasoned or sample.text):
            raise _CutOffReasoning(reason, options[limit])
        if reason:
            raise UnreadableGrade(reason)
        return parse_grade(text)

    def _explained(self, row: str, error: Exception, calls: int) -> UserError:
        import openai

        advice = "the grades so far are cached: run again to continue"
        reason = reason_of(error, self._secret, TIMEOUT_SECONDS)
        malformed = isinstance(error, openai.APIStatusError) and error.status_code in (400, 422)
        if malformed and self._format and re.search("format|schema|json", reason, re.IGNORECASE):
            others = " or ".join(name for name in REPLY_FORMATS if name != self._format_name)
            advice = f"if the server does not support response_format {self._format_name}, try --judge-format {others}"
        how = f"failed {calls} times" if passes(error) else "refused"
        return UserError(f"row {row}: the judge {self._model} {how}: {reason}; {advice}")

