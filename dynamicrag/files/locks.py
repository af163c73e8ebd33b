"""Workers that wait for each other, by locks on files: a process that dies holds none.

NFS emulates flock by byte-range locks. There a file has to be open for reading to be locked as shared, and for writing to be
locked alone, and a lock that is upgraded from the one to the other may wait for ever. So every lock file is open for both, and
no lock is upgraded. Other file systems have no flock at all (Lustre mounted without `-o flock`, NFS without its lock
daemon): what needs the lock to be right ends with a line that says so.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dynamicrag.stage import UserError, log

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def lock(file: BinaryIO, operation: int, name: str | Path) -> None:
    """flock() of an open file, waiting for it unless `operation` says otherwise.

    Raises BlockingIOError if another holds it and it does not wait, and UserError, naming the file, if it cannot be locked at all.
    """
    try:
        fcntl.flock(file.fileno(), operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in NO_LOCKS:
            reason, advice = "its file system has no locks (flock)", "use one that has, or mount it with them (Lustre: -o flock)"
        else:
            reason, advice = f"it cannot be locked (flock: {error.strerror})", "use another file system"
        raise UserError(f"{name}: {reason}; without a lock, two runs could write the same file: {advice}") from error


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold `<path>.lock`: of several workers that need the same cached file, one makes it and the others wait.

    Raises OSError if the lock file cannot be written, UserError if it cannot be locked.
    """
    with open(f"{path}.lock", "a+b") as file:
        lock(file, fcntl.LOCK_EX, file.name)
        yield


@contextlib.contextmanager
def in_turn(path: str | Path) -> Iterator[None]:
    """Of several workers of this machine that started together, one works at a time, and none goes on before all have had
    their turn. What each needs in memory for this work alone, they then never need beside what comes after.

    `path` names the work. The locks themselves lie in the machine's temporary folder, under a hash of `path` and the user:
    machines that share no memory have nothing to wait for. Without locks there the work is done at once, with a warning.
    """
    name = hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    place = Path(tempfile.gettempdir()) / f"dynamicrag_{os.getuid()}_{name}"
    with contextlib.ExitStack() as held:
        locked = False
        try:
            started, turn = (held.enter_context(_private(f"{place}.{what}")) for what in ("started", "lock"))
            lock(started, fcntl.LOCK_SH, started.name)
            lock(turn, fcntl.LOCK_EX, turn.name)
            locked = True
        except (OSError, UserError) as error:
            log.warning("%s; workers of this machine do not wait for each other, and need more memory", error)
        yield
        if locked:
            for file in (turn, started):
                lock(file, fcntl.LOCK_UN, file.name)
            lock(started, fcntl.LOCK_EX, started.name)  # once those who still hold it as shared have had their turn


def _private(path: str) -> BinaryIO:
    """A file of this user's in a folder that all may write to. Raises OSError for a link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "r+b")
