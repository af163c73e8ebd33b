"""JSON and JSONL files, streamed both ways.

Reading goes by content: a file whose first character is `[` is a JSON array, anything else is JSONL. Writing goes by
suffix: `.json` is an array with one element a line, anything else JSONL. Memory does not grow with the file.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson

from dynamicrag.stage import UserError

READ_BYTES = 1 << 20
# A decoder that runs into the end of its buffer reports an error this close to it; further away, the JSON is broken.
CUT_MARGIN = 32


def read_json(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for every value of a JSON array or JSONL file; line is 1-based and where the value starts.

    Raises UserError, naming file and line, for a missing or empty file, invalid UTF-8 and anything that is not JSON
    (NaN and Infinity included: they are not JSON, and no stage can rank by them).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise UserError(f"{path}: the file is empty; expected a JSON array or one JSON object a line")
    yield from _read_array(path) if head.startswith(b"[") else _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if line:
                try:
                    yield number, orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_array(path: Path) -> Iterator[tuple[int, object]]:
    """Decode one element at a time, holding no more than the element and one read of the file."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    line = 1
    with path.open(encoding="utf-8-sig", newline="") as file:

        def broken(reason: str) -> UserError:
            return UserError(f"{path}:{line}: not a valid JSON array: {reason}")

        def read(size: int) -> str:
            try:
                return file.read(size)
            except UnicodeDecodeError as error:
                raise broken(f"invalid UTF-8 after this line ({error.reason})") from error

        buffer = read(READ_BYTES)
        expected = "["  # then an element or "]", then "," or "]"
        while True:
            stripped = buffer.lstrip()
            line += buffer.count("\n", 0, len(buffer) - len(stripped))
            buffer = stripped or read(READ_BYTES)
            if not buffer:
                raise broken("the file ends before the closing ]")
            if stripped == "":
                continue
            if expected == "[":
                buffer, expected = buffer[1:], "element or ]"
            elif buffer[0] == "]" and expected != "element":
                if (buffer[1:] + read(READ_BYTES)).strip():
                    raise broken("something follows the closing ]")
                return
            elif expected == ", or ]":
                if buffer[0] != ",":
                    raise broken(f"expected , or ] between elements, found {buffer[:20]!r}")
                buffer, expected = buffer[1:], "element"
            else:
                size = READ_BYTES
                while True:
                    try:
                        value, end = decoder.raw_decode(buffer)
                        break
                    except json.JSONDecodeError as error:
                        cut = error.msg.startswith("Unterminated") or error.pos > len(buffer) - CUT_MARGIN
                        more = read(size) if cut else ""
                        if not more:
                            line += buffer.count("\n", 0, error.pos)
                            raise broken(error.msg) from error
                        buffer, size = buffer + more, size * 2
                    except (ValueError, RecursionError) as error:
                        raise broken(str(error)) from error
                yield line, value
                line += buffer.count("\n", 0, end)
                buffer, expected = buffer[end:], ", or ]"


def dump_line(value: object) -> bytes:
    """One value as one line of UTF-8 JSON, keys in their own order, so that equal rows are equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def write_json(path: str | Path, values: Iterable[object]) -> int:
    """Write all values to path, atomically and by its suffix; returns how many there were."""
    path = Path(path)
    temporary = path.with_name(path.name + ".writing")
    count = 0
    with temporary.open("wb") as file:
        if path.suffix == ".json":
            for value in values:
                file.write(b"[\n" if count == 0 else b",\n")
                file.write(orjson.dumps(value))
                count += 1
            file.write(b"\n]\n" if count else b"[]\n")
        else:
            for value in values:
                file.write(dump_line(value))
                count += 1
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return count
