"""JSON and JSONL files, streamed both ways.

Reading goes by content: a file whose first character is `[` is a JSON array, anything else is JSONL; a file named `.gz` is
decompressed. Writing goes by suffix: `.json` is an array with one element per line, anything else JSONL. Memory does not
grow with the file.
"""

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import UserError

READ_BYTES = 1 << 20
# A decoder that runs into the end of its buffer reports an error this close to it; further away, the JSON is broken.
CUT_MARGIN = 32
# A row may be nested so deep at most, or orjson, which reads it, could not write it again beneath another level.
MOST_LEVELS = 253
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for every value of a JSON array or JSONL file; line is 1-based and where the value starts.

    Raises UserError, naming file and line, for a missing or empty file, invalid UTF-8 and anything that is not JSON
    (NaN and Infinity included: they are not JSON, and no stage can rank by them).
    """
    path = Path(path)
    refuse_pipe(path)
    try:
        with opened(path) as file:
            head = file.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{path}: is in UTF-16 or UTF-32; save it as UTF-8")
    if not head:
        raise UserError(f"{path}: the file is empty; expected a JSON array or one JSON object a line")
    yield from _read_array(path) if head.startswith(b"[") else _read_lines(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An input, open for reading its bytes: those inside if it is compressed, named `.gz`. Raises OSError, and UserError for broken gzip."""
    try:
        with (gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip ({error}); fetch the file again") from error


def refuse_pipe(path: Path) -> None:
    """Raises UserError for an input that can be read only once."""
    if path.is_fifo():
        raise UserError(f"{path}: is a pipe; a stage reads its input more than once, so write it to a file")


def _value(text: bytes | str) -> object:
    """The value of one JSON text. Raises ValueError for what is no JSON, and for what could not be written as JSON again."""
    value = orjson.loads(text)
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, brackets)) > MOST_LEVELS:
        try:
            orjson.dumps([value])  # as a row that is set aside
        except orjson.JSONEncodeError as error:
            raise ValueError(f"nested more than {MOST_LEVELS} levels deep") from error
    return value


def _read_lines(path: Path) -> Iterator[tuple[int, object]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if line:
                try:
                    yield number, _value(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not valid JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_array(path: Path) -> Iterator[tuple[int, object]]:
    """Decode one element at a time, holding no more than the element and one read of the file."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    buffer, position, line = "", 0, 1
    with opened(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:

        def broken(reason: str) -> UserError:
            return UserError(f"{path}:{line}: not a valid JSON array: {reason}")

        def read(size: int) -> bool:
            nonlocal buffer, position
            try:
                more = file.read(size)
            except UnicodeDecodeError as error:
                raise broken(f"invalid UTF-8 after this line ({error.reason})") from error
            if more:
                buffer, position = buffer[position:] + more, 0
            return bool(more)

        def advance(end: int) -> None:
            nonlocal position, line
            line += buffer.count("\n", position, end)
            position = end

        def next_character() -> str:
            """The next one that is not white space, left unread; empty at the end of the file."""
            while True:
                advance(WHITE_SPACE.match(buffer, position).end())
                if position < len(buffer):
                    return buffer[position]
                if not read(READ_BYTES):
                    return ""

        def element() -> object:
            size = READ_BYTES
            while True:
                try:
                    _, end = decoder.raw_decode(buffer, position)
                    # a number at the end of the buffer may go on behind it: 1, then .5 or e+5
                    if end < len(buffer) - 2 or buffer[end - 1] in "}]\"" or not read(size):
                        value = _value(buffer[position:end])  # strict about what json lets pass: lone surrogates
                        advance(end)
                        return value
                except json.JSONDecodeError as error:
                    cut = error.msg.startswith("Unterminated") or error.pos > len(buffer) - CUT_MARGIN
                    if not (cut and read(size)):
                        advance(min(max(error.pos, position), len(buffer)))
                        raise broken(error.msg) from error
                except (ValueError, RecursionError) as error:
                    raise broken(str(error)) from error
                size *= 2

        next_character()
        advance(position + 1)  # the [ that brought us here
        if next_character() == "]":
            advance(position + 1)
        else:
            while True:
                if not next_character():
                    raise broken("the file ends before the closing ]")
                start = line
                yield start, element()
                found = next_character()
                if found not in (",", "]"):
                    raise broken(f"expected , or ] after an element, found {buffer[position : position + 20]!r}")
                advance(position + 1)
                if found == "]":
                    break
        if next_character():
            raise broken("something follows the closing ]")


def dump_line(value: object) -> bytes:
    """One value as one line of UTF-8 JSON, keys in their own order, so that equal rows are equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def write_json(path: str | Path, values: Iterable[object]) -> int:
    """Write all values to path, atomically and by its suffix; returns how many there were."""
    count = 0
    with atomic_writer(path) as file:
        if Path(path).suffix == ".json":
            for value in values:
                file.write(b"[\n" if count == 0 else b",\n")
                file.write(orjson.dumps(value))
                count += 1
            file.write(b"\n]\n" if count else b"[]\n")
        else:
            for value in values:
                file.write(dump_line(value))
                count += 1
    return count
