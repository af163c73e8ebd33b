"""Requests of clients at work: a bounded number at a time, each in a thread, and each can be ended from outside."""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from dynamicrag.llm.serving.refusals import Refusal

SMOOTHING = 0.1  # weight of the last request in the average duration
MAX_RETRY_AFTER = 60


class Work:
    """One request of a client.

    Its thread says events, which the event loop reads from `events`: pairs of a kind and a value. The last one is
    ("done", result) or ("failed", exception).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._said, self.finished = "", False
        self.streams = False  # the text of the next completion is said while it is written
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._loop, self._lock, self._ended = loop, Lock(), False
        self._waits_for: Future | None = None

    def say(self, kind: str, value: object) -> None:
        """Add an event, from the thread."""
        self._loop.call_soon_threadsafe(self.events.put_nowait, (kind, value))

    def text(self, text: str) -> None:
        """Say the part of a growing text that was not said before, as the event "text". A text that begins otherwise is not said."""
        if text.startswith(self._said) and len(text) > len(self._said):
            self.say("text", text[len(self._said) :])
            self._said = text

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of a coroutine that the event loop runs, from the thread. Raises CancelledError if the work is ended."""
        with self._lock:
            if self._ended:
                coroutine.close()
                raise CancelledError
            self._waits_for = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            future = self._waits_for
        return future.result()

    def end(self) -> None:
        """End the work: what it waits for is cancelled, and it cannot wait for anything else."""
        with self._lock:
            self._ended = True
            if self._waits_for is not None:
                self._waits_for.cancel()


_CURRENT: contextvars.ContextVar[Work] = contextvars.ContextVar("work")


def current_work() -> Work:
    """Return the work of this thread."""
    return _CURRENT.get()


class Slots:
    """At most `limit` requests at work. One more is refused, so that no queue grows."""

    def __init__(self, limit: int):
        self.limit, self.running, self._seconds = limit, 0, 1.0
        self._pool = ThreadPoolExecutor(limit, "work")

    def check(self) -> None:
        """Raise Refusal if no slot is free."""
        if self.running >= self.limit:
            seconds = min(max(round(self._seconds), 1), MAX_RETRY_AFTER)
            raise Refusal(429, "busy", f"{self.limit} requests are at work; try again later", {"Retry-After": str(seconds)})

    def start(self, task: Callable[[Work], object]) -> Work:
        """Run task(work) in a thread, and return its work. The slot is free before the last event. Raises Refusal."""
        self.check()
        loop = asyncio.get_running_loop()
        work, began, context = Work(loop), loop.time(), contextvars.copy_context()
        context.run(_CURRENT.set, work)
        self.running += 1

        def finished(future: asyncio.Future) -> None:
            self.running, work.finished = self.running - 1, True
            self._seconds += SMOOTHING * (loop.time() - began - self._seconds)
            error = CancelledError() if future.cancelled() else future.exception()
            work.events.put_nowait(("failed", error) if error else ("done", future.result()))

        loop.run_in_executor(self._pool, lambda: context.run(task, work)).add_done_callback(finished)
        return work

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
