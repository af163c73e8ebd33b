"""Streaming readers and writers for JSON and JSONL files.

The reader goes by content: a file whose first character is `[` is a JSON array; any other file is JSONL. A file whose
name ends in `.gz` is decompressed. The writer goes by suffix: `.json` gives an array with one element per line, any
other suffix JSONL. Memory use does not depend on the size of the file.
"""

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import orjson

from dynamicrag.files.atomic import atomic_writer
from dynamicrag.stage import UserError

READ_BYTES = 1 << 20
BUFFER_BYTES = 1 << 20  # a row of 50 documents has 40 KB
# If the decoder fails within this many characters of the end of its buffer, more data may fix it. Any other failure is
# broken JSON.
CUT_MARGIN = 32
# Limit for the nesting of a row. orjson reads one more level, but could then not write the row inside another object.
MAX_LEVELS = 253
WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for every value of a JSON array or JSONL file; `line` is the 1-based line on which the value starts.

    Raises UserError, naming file and line, for a missing or empty file, for invalid UTF-8 and for anything that is not
    JSON. NaN and Infinity are not JSON.
    """
    path = Path(path)
    refuse_pipe(path)
    try:
        with opened(path) as file:
            head = file.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{path}: is in UTF-16 or UTF-32; save it as UTF-8")
    if not head:
        raise UserError(f"{path}: the file is empty; expected a JSON array or one JSON object per line")
    yield from _read_array(path) if head.startswith(b"[") else _read_lines(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open an input for reading bytes; a `.gz` file is decompressed. Raises OSError, and UserError for broken gzip."""
    try:
        with (gzip.open(path) if path.suffix == ".gz" else path.open("rb", BUFFER_BYTES)) as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip ({error}); fetch the file again") from error


def refuse_pipe(path: Path) -> None:
    """Raise UserError if `path` is a pipe, which can be read only once."""
    if path.is_fifo():
        raise UserError(f"{path}: is a pipe, but a stage reads its input more than once; write the data to a file")


def _value(text: bytes | str) -> object:
    """Parse one JSON text. Raises ValueError for invalid JSON and for a value that could not be written as JSON again."""
    value = orjson.loads(text)
    if len(text) > 2 * MAX_LEVELS:  # a shorter text has fewer pairs of brackets; writing is faster than counting them
        try:
            orjson.dumps([value])  # one level deeper, as in the file of rejected rows
        except orjson.JSONEncodeError as error:
            raise ValueError(f"nested more than {MAX_LEVELS} levels deep") from error
    return value


def _read_lines(path: Path) -> Iterator[tuple[int, object]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if line:
                try:
                    yield number, _value(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not valid JSON ({error}); correct this line") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_array(path: Path) -> Iterator[tuple[int, object]]:
    """Decode one element at a time. Memory holds one element and one block of the file.

    An element that fills its line, as write_json and most programs write it, is decoded several times as fast.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    buffer, position, line = "", 0, 1
    by_line = whole_line = True  # whether elements fill their lines, and whether the buffer may hold the next one
    with opened(path) as file:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")()

        # The buffer and the position in it
        def broken(reason: str) -> UserError:
            return UserError(f"{path}:{line}: not a valid JSON array ({reason}); correct the file")

        def read(size: int) -> bool:
            nonlocal buffer, position, whole_line
            more, block, whole_line = "", b".", True
            try:
                while block and not more:  # a block may end within its first character
                    block = file.read(size)
                    more = utf8.decode(block, final=not block)
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
            """Return the next character that is not white space, without consuming it; "" at the end of the file."""
            while True:
                if space := WHITE_SPACE.match(buffer, position):
                    advance(space.end())
                if position < len(buffer):
                    return buffer[position]
                if not read(READ_BYTES):
                    return ""

        def element() -> object:
            nonlocal position, by_line, whole_line
            size = READ_BYTES
            while True:
                end = buffer.find("\n", position) if by_line and whole_line else -1
                whole_line = end >= 0
                if whole_line:
                    text = buffer[position:end].rstrip(" \t\r").removesuffix(",")
                    try:
                        value = _value(text)
                    except ValueError:  # another form, or an error that the decoder names
                        by_line = False
                    else:
                        position += len(text)
                        return value
                try:
                    _, end = decoder.raw_decode(buffer, position)
                    # A number at the end of the buffer may continue in the next block: 1, then .5 or e+5.
                    if end < len(buffer) - 2 or buffer[end - 1] in "}]\"" or not read(size):
                        value = _value(buffer[position:end])  # stricter than json, which accepts lone surrogates
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

        # The elements between the brackets
        next_character()
        advance(position + 1)  # the opening [
        if next_character() == "]":
            advance(position + 1)
        else:
            while True:
                if not next_character():
                    raise broken("the file ends before the closing ]")
                start = line
                yield start, element()
                separator = next_character()
                if separator not in (",", "]"):
                    raise broken(f"expected , or ] after an element, found {buffer[position : position + 20]!r}")
                advance(position + 1)
                if separator == "]":
                    break
        if next_character():
            raise broken("something follows the closing ]")


def dump_line(value: object) -> bytes:
    """Encode one value as one line of UTF-8 JSON. Keys keep their order, so that equal rows give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


@contextlib.contextmanager
def json_writer(path: str | Path) -> Iterator[Callable[[object], None]]:
    """Yield a function that writes one value to `path`, in the format given by its suffix. The file is written atomically.

    A value may be an orjson.Fragment, which is written as it is.
    """
    as_array, first = Path(path).suffix == ".json", True
    with atomic_writer(path) as file:

        def write(value: object) -> None:
            nonlocal first
            if as_array:
                file.write(b"[\n" if first else b",\n")
                file.write(orjson.dumps(value))
                first = False
            else:
                file.write(dump_line(value))

        yield write
        if as_array:
            file.write(b"[]\n" if first else b"\n]\n")


def write_json(path: str | Path, values: Iterable[object]) -> int:
    """Write all values to `path` atomically, in the format given by its suffix. Returns the number of values."""
    return write_each([path], ((path, value) for value in values))[0]


def write_each(paths: Sequence[str | Path], values: Iterable[tuple[str | Path, object]]) -> list[int]:
    """Write each (path, value) to its own of `paths`, all in one reading of `values`. No file exists before all are written.

    Returns the number of values per path.
    """
    counts = dict.fromkeys(paths, 0)
    with contextlib.ExitStack() as files:
        writers = {path: files.enter_context(json_writer(path)) for path in paths}
        for path, value in values:
            writers[path](value)
            counts[path] += 1
    return list(counts.values())
