"""A cache of the judge's grades on disk, so that no grade is paid for twice."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynamicrag.stage import UserError

LOCK_SECONDS = 60


class GradeCache:
    """Grades by key in an SQLite file that processes can share and that survives kills.

    Raises UserError, naming the file.
    """

    def __init__(self, path: str | Path):
        self._path = path
        with self._errors_named():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
            if self._db.execute("SELECT 1 FROM sqlite_master WHERE tbl_name != 'judge_grades' OR type NOT IN ('table', 'index')").fetchone():
                raise sqlite3.DatabaseError("the database belongs to another program")
            # IMMEDIATE reports a file that cannot be written here, before a call is paid for.
            self._db.executescript(
                "BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS judge_grades "
                "(key TEXT PRIMARY KEY, grade REAL NOT NULL CHECK (grade BETWEEN 0 AND 1)) WITHOUT ROWID; COMMIT"
            )
            with suppress(sqlite3.OperationalError):  # another process is changing it
                self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{self._path}: cannot store the judge's grades: {error}; give another file as "
                            "--judge-cache") from error

    def get(self, key: str) -> float | None:
        with self._errors_named():
            row = self._db.execute("SELECT grade FROM judge_grades WHERE key = ?", (key,)).fetchone()
        if row and not (isinstance(row[0], float) and 0 <= row[0] <= 1):
            raise UserError(f"{self._path}: contains the grade {row[0]!r}; give another file as --judge-cache")
        return row[0] if row else None

    def put(self, key: str, grade: float) -> float:
        """Store a grade and return the stored one, which another process may have stored first."""
        with self._errors_named():
            self._db.execute("INSERT INTO judge_grades VALUES (?, ?) ON CONFLICT DO NOTHING", (key, grade))
        stored = self.get(key)
        return grade if stored is None else stored
