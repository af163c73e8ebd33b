"""Values by id that stay on disk, such as the questions and answers of an evaluation file."""

import copy
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import orjson

from dynamicrag.rows.seen import Seen

Value = TypeVar("Value")
Other = TypeVar("Other")


class Stored(Mapping[str, Value], Generic[Value]):
    """A mapping in a temporary file, in the order of add(). Memory holds at most 44 bytes per id.

    `make` makes a value from what add() was given, once that has been written as JSON and read again.
    """

    def __init__(self, make: Callable[[Any], Value]):
        self._make, self._numbers, self._ends = make, Seen(), array("Q", [0])
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the mapping

    def add(self, key: str, content: object) -> None:
        """Add an id that is not in the mapping yet."""
        line = orjson.dumps([key, content])
        self._numbers.add(key, len(self))
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def view(self, make: Callable[[Any], Other]) -> "Stored[Other]":
        """Return the same mapping with other values; nothing may be added any more."""
        other = cast(Stored[Other], copy.copy(self))
        other._make = make
        return other

    def _read(self, number: int) -> tuple[str, Any]:
        start, end = self._ends[number : number + 2]
        return orjson.loads(os.pread(self._file.fileno(), end - start, start))

    def __getitem__(self, key: str) -> Value:
        number = self._numbers.find(key)
        if number is None:
            raise KeyError(key)
        return self._make(self._read(number)[1])

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._numbers.find(key) is not None

    def __iter__(self) -> Iterator[str]:
        return (self._read(number)[0] for number in range(len(self)))

    def __len__(self) -> int:
        return len(self._ends) - 1
