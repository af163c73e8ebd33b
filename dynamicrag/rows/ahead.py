"""Prepare the next item while the caller works on the current one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prepared_ahead(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[Prepared]:
    """Yield prepare(item) for each item, in order. A thread prepares the next item while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        upcoming: deque[Future[Prepared]] = deque()
        for item in items:
            upcoming.append(thread.submit(prepare, item))
            if len(upcoming) > 1:
                yield upcoming.popleft().result()
        for last in upcoming:
            yield last.result()
