"""The LLM judge: five grades of 0 to 20 points from any OpenAI-compatible endpoint, as one number in [0, 1].

Calls are concurrent, retried with exponential backoff and cached on disk by their content. A judge that keeps failing
is an error, never a grade of 0. The key comes from the environment (JUDGE_API_KEY, else OPENAI_API_KEY) alone and is
written nowhere.
"""

import asyncio
import hashlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import orjson

from dynamicrag.prompts import Messages
from dynamicrag.stage import UserError

CRITERIA = ("correctness", "completeness", "relevance", "support", "clarity")
POINTS = 20
ATTEMPTS = 6
TIMEOUT_SECONDS = 60
MAX_WAIT_SECONDS = 30
PASSING_STATUSES = (408, 409, 429)  # and all from 500


class UnreadableGrade(ValueError):
    """The judge's reply is not five numbers in range."""


def parse_grade(reply: str) -> float:
    """Five grades of 0 to 20 as their sum over 100. Raises UnreadableGrade."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        grades = orjson.loads(reply[start : end + 1])
        points = [grades[criterion] for criterion in CRITERIA]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UnreadableGrade(f"not a JSON object with {', '.join(CRITERIA)}: {reply[:200]!r}") from error
    for criterion, value in zip(CRITERIA, points, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= POINTS:
            raise UnreadableGrade(f"{criterion} is {value!r}, expected a number from 0 to {POINTS}")
    return sum(points) / (POINTS * len(CRITERIA))


class Judge:
    """Grades answers; `calls` counts those that were not in the cache."""

    def __init__(self, base_url: str, model: str, cache: str | Path, concurrency: int = 16):
        self._base_url, self._model, self._concurrency = base_url, model, concurrency
        self.calls = 0
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        self._cache = sqlite3.connect(cache)
        self._cache.execute("CREATE TABLE IF NOT EXISTS grades (key TEXT PRIMARY KEY, grade REAL NOT NULL, reply TEXT NOT NULL)")

    def grade(self, prompts: Sequence[Messages]) -> list[float]:
        """A grade in [0, 1] for each prompt, equal prompts graded once. Raises UserError where the judge keeps failing."""
        keys = [self._key(messages) for messages in prompts]
        missing = {key: messages for key, messages in zip(keys, prompts, strict=True) if self._cached(key) is None}
        if missing:
            asyncio.run(self._grade_all(missing))
        return [self._cached(key) for key in keys]

    def _key(self, messages: Messages) -> str:
        return hashlib.sha256(orjson.dumps([self._base_url, self._model, messages])).hexdigest()

    def _cached(self, key: str) -> float | None:
        found = self._cache.execute("SELECT grade FROM grades WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    async def _grade_all(self, missing: dict[str, Messages]) -> None:
        import openai
        from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential
        from tqdm.asyncio import tqdm

        def passes(error: BaseException) -> bool:
            if isinstance(error, openai.APIStatusError):
                return error.status_code in PASSING_STATUSES or error.status_code >= 500
            return isinstance(error, openai.APIConnectionError | UnreadableGrade)

        slots = asyncio.Semaphore(self._concurrency)
        key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY", "none")
        client = openai.AsyncOpenAI(base_url=self._base_url, api_key=key, max_retries=0, timeout=TIMEOUT_SECONDS)

        @retry(
            retry=retry_if_exception(passes), stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.5, max=MAX_WAIT_SECONDS), reraise=True,
        )
        async def ask(messages: Messages) -> tuple[float, str]:
            try:
                reply = await client.chat.completions.create(
                    model=self._model, messages=messages, temperature=0, max_tokens=200,
                    response_format={"type": "json_object"},
                )
                text = reply.choices[0].message.content or ""
            except (ValueError, TypeError, AttributeError, IndexError, openai.APIResponseValidationError) as error:
                raise UnreadableGrade(f"not a chat completion: {error!r}") from error
            return parse_grade(text), text

        async def grade(key: str, messages: Messages) -> None:
            async with slots:
                try:
                    value, text = await ask(messages)
                except (openai.OpenAIError, UnreadableGrade) as error:
                    raise UserError(
                        f"the judge {self._model} failed {ATTEMPTS} times or refused: {error}; "
                        f"the prompt begins {messages[-1]['content'][:80]!r}. Grades so far are cached: run again to continue"
                    ) from error
            self.calls += 1
            with self._cache:
                self._cache.execute("INSERT OR REPLACE INTO grades VALUES (?, ?, ?)", (key, value, text))

        async with client:
            await tqdm.gather(*(grade(*item) for item in missing.items()), unit="answer", desc="judging")
