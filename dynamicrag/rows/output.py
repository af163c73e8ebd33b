"""Output files that survive an interruption.

A stage that runs for hours appends finished rows to `<output>.partial`, one whole chunk at a time and in input order.
The file is renamed when it is complete. A restarted run continues after the last whole chunk. Chunk boundaries are
fixed, so that the result equals that of an uninterrupted run on the same machine and device. On another device, in
another precision, or if vLLM batches requests differently (on GPUs, unless VLLM_BATCH_INVARIANT=1), the last digits of
sums differ, and a few answers may differ with them. The manifest is written last and marks the output as complete.

If the output is a link, the link stays; its target is written, with the partial file and the manifest next to the
target.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import orjson

from dynamicrag.files.atomic import atomic_writer, naming, rename
from dynamicrag.files.jsonio import dump_line, write_each, write_json
from dynamicrag.files.locks import holder
from dynamicrag.files.paths import written_at
from dynamicrag.rows.ahead import prepared_ahead
from dynamicrag.rows.holding import begin, discard, hold, look_again
from dynamicrag.rows.manifest import identity, manifest_path, parse_manifest, read_manifest, versions
from dynamicrag.rows.output_checks import check_paths, refuse_other_owner, refuse_other_run
from dynamicrag.rows.row import Row
from dynamicrag.rows.tracking import track
from dynamicrag.stage import UserError, log

Item = TypeVar("Item")  # a row, with or without what it is paired with


class Output:
    """The output files of one run of one stage. The first one is written in chunks and can be continued.

    `arguments` holds every flag of the stage by name, --overwrite and --on_error among them; the manifest records them.
    `finished` is True if an earlier run with the same arguments and inputs is complete, so that nothing remains to be
    done. Raises UserError if the folder cannot be written, its file system has no locks, an input is missing, another run
    is writing the same output, or an existing output was made from other arguments or inputs (--overwrite discards it).
    """

    def __init__(self, arguments: Mapping[str, Any], outputs: list[str], inputs: list[str]):
        self._given = [str(output) for output in outputs]
        self.paths = [written_at(output) for output in outputs]
        self.path = self.paths[0]
        self.partial = Path(f"{self.path}.partial")
        self.rejected_path = Path(f"{self.path}.rejected.jsonl")
        self.rows = self.rejected = 0
        # Handlers of malformed rows, for the first reading of a file and for later ones.
        self.reject = self._set_aside if arguments["on_error"] == "skip" else None
        self.ignore = (lambda _: None) if arguments["on_error"] == "skip" else None
        self.started = time.monotonic()
        self._file: BinaryIO | None = None
        self._by_rows = False
        check_paths(self.paths, inputs)
        refuse_other_owner(self.paths, self._given[0])
        self.identity = identity(arguments, outputs, inputs)
        if arguments["overwrite"]:
            stale = [file for path in self.paths for file in (path, manifest_path(path))]
            discard([*stale, self.partial, self._begun, self.rejected_path], self.partial, self._begun)
        self.finished = self._is_finished()
        if self.finished:
            log.info("%s: already complete; give --overwrite to make it again", self.path)

    @property
    def _begun(self) -> Path:
        return Path(f"{self.partial}.manifest.json")

    def _is_finished(self) -> bool:
        manifest = read_manifest(self.path)
        if manifest is None:
            look_again(self.path.parent)
            manifest = read_manifest(self.path)
        absent = [path for path in self.paths if not path.exists()]
        if manifest is not None:
            refuse_other_run(manifest, self.identity, self.path)
            if absent:
                raise UserError(f"{absent[0]}: was removed after the run finished; give --overwrite to make all outputs again")
            self.partial.unlink(missing_ok=True)  # left by an interruption just after the manifest was written
            self._begun.unlink(missing_ok=True)
            return True
        if (present := [path for path in self.paths if path.exists()]) and not self._begun.exists():
            raise UserError(f"{present[0]}: exists, but is not the finished output of a stage; move it away or give --overwrite")
        return False

    def record(self, device: str | None = None, **resolved: str) -> None:
        """Record the device name and the values that `auto` was resolved to in flags that affect the output, such as dtype.

        Call it before the first row is written. A run that was started with other resolved values is then refused; one that
        was started on another device is continued, with a warning. A finished output is recognised without this call.
        """
        self.identity |= {"resolved": resolved, **({"device": device} if device else {})}

    # -- output written in chunks

    def chunks(self, rows: Iterable[Item], size: int) -> Iterator[list[Item]]:
        """Cut rows into chunks of `size` and yield those not yet written. Call write() with the result of each chunk.

        Raises UserError if `size` is below 1 or the partial file holds more rows than the input.
        """
        if size < 1:
            raise UserError(f"{self.path}: --chunk-size must be at least 1, found {size}")
        self._keep_whole_chunks(self.begin(), size)
        rows = iter(rows)
        if sum(1 for _ in itertools.islice(rows, self.rows)) < self.rows:
            raise UserError(f"{self.partial}: holds more rows than the input; give --overwrite to start again")
        while chunk := list(itertools.islice(rows, size)):
            yield chunk
            del chunk  # only one is in memory

    def begin(self) -> BinaryIO:
        """Open the partial file. It is empty, or holds what an interrupted run with the same arguments wrote."""
        self._by_rows = True
        return self._lock()

    def _lock(self) -> BinaryIO:
        """Open the partial file and lock it for this run. It stays empty in a stage that writes whole files."""
        if self._file is not None:
            self._file.seek(0)
            return self._file
        if self.path.suffix != ".json" and self._begun.exists() and self.path.exists() and not self.partial.exists():
            with contextlib.suppress(FileNotFoundError):  # interrupted between the rename and the manifest
                self._file = hold(self.path, self._begun, create=False)
        renamed = self._file is not None
        self._file = self._file or hold(self.partial, self._begun)
        begun = parse_manifest(self._begun) if self._begun.exists() else None
        if begun is not None:
            refuse_other_run(begun, self.identity, self.partial)
            before, now = begun.get("device"), self.identity.get("device")
            if before and now and before != now:
                log.warning("%s: was started on %s and is continued on %s; the last digits of numbers, and a few "
                            "answers, may differ from a run on one device", self.partial, before, now)
        begin(self._begun, {**(begun or self.identity), "held_by": holder()}, self.path, None if renamed else self.partial, self._file)
        if renamed:
            rename(self.path, self.partial)
        if begun is None:
            self._file.truncate(0)
        self._file.seek(0)
        return self._file

    def _keep_whole_chunks(self, file: BinaryIO, size: int) -> None:
        """Truncate the file after its last whole chunk."""
        offset = keep = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            if number % size == 0:
                self.rows, keep = number, offset
        file.truncate(keep)
        if self.rows:
            log.info("continuing %s after %d finished rows", self.partial, self.rows)

    def write(self, rows: list[Row]) -> None:
        """Append one finished chunk."""
        self.append(map(dump_line, rows))
        self.rows += len(rows)

    def append(self, parts: Iterable[bytes]) -> None:
        """Append to the partial file and flush it to disk. Raises OSError, naming the file."""
        assert self._file, "begin() opens it"
        with naming(self.partial):
            self._file.writelines(parts)
            self._file.flush()
            os.fsync(self._file.fileno())

    def process(
        self, rows: Iterable[Item], size: int, work: Callable[[Any], list[Row]], total: int, desc: str,
        prepare: Callable[[list[Item]], object] | None = None,
    ) -> None:
        """Write work(chunk) for every chunk not yet written, with a progress bar over `total` questions.

        With `prepare`, write work(prepare(chunk)); a thread prepares the next chunk meanwhile.
        """
        from tqdm import tqdm

        with tqdm(total=total, unit="question", desc=desc) as progress:
            chunks = self.chunks(rows, size)
            for chunk in prepared_ahead(prepare, chunks) if prepare else chunks:
                progress.update(self.rows - progress.n)
                self.write(work(chunk))
                del chunk
            progress.update(self.rows - progress.n)

    def written(self) -> Iterator[Row]:
        """Yield the rows written so far."""
        return map(orjson.loads, self._lines())

    def _lines(self) -> Iterator[bytes]:
        with self.partial.open("rb") as file:
            yield from (line.rstrip(b"\n") for line in file)

    # -- whole files

    def publish(self, path: str | Path, rows: Iterable[object]) -> int:
        """Write one whole output file atomically; returns its number of rows."""
        return self.publish_each([path], ((path, row) for row in rows))[0]

    def publish_each(self, paths: Sequence[str | Path], rows: Iterable[tuple[str | Path, object]]) -> list[int]:
        """Write several whole output files in one reading of (path, row); returns their numbers of rows."""
        self._lock()
        return write_each(paths, rows)

    def _set_aside(self, record: dict) -> None:
        with self.rejected_path.open("wb" if self.rejected == 0 else "ab") as file:
            file.write(dump_line(record))
        self.rejected += 1

    def finish(self, summary: Mapping | None = None, /, **counts: object) -> None:
        """Move every file to its final path, write the manifest that marks the run as complete, and log the paths.

        `counts` are logged and stored in the manifest. `summary` holds numbers for other programs and is stored only.
        """
        if self._by_rows:
            if not self.path.exists() and self.path.suffix == ".json":
                write_json(self.path, map(orjson.Fragment, self._lines()))
            elif not self.path.exists():
                rename(self.partial, self.path)
            counts = {"rows": self.rows, **counts}
        if self.rejected:
            counts["rejected"] = self.rejected
            log.warning("%s: %d malformed rows were set aside", self.rejected_path, self.rejected)
        manifest = {
            **self.identity,
            "outputs": self._given,
            "counts": counts,
            **({"summary": summary} if summary else {}),
            "seconds": round(time.monotonic() - self.started, 1),
            "versions": versions(),
        }
        for path in reversed(self.paths):
            with atomic_writer(manifest_path(path)) as file:
                file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        self.partial.unlink(missing_ok=True)
        self._begun.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()
        track(manifest["stage"], self.path, {key: manifest.get(key) for key in ("counts", "summary", "seconds")}, manifest["arguments"])
        counts = {key: "not known" if value is None else value for key, value in counts.items()}
        shown = ", ".join(f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}" for key, value in counts.items())
        log.info("%s: %s", " and ".join(map(str, self.paths)), shown)

    def finish_answers(self) -> None:
        """Call finish(), with the rows that carry `error` in the second output and all others in the first."""
        def part(failed: bool) -> Iterator[bytes]:
            return (line for line in self._lines() if failed == (b'"error":' in line and "error" in orjson.loads(line)))

        answered, unanswered = (self.publish(path, map(orjson.Fragment, part(failed))) for path, failed in zip(self.paths, (False, True), strict=True))
        if unanswered:
            first = orjson.loads(next(part(True)))
            log.warning("%s: %d questions have no answer; the first is %s: %s", self.paths[1], unanswered, first["id"], first.get("error"))
        self.finish(answered=answered, unanswered=unanswered)
