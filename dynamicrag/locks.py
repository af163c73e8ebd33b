"""Workers of one machine that wait for each other, by locks on files: a process that dies holds none."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold `<path>.lock`: of several workers that need the same cached file, one makes it and the others wait."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def in_turn(path: str | Path) -> Iterator[None]:
    """Of several workers that started together, one works at a time, and none goes on before all have had their turn.

    What each needs in memory for this work alone, they then never need beside what comes after.
    """
    with open(f"{path}.started", "w") as started:
        fcntl.flock(started, fcntl.LOCK_SH)
        with exclusive(path):
            yield
        fcntl.flock(started, fcntl.LOCK_EX)  # gives the shared lock up, and waits for those who still hold it
