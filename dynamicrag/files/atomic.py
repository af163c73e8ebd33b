"""Atomic writes: a file exists completely or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dynamicrag.files.paths import written_at


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file name to an OSError that lacks one, such as an error of a write to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def rename(source: Path, target: Path) -> None:
    """Rename a file, over another one if there is one. Raises OSError.

    If the answer of an NFS server is lost, the client asks again, and the server no longer finds the file that it has
    renamed. This is no error if the target is that file.
    """
    before = source.stat()
    try:
        source.replace(target)
    except FileNotFoundError:
        if not (target.exists() and os.path.samestat(before, target.stat())):
            raise


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Yield `<path>.writing`, open for writing.

    When the block ends, the data is flushed to disk and the file is renamed to `path`. If `path` is a link, the link
    stays and its target is replaced; the temporary file is then next to the target. If the block raises an exception,
    `path` is unchanged and the temporary file is removed. A killed process leaves the temporary file behind; the next
    writer replaces it. Raises OSError, naming the file, if it cannot be written.
    """
    target = written_at(path)
    temporary = Path(f"{target}.writing")
    file = temporary.open("wb")
    try:
        with naming(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
