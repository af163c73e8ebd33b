"""Files that are there whole, or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Say in an OSError which file it is about: one raised by a write to an open file does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Yield `<path>.writing`, open for writing; when the body is through, its bytes are on disk and it becomes `path`.

    Where the body raises, `path` stays as it was and the temporary file is removed. A kill leaves that file behind,
    and the next writer replaces it. Raises OSError, naming the file, where it cannot be written.
    """
    temporary = Path(f"{path}.writing")
    file = temporary.open("wb")
    try:
        with naming(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
