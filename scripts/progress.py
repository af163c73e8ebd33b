"""The progress of all parts on the terminal of one machine; scripts/launch.py uses it."""

import os
import shutil
import sys

from tqdm import tqdm

TAIL = 2000  # bytes at the end of a log


class Progress:
    """A line per running part, which shows the end of its log, and a line for all parts. There are none if stderr is no terminal."""

    def __init__(self, logs: str, parts: list[str]):
        self.logs = logs
        self.all = tqdm(total=len(parts), desc="parts", unit="part", file=sys.stderr, disable=None)
        self.lines: dict[str, tqdm] = {}
        self.before = {part: self.size(part) for part in parts}

    def size(self, part: str) -> tuple[int, int]:
        """The size of a log in bytes, and the time of its last change."""
        try:
            log = os.stat(f"{self.logs}{part}.log")
        except OSError:
            return 0, 0
        return log.st_size, log.st_mtime_ns

    def show(self, parts: list[str]) -> None:
        """Show these parts, except those whose logs have not changed since the beginning: they wait for a worker."""
        for part in parts:
            size = self.size(part)
            if self.all.disable or size == self.before[part]:
                continue
            if part not in self.lines:
                self.lines[part] = tqdm(bar_format="{desc}", leave=False, file=sys.stderr)
            with open(f"{self.logs}{part}.log", "rb") as file:
                file.seek(max(0, size[0] - TAIL))
                end = file.read().decode(errors="replace").replace("\r", "\n").rstrip().rpartition("\n")[2].strip()
            self.lines[part].set_description_str(f"part {part}: {end}"[: shutil.get_terminal_size().columns - 1])

    def end(self, part: str, finished: bool) -> None:
        """Remove the line of a part that has ended."""
        self.all.update(finished)
        if part in self.lines:
            self.lines.pop(part).close()
