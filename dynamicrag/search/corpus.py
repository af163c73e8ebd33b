"""Read a corpus: passages from TSV, JSON or Parquet files."""

import codecs
import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from dynamicrag.files.jsonio import opened, read_json
from dynamicrag.rows.records import title_and_text
from dynamicrag.stage import UserError

READ_ROWS = 1000  # rows of a Parquet file that are in memory at once
ID_KEYS = ("id", "_id", "docid")
TEXT_KEYS = ("text", "contents")
TSV, JSON, PARQUET = (".tsv",), (".jsonl", ".json"), (".parquet",)
Passage = tuple[str, str, str]  # id, title, text


def read_passages(path: str | Path) -> Iterator[Passage]:
    """Yield (id, title, text) from a TSV, JSONL, JSON or Parquet file, or from a folder of such files in sorted order.

    Files named .tsv.gz, .jsonl.gz and .json.gz are decompressed on the fly, such as DPR's psgs_w100.tsv.gz. TSV has
    DPR's form: a header with id, text and title, and quotes around fields that contain a tab, a newline or a quote.
    JSON has id (or _id, docid), text (or contents) and title; without a title, the first line of `contents` is the
    title. Raises UserError naming file and line.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _kind(file) in TSV + JSON + PARQUET)
        if not files:
            raise UserError(f"{path}: contains no .tsv, .jsonl or .parquet file; give the folder of the corpus")
        yield from chain.from_iterable(map(read_passages, files))
    elif _kind(path) in TSV:
        yield from _read_tsv(path)
    elif _kind(path) in PARQUET:
        yield from _read_parquet(path)
    elif _kind(path) in JSON:
        for line, record in read_json(path):
            yield _passage(record, f"{path}:{line}")
    else:
        raise UserError(f"{path}: unknown corpus format; give a .tsv, .jsonl or .json file (optionally .gz), or a "
                        ".parquet file")


def _kind(path: Path) -> str:
    """Return the suffix that determines how a file is read. Parquet is compressed inside; .parquet.gz is not supported."""
    inner = Path(path.name.removesuffix(".gz")).suffix
    return inner if path.suffix != ".gz" or inner not in PARQUET else path.suffix


def _read_tsv(path: Path) -> Iterator[Passage]:
    csv.field_size_limit(1 << 30)
    with opened(path) as file:

        def lines() -> Iterator[str]:
            for number, line in enumerate(file, start=1):
                try:
                    yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: invalid UTF-8 ({error.reason}); save the file as "
                                    "UTF-8") from error

        # strict: a lone quotation mark is an error; otherwise the reader would swallow the following passages.
        reader = csv.reader(lines(), delimiter="\t", strict=True)
        line = 1
        try:
            header = next(reader, [])
            if "id" not in header or "text" not in header:
                raise UserError(f"{path}:1: expected the header id, text, title (separated by tabs), found {header[:4]}")
            if twice := next((name for name in header if header.count(name) > 1), None):
                raise UserError(f"{path}:1: the header has the column {twice!r} twice; rename one of them")
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    if len(fields) != len(header):
                        raise UserError(f"{path}:{line}: expected {len(header)} fields, found {len(fields)}")
                    yield _passage(dict(zip(header, fields, strict=True)), f"{path}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: {error}; a field that starts with a quotation mark must be quoted: \"\"\"like\"\" this\""
            ) from error


def _read_parquet(path: Path) -> Iterator[Passage]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(READ_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield _passage(record, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: compressed pages are broken
        raise UserError(f"{path}: cannot be read as Parquet ({error}); fetch the file again") from error


def _passage(record: object, where: str) -> Passage:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with id, title and text")
    passage_id = next((record[key] for key in ID_KEYS if record.get(key) is not None), None)
    if isinstance(passage_id, bool) or not isinstance(passage_id, str | int) or passage_id == "":
        raise UserError(f"{where}: key 'id': expected a non-empty string or an integer, found {passage_id!r}")
    if "\0" in str(passage_id):
        raise UserError(f"{where}: key 'id': {passage_id!r} contains NUL, which an id cannot contain; give another id")
    key = next((key for key in TEXT_KEYS if record.get(key) is not None), "text")
    text, title = record.get(key), record.get("title")
    if not isinstance(text, str):
        raise UserError(f"{where}: key '{key}': expected a string, found {type(text).__name__}")
    if title is None and key == "contents":
        title, text = title_and_text(text)
    if not isinstance(title or "", str):
        raise UserError(f"{where}: key 'title': expected a string, found {type(title).__name__}")
    return str(passage_id), title or "", text
