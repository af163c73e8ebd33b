"""The LLM judge: five grades of 0 to 20 points from any OpenAI-compatible endpoint, as one number in [0, 1].

Calls are concurrent, retried with exponential backoff and cached on disk by what decides the grade. An answer is not asked
about again after three replies that cannot be read as grades: they are paid for. A judge that keeps failing is an error
that names the row, never a grade of 0. The key comes from the environment (JUDGE_API_KEY, else OPENAI_API_KEY) alone and is
written nowhere; if a server repeats it, it is taken out of the error.
"""

import asyncio
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from dynamicrag.reward.grades import CRITERIA, POINTS, REPLY_FORMATS, UnreadableGrade, parse_grade
from dynamicrag.reward.judge_cache import GradeCache
from dynamicrag.stage import UserError, log

TIMEOUT_SECONDS = 60  # for the whole of a call, however its bytes trickle
MOST_REPLIES = 3  # paid for one answer: a judge whose replies cannot be read is not asked as often as one that is busy
MAX_TOKENS = 1024  # the grades are about 50; a model that reasons first needs more
MAX_REASONING_TOKENS = 16384  # what it may get in the end
_LIMITS = {"max_tokens", "max_completion_tokens"}  # the names servers have for it
# What cannot be read (spaces up to MAX_TOKENS, say, which any JSON schema allows) comes back the same at temperature 0.
RETRY_TEMPERATURE = 0.7


class _CutOffReasoning(UnreadableGrade):
    """The judge's reply ended at `limit` tokens while it was reasoning."""

    def __init__(self, reason: str, limit: int):
        super().__init__(reason)
        self.limit = limit


class _LimitReached(Exception):
    """No further call may be sent."""


@dataclass
class JudgeUsage:
    """Calls answered with HTTP 200, readable or not, prompts found in the cache, and tokens where the replies give them."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def counts(self) -> dict[str, int | None]:
        """All of it; the tokens are None if no reply gave them."""
        tokens = ("prompt_tokens", "generated_tokens")
        return {name: None if name in tokens and self.calls and not value else value for name, value in vars(self).items()}


class Judge:
    """Grades answers. `usage` is what that has cost so far; at most `limit` calls are sent, retries included."""

    def __init__(
        self, base_url: str, model: str, cache: str | Path, concurrency: int = 16, limit: int | None = None, reply_format: str = "json_schema",
    ):
        """Raises UserError for a base URL with more than host and path, a key no header can hold, or an unusable cache."""
        self._secret = read_key("JUDGE_API_KEY", "OPENAI_API_KEY")
        self._base_url = check_url("--judge-base-url", base_url, "JUDGE_API_KEY")
        if concurrency < 1:
            raise UserError(f"--judge-concurrency: expected at least 1, got {concurrency}")
        self._model, self._concurrency = model, concurrency
        self._format_name, self._format = reply_format, REPLY_FORMATS[reply_format]
        self._options = {"temperature": 0, "max_tokens": MAX_TOKENS}
        self._limit, self._sent, self.usage = limit, 0, JudgeUsage()
        self._answered = False
        self._cache = GradeCache(cache)

    def grade(self, answers: Sequence[tuple[str, Messages]]) -> list[float]:
        """A grade in [0, 1] for the prompt of each (row, prompt), in order; equal prompts are graded once.

        Raises UserError for the first row at which the judge refuses or keeps failing, and where the limit leaves grades
        missing. Rows that were begun are finished before, and what was graded is cached.
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
                f"--judge-limit: all {self._limit} calls are used up; {len(grades)} distinct answers of this batch are graded and cached, "
                f"{len(prompts) - len(grades)} are missing. Run again with a higher --judge-limit: cached grades cost nothing"
            )
        return [grades[key] for key in keys]

    def _key(self, messages: Messages) -> str:
        """Of what decides a grade: the judge by its model's name, not by where it listens, which changes with every cluster job."""
        return hashlib.sha256(orjson.dumps([self._model, messages, self._format, CRITERIA, POINTS])).hexdigest()

    def _keep_earlier(self, key: str, messages: Messages) -> None:
        """Keep a grade under its key that an earlier version kept under one with the address: it was paid for."""
        earlier = hashlib.sha256(orjson.dumps([self._base_url, self._model, messages, self._format, CRITERIA, POINTS])).hexdigest()
        if (grade := self._cache.get(earlier)) is not None:
            self._cache.put(key, grade)

    def _cached(self, key: str) -> float | None:
        grade = self._cache.get(key)
        self.usage.cached += grade is not None
        return grade

    async def _grade_all(self, missing: dict[str, tuple[str, Messages]], grades: dict[str, float]) -> None:
        """Adds the missing grades. Raises the UserError of the first row that failed."""
        import openai
        from tqdm import tqdm

        async def count_call(response) -> None:  # before the body is read: one that is cut off may be paid for too
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
                    grade = self._cached(key)  # by another process, since grade() looked
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
        """The grade, after up to ATTEMPTS calls, MOST_REPLIES of which may give a reply. Raises UserError, or _LimitReached."""
        import openai
        from tenacity import AsyncRetrying, retry_if_exception

        changed, unreadable = {}, 0

        def gives_up(state) -> bool:
            return state.attempt_number >= endpoint.ATTEMPTS or unreadable >= MOST_REPLIES

        try:
            async for attempt in AsyncRetrying(retry=retry_if_exception(passes), stop=gives_up, wait=wait, reraise=True):
                with attempt:
                    try:
                        return await self._call(client, messages, changed)
                    except UnreadableGrade as error:
                        unreadable += 1
                        if isinstance(error, _CutOffReasoning):
                            self._allow_more_tokens(error.limit)
                        else:
                            changed = {"temperature": RETRY_TEMPERATURE}
                        raise
        except (openai.OpenAIError, UnreadableReply, OSError) as error:
            failure = self._explained(row, error, attempt.retry_state.attempt_number)
        raise failure  # here, so that the error, which may repeat the key, is no part of it

    def _allow_more_tokens(self, limit: int) -> None:
        """Raise the limit for the rest of the run, unless another call has done so: what this judge reasons does not fit."""
        [name] = _LIMITS & self._options.keys()
        if self._options[name] == limit < MAX_REASONING_TOKENS:
            self._options[name] = min(limit * 4, MAX_REASONING_TOKENS)
            log.warning("the judge %s reasons for more than %d tokens; it may now write %d", self._model, limit, self._options[name])

    async def _call(self, client, messages: Messages, changed: dict[str, float]) -> float:
        import openai

        if self._limit is not None and self._sent >= self._limit:
            raise _LimitReached
        self._sent += 1
        options = {name: changed.get(name, value) for name, value in self._options.items()}
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
            # OpenAI's newer models refuse a temperature and have another name for max_tokens: neither is sent again.
            if error.param not in ("temperature", "max_tokens") or error.param not in options or "unsupported" not in str(error.code):
                raise
            self._options.pop(error.param, None)
            if error.param == "max_tokens":
                self._options["max_completion_tokens"] = MAX_TOKENS
            return await self._call(client, messages, changed)
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError, openai.APIResponseValidationError) as error:
            if not self._answered:
                refuse_foreign("--judge-base-url", self._base_url, error, reply, self._secret)
            # What has choices is paid for; an error that a server sends with status 200, or a gateway's page, passes.
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

        advice = "The grades so far are cached: run again to continue"
        reason = reason_of(error, self._secret, TIMEOUT_SECONDS)
        malformed = isinstance(error, openai.APIStatusError) and error.status_code in (400, 422)
        if malformed and self._format and re.search("format|schema|json", reason, re.IGNORECASE):
            others = " or ".join(name for name in REPLY_FORMATS if name != self._format_name)
            advice = f"If the endpoint cannot do response_format {self._format_name}, try --judge-format {others}"
        how = f"failed {calls} times" if passes(error) else "refused"
        return UserError(f"row {row}: the judge {self._model} {how}: {reason}. {advice}")

