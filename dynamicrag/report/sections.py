"""Tables and sections of the page."""

import re
from dataclasses import dataclass, field

from dynamicrag.report.drawing import Picture


@dataclass
class Table:
    """A table of text cells; the first column names the line."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def numeric_columns(self) -> list[int]:
        """Return the indices of columns with numbers, which are right-aligned."""
        return [column for column in range(1, len(self.header)) if all(row[column][:1].isdigit() or not row[column] for row in self.rows)]


@dataclass
class Section:
    """A part of the page. `missing` says in one line which data is missing and which script creates it."""

    anchor: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    missing: str = ""


def slug(name: str) -> str:
    """Convert a name to a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "set"

