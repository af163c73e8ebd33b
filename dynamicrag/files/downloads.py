"""Downloads that continue: a file exists completely and with the right hash, or not at all.

A download grows in `<path>.download`. `<path>.download.from` names what it is of: an interrupted download continues where it
ended, and one of another version begins again.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dynamicrag.files.atomic import atomic_writer, naming, rename
from dynamicrag.files.hub import SECONDS, TRY_AGAIN, Remote, explained
from dynamicrag.files.locks import holder, locked
from dynamicrag.stage import UserError, log

ATTEMPTS = 8  # in a row without a new byte
MAX_WAIT = 30  # seconds between two of them
FIRST_BYTES, MAX_BYTES = 1 << 18, 1 << 24  # of a request for the first lines; each asks for twice as many as the last
FULL = {errno.ENOSPC, errno.EDQUOT}


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which may not exist yet."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if the disk of a folder has less room than `needed` bytes."""
    free = free_space(folder)
    if free < needed:
        raise UserError(f"{folder}: {what} needs {size_of(needed)}, the disk has {size_of(free)}; free some or give another folder")


def size_of(count: int | None) -> str:
    """Return a number of bytes as text."""
    if count is None:
        return "?"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def obtain(remote: Remote, path: Path, overwrite: bool = False) -> str:
    """Return the SHA-256 of a file, which is downloaded unless it is there already. Raises UserError as download() does, and if
    another file is in its place.
    """
    if path.is_file() and not overwrite:
        digest = digest_of(path) if path.stat().st_size == remote.size else ""
        if not digest or remote.sha256 not in (None, digest):
            raise UserError(f"{path}: exists, but is not {remote.name} of {remote.place}; move it away or give --overwrite")
        return digest
    return download(remote, path)


def arrived(path: Path) -> int:
    """Return how many bytes of a file, or of its unfinished download, are there."""
    return max((place.stat().st_size for place in (path, Path(f"{path}.download")) if place.is_file()), default=0)


def download(remote: Remote, path: Path) -> str:
    """Download a file, or copy it from the hub's cache. Returns its SHA-256.

    Raises UserError if the file cannot be had, is not the one that was promised (it is then removed), the disk is full, or
    another run downloads it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = Path(f"{path}.download"), Path(f"{path}.download.from")
    known = f"{remote.url}\n{remote.version}\n"
    with explained(remote.place), full_disk(path), naming(part), _held(part, note) as file, contextlib.ExitStack() as afterwards:
        afterwards.callback(_remove_empty, part, note)
        before = note.read_text() if note.is_file() else ""
        # Without a size and a version, nobody can tell whether the rest belongs to the beginning.
        if not (before.startswith(known) and remote.version and file.seek(0, os.SEEK_END) <= (remote.size or -1)):
            file.truncate(0)
        note.write_text(f"{known}{holder()}\n")
        start = file.seek(0, os.SEEK_END)
        check_space(path.parent, (remote.size or 0) - start, str(path))
        if start:
            log.info("%s: continuing after %s", path, size_of(start))
        if remote.local:
            file.truncate(0)
            with remote.local.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 24)
        elif start != remote.size:
            _receive(remote, file)
        file.flush()
        os.fsync(file.fileno())
        size, digest = file.seek(0, os.SEEK_END), digest_of(part)
        wrong = (
            f"{size} bytes, not {remote.size}" if remote.size not in (None, size)
            else f"the SHA-256 {digest}, not {remote.sha256}" if remote.sha256 not in (None, digest) else None
        )
        if wrong:
            part.unlink()
            note.unlink()
            raise UserError(f"{remote.place}: {remote.name} has {wrong}; it was removed: run the same command again, and if "
                            "that does not help, ask its publisher")
        rename(part, path)
        note.unlink()
    return digest


def _remove_empty(part: Path, note: Path) -> None:
    """Remove a download of which nothing arrived, as of a gated repository, and its folder if nothing else is there."""
    if part.is_file() and not part.stat().st_size:
        part.unlink()
        note.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            part.parent.rmdir()


def _held(part: Path, note: Path) -> BinaryIO:
    """Open and lock an unfinished download. Raises UserError, naming the run that holds it."""
    try:
        return locked(part)
    except BlockingIOError as error:
        lines = note.read_text().splitlines() if note.is_file() else []
        raise UserError(f"{part}: another run downloads it ({lines[-1] if len(lines) > 2 else 'not known'}); wait for it or stop it") from error


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Say of a full disk what to do. Raises UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{path}: the disk is full; free some space, then run the same command again to continue") from error


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _receive(remote: Remote, file: BinaryIO) -> None:
    """Append to the file what is missing, with as many requests as that takes."""
    from tqdm import tqdm

    failures, reached = 0, -1

    def stuck(_: object) -> bool:
        nonlocal failures, reached
        failures, reached = 1 if file.tell() > reached else failures + 1, file.tell()
        return failures >= ATTEMPTS

    with tqdm(total=remote.size, initial=file.tell(), unit="B", unit_scale=True, desc=remote.name) as bar:
        for attempt in _attempts(stuck):
            with attempt, _request(remote, f"bytes={file.tell()}-" if file.tell() else None) as response:
                if response.status_code != 206 and file.tell():  # the server does not continue downloads
                    file.truncate(0)
                    file.seek(0)
                    bar.reset(remote.size)
                for block in response.iter_raw():
                    file.write(block)
                    bar.update(len(block))


def _attempts(stop: Callable[[Any], bool]) -> Any:
    from tenacity import Retrying, retry_if_exception, wait_exponential

    def may_pass(error: BaseException) -> bool:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, HfHubHTTPError):
            return error.response.status_code in TRY_AGAIN
        return isinstance(error, httpx2.TransportError)

    return Retrying(stop=stop, wait=wait_exponential(max=MAX_WAIT), retry=retry_if_exception(may_pass), reraise=True)


@contextlib.contextmanager
def _request(remote: Remote, part: str | None) -> Iterator[Any]:
    """Yield the answer of the server, whose content is not read yet. The token stays with the hub if it sends us elsewhere."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    headers = {**remote.headers, "Accept-Encoding": "identity", **({"Range": part} if part else {})}
    with get_session().stream("GET", remote.url, headers=headers, timeout=SECONDS) as response:
        hf_raise_for_status(response)
        yield response


def first_lines(remote: Remote, count: int, path: Path) -> bool:
    """Write the first lines of a file that are not blank, at most `count`, to `path`. Returns False if it is no file of lines but
    a JSON array, which cannot be cut.

    No more of the file is downloaded than these lines need, rounded up to a few hundred kilobytes. A `.gz` file is read and
    written compressed. Raises UserError as download() does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[bytes] = []
    with explained(remote.place):
        for attempt in _attempts(lambda state: state.attempt_number >= ATTEMPTS):
            with attempt, contextlib.closing(_blocks(remote)) as blocks:
                lines = _cut(blocks, count, remote.name.endswith(".gz"))
    if lines and lines[0].lstrip().startswith(b"["):
        return False
    content = b"".join(line + b"\n" for line in lines)
    with full_disk(path), atomic_writer(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return True


def _cut(blocks: Iterable[bytes], count: int, compressed: bool) -> list[bytes]:
    """Return the first lines of a stream."""
    unpack = zlib.decompressobj(wbits=31).decompress if compressed else bytes
    lines, rest = [], b""
    for block in blocks:
        *whole, rest = (rest + unpack(block)).split(b"\n")
        lines += [line for line in whole if line.strip()]
        if len(lines) >= count or (not lines and rest.lstrip().startswith(b"[")):  # a JSON array may be a single line
            break
    return [*lines, *([rest] if rest.strip() else [])][:count]


def _blocks(remote: Remote) -> Generator[bytes]:
    """Yield the file in blocks, each of which is asked for when it is needed."""
    if remote.local:
        with remote.local.open("rb") as source:
            while block := source.read(FIRST_BYTES):
                yield block
        return
    start, size = 0, FIRST_BYTES
    while remote.size is None or start < remote.size:
        with _request(remote, f"bytes={start}-{start + size - 1}") as response:
            before = start
            for block in response.iter_raw():
                start += len(block)
                yield block
            if response.status_code != 206 or start - before < size:
                return
        size = min(2 * size, MAX_BYTES)
