"""Files that are there whole, or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dynamicrag.files.paths import written_at


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

    If `path` is a link, it stays one, and both files lie where it leads. If the body raises, `path` stays as it was and the
    temporary file is removed. A kill leaves that file behind, and the next writer replaces it. Raises OSError, naming the
    file, if it cannot be written.
    """
    target = written_at(path)
    temporary = Path(f"{target}.writing")
    file = temporary.open("wb")
    try:
        with naming(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
