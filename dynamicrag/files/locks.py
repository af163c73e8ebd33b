"""File locks, which let workers wait for each other. The locks of a process that dies are released.

NFS emulates flock with byte-range locks. On NFS, a shared lock requires a file that is open for reading, an exclusive
lock requires a file that is open for writing, and an upgrade from shared to exclusive may block forever. Every lock
file is therefore opened for reading and writing, and no lock is upgraded. Some file systems have no flock at all
(Lustre mounted without `-o flock`, NFS without its lock daemon). Code that needs a lock for correctness stops there
with a UserError. The locks of a machine that is lost are released by the file server, when the lease of that machine
has ended (NFSv4: 90 seconds by default). Until then they look like those of a process that works, so every lock has a
holder, by host and process, and messages name it.

A lock belongs to a file, not to its name. Another process may rename or remove a file after it was opened here and
before it was locked, and whoever writes to it then writes to a finished output. `locked` checks the name again.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dynamicrag.stage import UserError, log

TRIES = 100  # to open and lock a file that other processes rename or remove
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def lock(file: BinaryIO, operation: int, name: str | Path) -> None:
    """Call flock() on an open file; wait for the lock unless `operation` contains LOCK_NB.

    Raises BlockingIOError if another process holds the lock and LOCK_NB is set, FileNotFoundError if another machine has
    removed the file (ESTALE on NFS), and UserError, naming the file, if the file system cannot lock it.
    """
    try:
        fcntl.flock(file.fileno(), operation)
    except (BlockingIOError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(name)) from error
        if error.errno in NO_LOCKS:
            reason, advice = "its file system has no locks (flock)", "use one that has, or mount it with them (Lustre: -o flock)"
        else:
            reason, advice = f"it cannot be locked (flock: {error.strerror})", "use another file system"
        raise UserError(f"{name}: {reason}, and two runs could write the same file without a lock; {advice}") from error


def holder() -> str:
    """Return how this process is named to a process that needs a lock that this one holds."""
    return f"process {os.getpid()} of {socket.gethostname()} since {time.strftime('%F %T')}"


def locked(path: Path, create: bool = True) -> BinaryIO:
    """Open a file for appending, and lock it without waiting. The file has this name when it is returned.

    Raises BlockingIOError if another process holds its lock, UserError if it cannot be locked, FileNotFoundError if it
    does not exist and is not to be created, and OSError.
    """
    for _ in range(TRIES):
        try:
            file = path.open("a+b") if create else os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC), "a+b")
        except FileNotFoundError as error:
            if not (create and path.parent.is_dir()):
                raise
            raise UserError(f"{path}: another machine has removed it, which is not yet known here; run the same command again in a minute") from error
        try:
            with contextlib.suppress(FileNotFoundError):
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process has renamed or removed the file since it was opened
    raise UserError(f"{path}: is renamed or removed by other processes each time it is opened; see which runs write it")


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Hold `<path>.lock`. Of several workers that need the same cached file, one creates it and the others wait.

    Raises OSError if the lock file cannot be written, and UserError if it cannot be locked.
    """
    with open(f"{path}.lock", "a+b") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, file.name)
        except BlockingIOError:
            file.seek(0)
            log.info("%s: waiting for %s, which makes it", path, file.read(200).decode(errors="replace") or "another process")
            lock(file, fcntl.LOCK_EX, file.name)
        file.truncate(0)
        file.write(holder().encode())
        file.flush()
        yield


@contextlib.contextmanager
def in_turn(path: str | Path) -> Iterator[None]:
    """Let the workers of one machine that started together run the block one at a time.

    No worker continues until all are done. This bounds memory: what the block needs temporarily is never in memory
    together with what the workers need later. `path` identifies the block. The lock files are in the machine's
    temporary folder, named by a hash of `path` and the user, because only workers that share memory must wait. If the
    folder has no locks, the block runs at once and a warning is logged.
    """
    name = hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    place = Path(tempfile.gettempdir()) / f"dynamicrag_{os.getuid()}_{name}"
    with contextlib.ExitStack() as held:
        locks: tuple[BinaryIO, BinaryIO] | None = None
        try:
            started = held.enter_context(_private(f"{place}.started"))
            turn = held.enter_context(_private(f"{place}.lock"))
            lock(started, fcntl.LOCK_SH, started.name)
            lock(turn, fcntl.LOCK_EX, turn.name)
            locks = started, turn
        except (OSError, UserError) as error:
            log.warning("%s; the workers on this machine do not wait for each other and need more memory", error)
        yield
        if locks:
            started, turn = locks
            for file in (turn, started):
                lock(file, fcntl.LOCK_UN, file.name)
            lock(started, fcntl.LOCK_EX, started.name)  # granted when no other worker holds the shared lock


def _private(path: str) -> BinaryIO:
    """Open a file that belongs to this user in a folder that every user may write to. Raises OSError for a link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "r+b")
